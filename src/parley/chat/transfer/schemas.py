"""API shapes of exports and imports."""

from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from parley.chat.attachments.schemas import AttachmentRead
from parley.chat.schemas import ConversationRead, MessageRead
from parley.core.schemas import ReadModel

ExportFormat = Literal["json", "markdown"]

FORMAT = "parley.conversation"
VERSION = 1


class ExportedAttachment(AttachmentRead):
    """A file of a conversation. `data` is its bytes in base64, where they were asked for and not too many."""

    sha256: str
    data: str | None


class ConversationExport(BaseModel):
    """A whole conversation: every branch, messages before what answers them."""

    model_config = ConfigDict(title="ConversationExport")

    format: Literal["parley.conversation"]
    version: Literal[1]
    conversation: ConversationRead
    messages: list[MessageRead]
    attachments: list[ExportedAttachment]


class ImportJob(ReadModel):
    """The job that imports."""

    id: UUID
    kind: str


class ImportStarted(ReadModel):
    """What an upload is answered with. `GET jobs/{id}` and `user:me` tell how far it is, and its result."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"job": {"id": "0193c0de-9f3a-7bd2-8000-000000000003", "kind": "import"}}]}
    )

    job: ImportJob


def result_of(counts: dict[str, int], problems: list[dict[str, Any]], *, more: int) -> dict[str, Any]:
    """Return the result of an import's job. `problems` names the items that could not be taken, and why."""
    return {**counts, "problems": problems, "more_problems": more}
