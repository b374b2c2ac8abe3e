"""What the API takes and shows of API keys."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, StringConstraints, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from parley.core import clock
from parley.core.schemas import ReadModel, RequestModel, storable
from parley.tenancy.permissions import Permission

KEY_EXAMPLE = "parley_sk_AQGTwN6fOnvSgAAKGyw9TgGTwN6fOnvSgAArHUpcbn8x9Kq0Zc5mE2yTtV7rHhQwJ3oLd8sPnXuB1aGf"

_LAST = datetime.max.replace(tzinfo=UTC)
_DATE = re.compile(r"\d{4}-\d\d-\d\d[Tt ]", re.ASCII)

_READ: JsonDict = {
    "id": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
    "name": "Nightly import",
    "prefix": "parley_sk_AQGTwN6fOnvS",
    "last_four": "1aGf",
    "scopes": ["tasks:read", "tasks:write"],
    "created_at": "2026-11-21T08:00:00Z",
    "expires_at": "2027-11-21T08:00:00Z",
    "last_used_at": None,
}

# What `KEY_SCOPES` holds, as a closed set for the document.
KeyScope = Literal[
    Permission.TASKS_READ,
    Permission.TASKS_WRITE,
    Permission.CHAT_READ,
    Permission.CHAT_WRITE,
    Permission.ASSISTANTS_WRITE,
    Permission.ASSISTANTS_MANAGE,
    Permission.PROMPTS_READ,
    Permission.MODELS_READ,
    Permission.MODELS_CALL,
    Permission.REALTIME_CONNECT,
    Permission.JOBS_READ,
    Permission.USAGE_READ,
    Permission.USAGE_READ_ALL,
    Permission.PROFILE_READ,
]
# The constraints come before `storable`: behind another validator Pydantic checks the length but strips nothing.
KeyName = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), AfterValidator(storable)
]


class ApiKeyCreate(RequestModel):
    """A new API key: without `scopes` it may all that a key may, without `expires_at` it holds until it is revoked."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "Nightly import", "scopes": ["tasks:read", "tasks:write"]}]}
    )

    name: KeyName
    scopes: Annotated[list[KeyScope], Field(min_length=1, max_length=50)] | None = Field(
        default=None, description="What the key may do, of what its maker may; left out: everything that a key may do"
    )
    expires_at: AwareDatetime | None = Field(default=None, description="ISO 8601 with an offset, in the future")

    @field_validator("expires_at", mode="before")
    @classmethod
    def _written_out(cls, value: object) -> object:
        # Pydantic would take 5 and "5" for seconds since 1970.
        if value is None or isinstance(value, datetime) or (isinstance(value, str) and _DATE.match(value)):
            return value
        raise PydanticCustomError("datetime_parsing", "must be a date and time in ISO 8601 with an offset")

    @field_validator("expires_at")
    @classmethod
    def _in_the_future(cls, value: datetime | None) -> datetime | None:
        if value is None:
            return None
        try:
            found = value.astimezone(UTC)
        except OverflowError:
            found = _LAST
        if found <= clock.now():
            raise PydanticCustomError("in_the_past", "must be in the future")
        # The very last moment is what asyncpg takes for PostgreSQL's infinity.
        if found >= _LAST:
            raise PydanticCustomError("datetime_range", "must lie before the year 10000 in UTC")
        return found


class ApiKeyRead(ReadModel):
    """An API key, without the key."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [_READ]})

    id: UUID
    name: str
    prefix: str
    last_four: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


def _key_is_optional(schema: dict[str, Any]) -> None:
    schema["required"] = [name for name in schema["required"] if name != "key"]
    schema["examples"] = [{**_READ, "key": KEY_EXAMPLE}]


class ApiKeyCreated(ApiKeyRead):
    """A new API key with the key itself: shown this once, and left out when a repeated request is answered again."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra=_key_is_optional)

    key: Annotated[str, Field(repr=False, description="Shown this once: nobody can read it again")]
