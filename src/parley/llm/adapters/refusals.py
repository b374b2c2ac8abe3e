"""Reads what a provider says when it refuses, in a status or inside a stream, as one of our errors."""

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from parley.llm.errors import (
    BadOutput,
    ContentFiltered,
    ContextTooLong,
    ModelError,
    ModelNotFound,
    ProviderAuthFailed,
    ProviderRateLimited,
    ProviderTimedOut,
    ProviderUnavailable,
    RequestRefused,
)
from parley.llm.text import read_json

logger = logging.getLogger(__name__)


def _out_of_quota(*, retry_after_s: int | None = None) -> ModelError:
    return ProviderRateLimited(
        "The account at the model provider has no credit left. An operator has to check it.",
        retry_after_s=retry_after_s,
        retryable=False,
    )


_BY_NAME: Mapping[str, Callable[..., ModelError]] = {
    "context_length_exceeded": ContextTooLong,
    "exceed_context_size_error": ContextTooLong,
    "request_too_large": ContextTooLong,
    "content_filter": ContentFiltered,
    "content_policy_violation": ContentFiltered,
    "image_content_policy_violation": ContentFiltered,
    # What OpenAI's reasoning models say of a prompt that breaks its usage policy.
    "invalid_prompt": ContentFiltered,
    "insufficient_quota": _out_of_quota,
    "billing_error": _out_of_quota,
    "invalid_api_key": ProviderAuthFailed,
    "authentication_error": ProviderAuthFailed,
    "permission_error": ProviderAuthFailed,
    "model_not_found": ModelNotFound,
    "not_found_error": ModelNotFound,
    "rate_limit_exceeded": ProviderRateLimited,
    "rate_limit_error": ProviderRateLimited,
    "timeout_error": ProviderTimedOut,
    "overloaded_error": ProviderUnavailable,
    # Google's words.
    "RESOURCE_EXHAUSTED": ProviderRateLimited,
    "UNAUTHENTICATED": ProviderAuthFailed,
    "PERMISSION_DENIED": ProviderAuthFailed,
    "NOT_FOUND": ModelNotFound,
    "DEADLINE_EXCEEDED": ProviderTimedOut,
}
_BY_STATUS: Mapping[int, Callable[..., ModelError]] = {
    401: ProviderAuthFailed,
    402: _out_of_quota,
    403: ProviderAuthFailed,
    404: ModelNotFound,
    408: ProviderTimedOut,
    413: ContextTooLong,
    425: ProviderUnavailable,
    429: ProviderRateLimited,
    504: ProviderTimedOut,
}
# Servers that give no code say it in words only.
_TOO_LONG = re.compile(r"prompt is too long|maximum context length|context (length|window|size)", re.IGNORECASE)
_LOGGABLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> ModelError:
    """Read an answer whose status is not 200."""
    try:
        found = read_json(body)
    except BadOutput:
        found = None
    if isinstance(found, list) and found:  # Gemini's way
        found = found[0]
    error = (found.get("error") or found) if isinstance(found, dict) else {}
    return _refusal(status, _as_object(error), _retry_after_s(headers))


def read_error(error: object) -> ModelError:
    """Read an error object that came inside a stream. Without a name that we know it is the provider's failure."""
    return _refusal(None, _as_object(error), None)


def _as_object(error: object) -> Mapping[str, Any]:
    if isinstance(error, dict):
        return error
    return {"message": error} if isinstance(error, str) else {}


def _refusal(status: int | None, error: Mapping[str, Any], retry_after_s: int | None) -> ModelError:
    code = error.get("code")
    if status is None and isinstance(code, int) and 400 <= code <= 599:
        status = code
    names = [name for name in (code, error.get("type"), error.get("status")) if isinstance(name, str)]
    # Only words of the protocol reach the log: messages may hold prompts or parts of keys.
    logged = [name if _LOGGABLE.fullmatch(name) else "?" for name in names]
    logger.warning("A provider refused a call: status %s, error %s", status, logged)
    for name in names:
        if name in _BY_NAME:
            return _BY_NAME[name](retry_after_s=retry_after_s)
    message = error.get("message")
    if status in {None, 400, 422} and isinstance(message, str) and _TOO_LONG.search(message):
        return ContextTooLong()
    if status is None or status >= 500:
        return _BY_STATUS.get(status or 500, ProviderUnavailable)(retry_after_s=retry_after_s)
    return _BY_STATUS.get(status, RequestRefused)(retry_after_s=retry_after_s)


def _retry_after_s(headers: Mapping[str, str]) -> int | None:
    """Read `Retry-After` in seconds. Its other form, a date, is read as absent: providers do not send it."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return math.ceil(seconds) if 0 <= seconds < 86_400 else None
