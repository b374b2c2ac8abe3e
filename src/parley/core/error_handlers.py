"""One table from what happened to what a caller is told, over HTTP and over the socket."""

import logging
from typing import Any

import asyncpg
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from parley.core import errors
from parley.core.db import is_connection_lost
from parley.core.envelope import respond_error
from parley.core.idempotency import Replay
from parley.core.rate_limits import Room, TooMany

logger = logging.getLogger(__name__)

# Category → HTTP status, socket code, whether a client should try again. The first match of the MRO counts.
CATEGORIES: dict[type[errors.AppError], tuple[int, str, str]] = {
    errors.BadRequest: (400, "bad_frame", "never"),
    errors.Unauthenticated: (401, "unauthenticated", "never"),
    errors.Forbidden: (403, "forbidden", "never"),
    errors.NotFound: (404, "not_found", "never"),
    errors.Conflict: (409, "conflict", "never"),
    errors.TooLarge: (413, "too_large", "never"),
    errors.Invalid: (422, "invalid", "never"),
    errors.RateLimited: (429, "rate_limited", "backoff"),
    errors.ProviderFailed: (502, "unavailable", "backoff"),
    errors.Unavailable: (503, "unavailable", "backoff"),
    errors.AppError: (500, "internal", "backoff"),
}

_BY_STATUS = {400: "bad_request", 401: "unauthenticated", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
              406: "not_acceptable", 413: "too_large", 415: "unsupported_media_type"}  # fmt: skip

# Whoever sends ten thousand unknown fields is not told of each.
_SHOWN = 20

# Pydantic's messages for these hold a piece of what was sent.
_PLAIN = {"uuid_parsing": "Input should be a valid UUID", "union_tag_invalid": "Input is of no kind that there is"}

# Pydantic's words for a bound → the name that the contract uses.
_CONSTRAINTS = ("min_length", "max_length", "ge", "gt", "le", "lt", "pattern", "multiple_of")


def category(error: errors.AppError) -> tuple[int, str, str]:
    """Return status, socket code and retry advice of an error."""
    return next(CATEGORIES[kind] for kind in type(error).__mro__ if kind in CATEGORIES)


def describe(error: errors.AppError) -> dict[str, Any]:
    """Return the error as the envelope shows it."""
    return {"error": error.code, "message": error.detail, "details": error.details}


def translate(error: Exception) -> errors.AppError | None:
    """Return what a database error means to a caller, or None when it is a fault of ours."""
    if isinstance(error, errors.AppError):
        return error
    if is_connection_lost(error):
        return errors.Unavailable("The database is not available.", retry_after_s=2)
    if isinstance(error, DBAPIError | asyncpg.PostgresError):
        state = getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None)
        # Serialization failure, deadlock, cancelled statement: the same request may succeed.
        if state in {"40001", "40P01", "57014", "55P03"}:
            return errors.Unavailable("The database was busy.", retry_after_s=1)
        # A value that the column cannot hold: our schemas should have refused it, the caller still sent it.
        if state and state.startswith("22"):
            return errors.Invalid("A value cannot be stored.")
    return None


def plain_message(problem: Any) -> str:
    """Return what a Pydantic error says, without a piece of what was sent."""
    if problem["type"] in {"too_long", "too_short"} and isinstance(problem.get("input"), str):
        # Behind another validator Pydantic counts what it does not know to be characters.
        bound = problem.get("ctx", {}).get("max_length" if problem["type"] == "too_long" else "min_length")
        return f"String should have at {'most' if problem['type'] == 'too_long' else 'least'} {bound} characters"
    return _PLAIN.get(problem["type"]) or str(problem["msg"]).removeprefix("Value error, ")


def validation_errors(problems: Any) -> list[dict[str, Any]]:
    """Return Pydantic's errors in the contract's shape: the field and the bound, never the value."""
    found = []
    for problem in list(problems)[:_SHOWN]:
        location = [str(part) for part in problem["loc"] if part not in {"body", "query", "path", "header"}]
        # The name of an unknown field is the caller's own text.
        field = "".join(c for c in ".".join(location) if c.isprintable())[:100] or None
        context = problem.get("ctx") or {}
        bounds = [f"{name}={context[name]}" for name in _CONSTRAINTS if name in context]
        message = plain_message(problem)
        found.append(
            {
                "error": "validation_error",
                "message": f"{field}: {message}" if field else message,
                "details": {"field": field, "constraint": ", ".join(bounds) or problem["type"]},
            }
        )
    return found


def _headers(status: int, error: errors.AppError) -> dict[str, str]:
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None or status in {429, 503}:
        headers["Retry-After"] = str(error.retry_after_s or 1)
    if isinstance(error, TooMany):
        headers["RateLimit-Policy"] = error.limit.policy
        headers["RateLimit"] = Room(error.limit, 0, error.retry_after_s or 1).header
    return headers


def error_response(error: Exception) -> Response:
    """Return the answer to an error; one that nobody foresaw is logged here, once, and tells nothing."""
    known = translate(error)
    if known is None:
        logger.error("unexpected error", exc_info=error)
        return respond_error(500, [describe(errors.AppError())])
    status = category(known)[0]
    if status >= 500:
        logger.warning("request failed: %s", known.code, extra={"cause": type(known.__cause__ or known).__name__})
    return respond_error(status, [describe(known)], headers=_headers(status, known))


async def _on_app_error(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        return error_response(errors.BadRequest("The body is not valid JSON."))
    if any(problem["type"] == "missing" and tuple(problem["loc"]) == ("body",) for problem in problems):
        return error_response(errors.BadRequest("A JSON body is needed."))
    return respond_error(422, validation_errors(problems))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, "error")
    message = "Not found." if error.status_code == 404 else str(error.detail)
    item = {"error": code, "message": message, "details": {}}
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    return respond_error(error.status_code, [item], headers=headers)


def _methods(request: Request) -> list[str]:
    """Return what the path can be asked with: each method is a route of its own here."""
    matching = [route for route in request.app.router.routes if route.matches(request.scope)[0] is not Match.NONE]
    # A word that stands where another route has an id is no id.
    matching = [route for route in matching if "{" not in getattr(route, "path", "")] or matching
    return sorted({method for route in matching for method in getattr(route, "methods", None) or ()})


async def _on_replay(_: Request, error: Exception) -> Response:
    assert isinstance(error, Replay)
    return error.response


def install_error_handlers(app: FastAPI) -> None:
    """Register the handlers. What passes them all is caught by the outermost middleware, through `error_response`."""
    app.add_exception_handler(errors.AppError, _on_app_error)
    app.add_exception_handler(Replay, _on_replay)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
