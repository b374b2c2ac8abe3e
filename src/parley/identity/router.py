"""Signing up, in and out, and sessions, over HTTP."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, Query, Request, Response

from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.errors import Unauthenticated
from parley.core.pagination import Page
from parley.core.scope import PUBLIC, CurrentScope
from parley.identity.cookies import Cookies, shown
from parley.identity.dependencies import CookieMode, CookiesDep, IdentityDep, OptionalBearer
from parley.identity.errors import RefreshInvalid
from parley.identity.schemas import (
    Accepted,
    Refresh,
    SessionAnswer,
    SessionRead,
    SignIn,
    SignOut,
    SignUp,
    Switch,
    TokenAnswer,
)
from parley.tenancy.permissions import Permission, needs

# Answers that hold tokens are kept nowhere.
_NO_STORE = {"Cache-Control": "no-store"}

_INVALID = {"model": ErrorEnvelope, "description": "The body does not hold; `details.field` says where"}
_BUSY = {"model": ErrorEnvelope, "description": "The database is away or too many sign-ins wait; see Retry-After"}
_MANY = {"model": ErrorEnvelope, "description": "Over a limit; see Retry-After"}
_CSRF = {"model": ErrorEnvelope, "description": "`csrf_refused`: in cookie mode, not from the application's own page"}

auth_router = APIRouter(prefix="/auth", tags=["auth"])


def _tokens(answer: TokenAnswer, cookies: Cookies, *, cookie: bool, status: int = 200) -> Response:
    """Answer with a session: in cookie mode its refresh token is in the cookie and nowhere else."""
    response = respond(shown(answer, cookie=cookie), status=status, headers=_NO_STORE)
    if cookie:
        cookies.keep(response, answer)
    return response


@auth_router.post(
    "/signup",
    status_code=201,
    summary="Sign up",
    response_model=Envelope[SessionAnswer],
    responses={
        202: {
            "model": Envelope[Accepted],
            "description": "Where addresses must be confirmed first: alike for new and for taken ones",
        },
        403: _CSRF,
        409: {"model": ErrorEnvelope, "description": "`email_taken`: there is an account with this address"},
        422: _INVALID,
        429: _MANY,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def sign_up(body: SignUp, cookie: CookieMode, identity: IdentityDep, cookies: CookiesDep) -> Response:
    """Make an account with a workspace of its own, signed in.

    `X-Parley-Session: cookie` keeps the refresh token in a cookie.
    """
    answer = await identity.sign_up(email=body.email, password=body.password, name=body.name, cookie=cookie)
    if answer is None:
        return respond(Accepted(status="accepted"), status=202, headers=_NO_STORE)
    response = _tokens(answer, cookies, cookie=cookie, status=201)
    cookies.remember_device(response, identity.devices.make(answer.user.id))
    return response


@auth_router.post(
    "/signin",
    summary="Sign in",
    response_model=Envelope[SessionAnswer],
    responses={
        401: {"model": ErrorEnvelope, "description": "`invalid_credentials`, alike for an unknown account"},
        403: {
            "model": ErrorEnvelope,
            "description": "With the right password: `email_unverified`, `account_deleted` (`restore` brings it back), "
            "`account_disabled`, `no_workspace`; or `csrf_refused`",
        },
        422: _INVALID,
        429: _MANY,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def sign_in(
    body: SignIn, request: Request, cookie: CookieMode, identity: IdentityDep, cookies: CookiesDep
) -> Response:
    """Open a session in the workspace that was used last, at first the account's own.

    `X-Parley-Session: cookie` keeps the refresh token in a cookie.
    """
    answer = await identity.sign_in(
        email=body.email,
        password=body.password,
        cookie=cookie,
        restore=body.restore,
        device=cookies.device(request),
    )
    response = _tokens(answer, cookies, cookie=cookie)
    cookies.remember_device(response, identity.devices.make(answer.user.id))
    return response


@auth_router.post(
    "/refresh",
    summary="Refresh a session",
    response_model=Envelope[SessionAnswer],
    responses={
        401: {
            "model": ErrorEnvelope,
            "description": "`refresh_invalid`, `session_expired`, `session_unknown`, or `session_revoked`: "
            "an old token was used again and the session has ended",
        },
        403: _CSRF,
        422: _INVALID,
        429: _MANY,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def refresh_session(
    request: Request,
    wanted: CookieMode,
    identity: IdentityDep,
    cookies: CookiesDep,
    body: Annotated[Refresh | None, Body()] = None,
) -> Response:
    """Exchange the refresh token for a new pair. Each holds once; a lost answer can be asked for again within 30 s.

    With `X-Parley-Session: cookie` the token is the cookie's, and the body has none.
    """
    given = body.refresh_token if body else None
    cookie = _uses_cookie(request, cookies, given, wanted=wanted)
    token = cookies.refresh_token(request) if cookie else given
    if not token:
        raise RefreshInvalid
    return _tokens(await identity.sessions.refresh(token, cookie=cookie), cookies, cookie=cookie)


@auth_router.post(
    "/signout",
    status_code=204,
    response_class=Response,
    summary="Sign out",
    responses={
        401: {"model": ErrorEnvelope, "description": "Neither token is one of ours"},
        403: _CSRF,
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def sign_out(
    request: Request,
    wanted: CookieMode,
    identity: IdentityDep,
    cookies: CookiesDep,
    access_token: OptionalBearer,
    body: Annotated[SignOut | None, Body()] = None,
) -> Response:
    """End the session of the bearer token, of the refresh token in the body, or of the cookie. Twice is no error."""
    given = body.refresh_token if body else None
    cookie = access_token is None and _uses_cookie(request, cookies, given, wanted=wanted)
    token = cookies.refresh_token(request) if cookie else given
    if cookie and not token:
        raise Unauthenticated
    await identity.sessions.sign_out(access_token, refresh_token=token)
    response = Response(status_code=204, headers=_NO_STORE)
    if cookies.refresh_token(request):
        cookies.forget(response)
    return response


@auth_router.post(
    "/switch",
    summary="Switch to another workspace",
    response_model=Envelope[SessionAnswer],
    responses={
        401: {"model": ErrorEnvelope},
        403: _CSRF,
        404: {"model": ErrorEnvelope, "description": "No such workspace, or the caller is no member of it"},
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def switch_workspace(body: Switch, scope: CurrentScope, identity: IdentityDep, cookies: CookiesDep) -> Response:
    """Put the session into another workspace. The old tokens stop at once, and sockets of theirs close."""
    answer, cookie = await identity.sessions.switch(scope, body.workspace_id)
    return _tokens(answer, cookies, cookie=cookie)


@auth_router.get(
    "/sessions",
    summary="List the caller's sessions",
    response_model=PageEnvelope[SessionRead],
    responses={401: {"model": ErrorEnvelope}, 422: _INVALID, 503: _BUSY},
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def list_sessions(scope: CurrentScope, identity: IdentityDep, page: Page) -> Response:
    """List the caller's sessions in all workspaces, the last used first."""
    rows, total = await identity.sessions.list(scope, page)
    return respond_page(rows, page=page, total=total)


@auth_router.delete(
    "/sessions",
    status_code=204,
    response_class=Response,
    summary="End the caller's sessions",
    responses={401: {"model": ErrorEnvelope}, 422: _INVALID, 503: _BUSY},
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def delete_sessions(
    scope: CurrentScope,
    identity: IdentityDep,
    keep_current: Annotated[bool, Query(description="Leave the session that asks")] = False,
) -> Response:
    """End every session of the caller, on every device, and what tokens of other issuers may do."""
    await identity.sessions.revoke_all(scope, keep_current=keep_current)
    return Response(status_code=204)


@auth_router.delete(
    "/sessions/{session_id}",
    status_code=204,
    response_class=Response,
    summary="End one of the caller's sessions",
    responses={
        401: {"model": ErrorEnvelope},
        404: {"model": ErrorEnvelope, "description": "No such session, or not the caller's"},
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def delete_session(session_id: UUID, scope: CurrentScope, identity: IdentityDep) -> Response:
    """End a session everywhere: its tokens are refused and its sockets close within two seconds."""
    await identity.sessions.revoke(scope, session_id)
    return Response(status_code=204)


def _uses_cookie(request: Request, cookies: Cookies, given: str | None, *, wanted: bool) -> bool:
    """Whether the refresh token is to come from the cookie; then the request has proved where it is from."""
    if wanted:
        if given is not None:
            # A session keeps its token in one place for its life.
            raise RefreshInvalid
        return True
    if given is None and cookies.refresh_token(request):
        cookies.guard(request)
    return False
