"""Passwords and addresses over HTTP."""

from typing import Any

from fastapi import APIRouter, Response

from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.scope import PUBLIC, CurrentScope
from parley.identity.dependencies import PasswordsDep
from parley.identity.schemas import Accepted, EmailOnly, EmailToken, PasswordChange, PasswordReset
from parley.tenancy.permissions import Permission, needs

router = APIRouter(prefix="/auth", tags=["auth"])

_INVALID = {"model": ErrorEnvelope, "description": "The body does not hold; `details.field` says where"}
_LINK = {"model": ErrorEnvelope, "description": "`link_invalid`: the token is not good any more; or the body"}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    429: {"model": ErrorEnvelope, "description": "Over a limit; see Retry-After"},
    503: {"model": ErrorEnvelope, "description": "The database is away or too many passwords wait; see Retry-After"},
}


@router.post(
    "/password/change",
    status_code=204,
    response_class=Response,
    summary="Change the password",
    responses={
        **_ANSWERS,
        401: {"model": ErrorEnvelope},
        403: {"model": ErrorEnvelope, "description": "`invalid_credentials`: the current password is not right"},
        409: {"model": ErrorEnvelope, "description": "`no_password`: the account signs in elsewhere"},
        422: _INVALID,
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def change_password(body: PasswordChange, scope: CurrentScope, passwords: PasswordsDep) -> Response:
    """Change the caller's password. Their other sessions end, and they are told by mail."""
    await passwords.change(scope, current_password=body.current_password, password=body.password)
    return Response(status_code=204)


@router.post(
    "/password/forgot",
    status_code=202,
    summary="Ask for a new password",
    response_model=Envelope[Accepted],
    responses={**_ANSWERS, 422: _INVALID},
    openapi_extra=PUBLIC,
)
async def forgot_password(body: EmailOnly, passwords: PasswordsDep) -> Response:
    """Have a link mailed with which a new password can be chosen. Alike for addresses without an account."""
    await passwords.forgot(body.email)
    return respond(Accepted(status="accepted"), status=202)


@router.post(
    "/password/reset",
    status_code=204,
    response_class=Response,
    summary="Choose a new password",
    responses={**_ANSWERS, 422: _LINK},
    openapi_extra=PUBLIC,
)
async def reset_password(body: PasswordReset, passwords: PasswordsDep) -> Response:
    """Set a new password with the token from the mail, once. Every session ends."""
    await passwords.reset(body.token, body.password)
    return Response(status_code=204)


@router.post(
    "/email/verify",
    status_code=204,
    response_class=Response,
    summary="Confirm an address",
    responses={
        **_ANSWERS,
        409: {"model": ErrorEnvelope, "description": "`email_taken`: the new address has another account by now"},
        422: _LINK,
    },
    openapi_extra=PUBLIC,
)
async def verify_email(body: EmailToken, passwords: PasswordsDep) -> Response:
    """Confirm an address, or the change to a new one, with the token from the mail."""
    await passwords.verify(body.token)
    return Response(status_code=204)


@router.post(
    "/email/resend",
    status_code=202,
    summary="Ask for the confirmation again",
    response_model=Envelope[Accepted],
    responses={**_ANSWERS, 422: _INVALID},
    openapi_extra=PUBLIC,
)
async def resend_confirmation(body: EmailOnly, passwords: PasswordsDep) -> Response:
    """Have the confirmation mailed again, if an account waits for one. Alike for all other addresses."""
    await passwords.resend(body.email)
    return respond(Accepted(status="accepted"), status=202)
