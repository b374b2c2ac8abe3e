"""What requests and answers about tasks look like."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StringConstraints,
)
from pydantic_core import PydanticCustomError

from parley.core.schemas import ReadModel, RequestModel, storable
from parley.tasks.models import DESCRIPTION_LENGTH, TITLE_LENGTH

_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_DATE = re.compile(r"\d{4}-\d\d-\d\d[Tt ]", re.ASCII)


def _written_out(value: object) -> object:
    # Pydantic would take 5 and "5" for seconds since 1970.
    if isinstance(value, datetime) or (isinstance(value, str) and _DATE.match(value)):
        return value
    raise PydanticCustomError("datetime_parsing", "must be a date and time in ISO 8601 with an offset")


def _in_utc(value: datetime) -> datetime:
    try:
        found = value.astimezone(UTC)
    except OverflowError:
        found = _FIRST
    # The very first and last moment are what asyncpg takes for PostgreSQL's two infinities.
    if not _FIRST < found < _LAST:
        raise PydanticCustomError("datetime_range", "must lie in the years 1 to 9999 in UTC")
    return found


# The constraints come before `storable`: behind another validator Pydantic checks the length but strips nothing.
Title = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=TITLE_LENGTH), AfterValidator(storable)
]
Description = Annotated[str, StringConstraints(max_length=DESCRIPTION_LENGTH), AfterValidator(storable)]
# Kept in UTC, so that a task reads the same in the answer that made it as in every later one.
DueAt = Annotated[AwareDatetime, BeforeValidator(_written_out), AfterValidator(_in_utc)]

_EXAMPLE: dict[str, JsonValue] = {
    "title": "Buy milk",
    "description": "Two litres, from the shop on the corner.",
    "completed": False,
    "due_at": "2027-03-01T17:00:00Z",
}
_STORED: dict[str, JsonValue] = {
    "id": "0193c0de-9f3a-7bd2-8a51-3f0c9f0e1a2b",
    "user_id": "0193c0dd-12aa-7c33-9b1e-52f3a1c4d5e6",
    **_EXAMPLE,
    "created_at": "2027-02-26T09:30:00.123456Z",
    "updated_at": "2027-02-26T09:30:00.123456Z",
}


class TaskCreate(RequestModel):
    """A new task. Blanks around the title are dropped."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE, {"title": "Buy milk"}]})

    title: Title
    description: Description | None = None
    completed: StrictBool = False
    due_at: DueAt | None = None


class TaskReplace(TaskCreate):
    """The whole of a task: what is left out takes the value that it has on a new one."""


def _no_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _may_be_absent() -> Any:
    """Declare a field that may be left out but not be null: the default, never validated, says it was left out."""
    return Field(default=None, json_schema_extra=_no_default)


class TaskUpdate(RequestModel):
    """A part of a task: what is left out stays. Null clears the description and the due date."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"completed": True}, {"due_at": None}]})

    title: Title = _may_be_absent()
    description: Description | None = _may_be_absent()
    completed: StrictBool = _may_be_absent()
    due_at: DueAt | None = _may_be_absent()


class TaskRead(ReadModel):
    """A task."""

    model_config = ConfigDict(json_schema_extra={"examples": [_STORED]})

    id: UUID
    user_id: UUID
    title: str
    description: str | None
    completed: bool
    due_at: datetime | None
    created_at: datetime
    updated_at: datetime


class UserTaskRead(TaskRead):
    """A task below `/api/{user_id}`: `user_id` is the credential's own name for the user, as text."""

    user_id: str  # type: ignore[assignment]  # another issuer's subject need not be a UUID
