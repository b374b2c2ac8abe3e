"""API shapes of workspaces' own keys of providers."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import ConfigDict, Field, SecretStr, StringConstraints

from parley.core.outgoing import MAX_URL_CHARS
from parley.core.schemas import ReadModel, RequestModel, Text

ProviderName = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class ProviderKeySet(RequestModel):
    """A key, and maybe a URL of one's own. Both replace what was there: a key goes to no URL it was not given for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"key": "the-key-that-the-provider-gave"}]})

    key: SecretStr = Field(min_length=8, max_length=1000)
    base_url: Annotated[Text, StringConstraints(min_length=1, max_length=MAX_URL_CHARS)] | None = None


class ProviderKeyRead(ReadModel):
    """A provider that a workspace may have a key for. The key itself is shown never."""

    provider: str
    urls_allowed: bool
    """Whether a URL of one's own can be given with the key."""
    is_set: bool
    last_four: str | None
    base_url: str | None
    created_by: UUID | None
    created_at: datetime | None
    updated_at: datetime | None
    problem: str | None
    """Why the key that is set cannot be used; None when it can."""
