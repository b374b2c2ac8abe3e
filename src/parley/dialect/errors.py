"""What goes wrong, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

https://platform.openai.com/docs/guides/error-codes
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Response
from pydantic import ValidationError

from parley.core.error_handlers import category, translate
from parley.core.errors import AppError, Invalid, NotFound, RateLimited
from parley.llm.errors import (
    ContentFiltered,
    ContextTooLong,
    ModelError,
    ModelNotFound,
    ProviderAuthFailed,
    ProviderRateLimited,
    RequestRefused,
    UnknownModel,
)

logger = logging.getLogger(__name__)

OVER_BUDGET = "over_budget"
# OpenAI's clients repeat 408, 409, 429 and 5xx by themselves, unless an answer says that it makes no sense.
NO_RETRY = {"x-should-retry": "false"}
_INVALID = "invalid_request_error"
_SERVER = "server_error"


@dataclass(frozen=True)
class Failure:
    """An error as OpenAI's clients read it."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The body of the answer, and of an event of a stream that has begun."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        """Return the answer."""
        return Response(self.body, status_code=self.status, headers=dict(self.headers), media_type="application/json")


class RequestInvalid(Invalid):
    """The request asks for something that is not there. `param` is the field, in OpenAI's notation."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.value_code = code


class NotSupported(RequestInvalid):
    """The request sets a field that this server cannot honour."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="unsupported_parameter")


class ModelAbsent(NotFound):
    """There is no such model."""

    code = "model_not_found"
    message = "The model does not exist or you do not have access to it. GET /v1/models lists those that do."


class TooManyCalls(RateLimited):
    """The user has as many calls running as allowed."""

    code = "too_many_calls"
    message = "You have as many calls running as are allowed at once."


def failure_of(error: Exception) -> Failure:
    """Return what a caller is told. An error that nobody foresaw is logged here and tells nothing."""
    known = translate(error)
    if known is None:
        logger.error("unexpected error", exc_info=error)
        known = AppError()
    match known:
        case RequestInvalid():
            return Failure(400, known.detail, param=known.param, code=known.value_code or known.code)
        case UnknownModel() | ModelAbsent():
            return Failure(404, ModelAbsent.message, param="model", code=ModelAbsent.code)
        case ModelError():
            return _provider_failure(known)
    status = category(known)[0]
    if status >= 500:
        logger.warning("request failed: %s", known.code, extra={"cause": type(known.__cause__ or known).__name__})
    headers = {}
    if known.retry_after_s is not None or status in {429, 503}:
        headers["Retry-After"] = str(known.retry_after_s or 1)
    return shaped(status, code=known.code, message=known.detail, details=known.details, headers=headers)


def shaped(
    status: int,
    *,
    code: str,
    message: str,
    details: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Failure:
    """Return an error of ours, by its status and code, as OpenAI would tell it."""
    headers = dict(headers or {})
    if code == OVER_BUDGET:
        return Failure(429, message, "insufficient_quota", None, "insufficient_quota", {**headers, **NO_RETRY})
    match status:
        case 401:
            return Failure(401, message, code="invalid_api_key", headers=headers)
        case 403 if "permission" in details:
            message = f"You have insufficient permissions for this operation. Missing scope: {details['permission']}."
            return Failure(403, message, code="missing_scope", headers=headers)
        case 403:
            return Failure(403, message, code=code, headers=headers)
        case 422:
            return Failure(400, message, param=details.get("field"), code="invalid_value", headers=headers)
        case 429:
            return Failure(429, message, "requests", None, "rate_limit_exceeded", headers)
    return Failure(status, message, _SERVER if status >= 500 else _INVALID, None, code, headers)


def _provider_failure(error: ModelError) -> Failure:
    """Return what became of the call of a model. Its messages are ours: none holds a provider's text."""
    match error:
        case ContextTooLong():
            return Failure(400, error.detail, param="messages", code="context_length_exceeded")
        case ContentFiltered():
            return Failure(400, error.detail, param="messages", code="content_filter")
        case RequestRefused():
            return Failure(400, error.detail, code="request_refused")
        case ProviderRateLimited():
            headers = {"Retry-After": str(error.retry_after_s or 1)}
            return Failure(429, error.detail, "requests", None, "rate_limit_exceeded", headers)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, ProviderAuthFailed | ModelNotFound):
        headers |= NO_RETRY  # it takes an operator
    logger.warning("model call failed: %s", error.code)
    return Failure(502, error.detail, _SERVER, None, error.code, headers)


def invalid_fields(error: ValidationError, body: object) -> RequestInvalid:
    """Return what is wrong with a body. Where nothing of an alternative fits, the problem that lies deepest is told."""
    problems = [
        (_param(problem["loc"], body, missing=problem["type"] == "missing"), problem)
        for problem in error.errors(include_url=False)
    ]
    path, problem = max(problems, key=lambda item: len(item[0]))
    param = _written(path)
    if problem["type"] == "missing":
        return RequestInvalid(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if problem["type"] == "union_tag_invalid":
        # Pydantic's own words repeat what was sent.
        reason = f"Input should be one of {problem['ctx']['expected_tags']}"
    else:
        reason = problem["msg"].removeprefix("Value error, ")
    return RequestInvalid(f"Invalid value for '{param}': {reason}.", param=param)


def _param(location: Iterable[str | int], body: object, *, missing: bool) -> list[str | int]:
    """Return the path of a field: Pydantic's, without the names of the alternatives that it tried."""
    found: list[str | int] = []
    here: Any = body
    *_, last = parts = list(location)
    for part in parts:
        try:
            here = here[part]
        except (LookupError, TypeError):
            continue
        found.append(part)
    if missing and isinstance(here, dict):
        found.append(last)
    return found


def _written(path: Sequence[str | int]) -> str:
    """Write a path as OpenAI does: `messages[0].content`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return "".join(char for char in text if char.isprintable())[:200]
