"""API shapes of the search."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from annotated_types import Len
from pydantic import Field

from parley.core.schemas import ReadModel

Mark = Annotated[list[int], Len(2, 2)]


class SearchHit(ReadModel):
    """A place where the words stand: in a message, or in a conversation's title (`message_id` is null then).

    `snippet` is plain text and never HTML: whoever shows it escapes it, then marks what `marks` names.
    """

    conversation_id: UUID
    title: str | None
    message_id: UUID | None
    role: Literal["user", "assistant", "system"] | None
    snippet: str
    marks: list[Mark] = Field(description="Where the words stand in the snippet: start and end, in code points")
    created_at: datetime
