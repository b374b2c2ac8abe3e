"""What can go wrong for a client."""

from typing import Any

_STATUS = {
    "bad_frame": 400, "invalid": 422, "unauthenticated": 401, "forbidden": 403, "not_found": 404, "conflict": 409,
    "busy": 409, "rate_limited": 429, "too_large": 413, "active_reply": 409, "limit_subs": 429, "over_budget": 429,
    "unavailable": 503, "expired": 410, "internal": 500,
}  # fmt: skip
"""The HTTP status that says the same as an `err` frame's code."""


class ClientError(Exception):
    """Anything this client raises."""


class ApiError(ClientError):
    """The server refused. `code` is stable, `message` may be shown to people."""

    def __init__(self, status: int, code: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(f"{message} ({code})")
        self.status = status
        self.code = code
        self.message = message
        self.details = details or {}

    @classmethod
    def from_frame(cls, frame: dict[str, Any]) -> "ApiError":
        """Return the error that an `err` frame tells of."""
        details: dict[str, Any] = {key: frame[key] for key in ("ch", "retry", "retry_after_ms") if key in frame}
        return cls(_STATUS.get(frame["code"], 500), frame["code"], frame.get("msg", ""), details)


class ServerUnreachable(ClientError):
    """No answer from the server: not there, or the connection broke."""


class ConnectionStopped(ClientError):
    """The live connection has ended for good: closed by us, or by a code that is not retried."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"the connection has ended ({code}{': ' if reason else ''}{reason})")
        self.code = code
        self.reason = reason


class ReplyGone(ClientError):
    """The reply that is waited for was deleted, or may not be seen any more."""
