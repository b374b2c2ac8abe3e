"""What can go wrong, by category.

A module declares what can happen in it as subclasses in its own `errors.py`. `core/error_handlers.py` maps a category
to an HTTP status and to a socket frame; nothing else does. Messages are shown to callers: they never hold a
submitted value, a secret or a vendor's text.
"""

from typing import Any, ClassVar


class AppError(Exception):
    """Something the caller can be told about.

    `code` is stable and machine-readable, `message` safe to show, `details` declared data.
    """

    code: ClassVar[str] = "internal"
    message: ClassVar[str] = "Something went wrong on our side."
    frame_code: ClassVar[str | None] = None
    """The code on the socket, where it is not the category's."""

    def __init__(
        self, message: str | None = None, *, details: dict[str, Any] | None = None, retry_after_s: int | None = None
    ) -> None:
        self.detail = message or self.message
        self.details = details or {}
        self.retry_after_s = retry_after_s
        super().__init__(self.detail)


class BadRequest(AppError):
    """The request cannot be parsed at all."""

    code = "bad_request"
    message = "The request could not be read."


class Invalid(AppError):
    """The request parses, its content does not hold."""

    code = "validation_error"
    message = "The request is not valid."


class Unauthenticated(AppError):
    """No credential, or one that does not hold."""

    code = "unauthenticated"
    message = "A valid credential is required."


class Forbidden(AppError):
    """The permission is missing in the caller's own workspace."""

    code = "forbidden"
    message = "You may not do this."


class NotFound(AppError):
    """It does not exist, or belongs to someone else: the two look alike."""

    code = "not_found"
    message = "Not found."


class Conflict(AppError):
    """The state of the thing does not allow it."""

    code = "conflict"
    message = "This conflicts with the current state."


class TooLarge(AppError):
    """A body, frame or field is over its limit."""

    code = "too_large"
    message = "The request is too large."


class RateLimited(AppError):
    """Too many, too fast."""

    code = "rate_limited"
    message = "Too many requests."


class Unavailable(AppError):
    """A part that is needed is away; trying again may help."""

    code = "unavailable"
    message = "The service is temporarily unavailable."


class OutcomeUnknown(Unavailable):
    """The database went away during COMMIT: the change may or may not have been made.

    Repeating it is safe only with the same idempotency key.
    """

    code = "outcome_unknown"
    message = "The outcome of this request is unknown. Retry it with the same Idempotency-Key."


class ProviderFailed(AppError):
    """A model provider failed."""

    code = "provider_failed"
    message = "The model provider failed."
