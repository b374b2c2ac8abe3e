"""The envelope of every answer: `{data, meta, errors}`, and on failure the first error at the top too."""

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from parley.core.logging import current_request_id
from parley.core.pagination import PageRequest


class Meta(BaseModel):
    """About the answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"request_id": "req_0193c0de9f3a7bd2"}]})

    request_id: str


class PageMeta(Meta):
    """About one page of a list."""

    page: int
    per_page: int
    total: int


class CursorMeta(Meta):
    """About one stretch of a list that is read by cursor; `next_cursor` is null on the last one."""

    next_cursor: str | None


class Envelope[T](BaseModel):
    """A successful answer."""

    data: T
    meta: Meta
    errors: list[Any] = Field(default_factory=list, max_length=0)


class PageEnvelope[T](BaseModel):
    """A page of a list."""

    data: list[T]
    meta: PageMeta
    errors: list[Any] = Field(default_factory=list, max_length=0)


class CursorEnvelope[T](BaseModel):
    """A stretch of a list."""

    data: list[T]
    meta: CursorMeta
    errors: list[Any] = Field(default_factory=list, max_length=0)


class ErrorItem(BaseModel):
    """One thing that is wrong."""

    error: str
    message: str
    details: dict[str, Any]


class ErrorEnvelope(BaseModel):
    """A failure: the top level repeats the first of `errors`."""

    data: None
    meta: Meta
    error: str
    message: str
    details: dict[str, Any]
    errors: list[ErrorItem]


_any = TypeAdapter(Any)


def dump(value: object) -> bytes:
    """Return the JSON of schemas, lists of them and plain values."""
    return value.__pydantic_serializer__.to_json(value) if isinstance(value, BaseModel) else _any.dump_json(value)


def respond(data: object, *, status: int = 200, headers: dict[str, str] | None = None, **meta: object) -> Response:
    """Answer with the envelope.

    A finished response, so that FastAPI does not validate and copy the data once more: routes declare their
    `response_model` for the document, tests hold the two together.
    """
    about = orjson.dumps({"request_id": current_request_id(), **meta})
    body = b'{"data":' + dump(data) + b',"meta":' + about + b',"errors":[]}'
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def respond_page(rows: Sequence[BaseModel], *, page: PageRequest, total: int) -> Response:
    """Answer with one page of a list."""
    return respond(rows, page=page.page, per_page=page.per_page, total=total)


def respond_error(status: int, errors: Sequence[dict[str, Any]], *, headers: dict[str, str] | None = None) -> Response:
    """Answer with a failure; `errors` are dicts of `error`, `message`, `details`."""
    body = {"data": None, "meta": {"request_id": current_request_id()}, **errors[0], "errors": list(errors)}
    return Response(orjson.dumps(body), status_code=status, headers=headers, media_type="application/json")
