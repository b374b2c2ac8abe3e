"""What request bodies have in common: unknown fields are refused, text is text that PostgreSQL can hold."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(value: str) -> str:
    """Refuse NUL and lone surrogates: JSON can carry them, PostgreSQL's text cannot."""
    if _UNSTORABLE.search(value):
        raise PydanticCustomError("unstorable_text", "must not contain NUL or unpaired surrogates")
    return value


Text = Annotated[str, AfterValidator(storable)]


class RequestModel(BaseModel):
    """A request body or a client's frame."""

    model_config = ConfigDict(extra="forbid", strict=False, str_max_length=100_000)


class ReadModel(BaseModel):
    """What an answer holds. No defaults, so that clients see every field as required."""

    model_config = ConfigDict(from_attributes=True)
