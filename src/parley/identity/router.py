"""Accounts and sessions over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Body, Response

from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.scope import PUBLIC, CurrentScope
from parley.identity.dependencies import IdentityDep, OptionalBearer, UserAgent
from parley.identity.schemas import MeRead, Refresh, SignIn, SignOut, SignUp, TokenAnswer, UserUpdate
from parley.tenancy.permissions import Permission, needs

# Answers that hold tokens are kept nowhere.
_NO_STORE = {"Cache-Control": "no-store"}

_INVALID = {"model": ErrorEnvelope, "description": "The body does not hold; `details.field` says where"}
_BUSY = {"model": ErrorEnvelope, "description": "The database is away or too many sign-ins wait; see Retry-After"}

auth_router = APIRouter(prefix="/auth", tags=["auth"])
me_router = APIRouter(prefix="/me", tags=["me"])


@auth_router.post(
    "/signup",
    status_code=201,
    summary="Sign up",
    response_model=Envelope[TokenAnswer],
    responses={
        409: {"model": ErrorEnvelope, "description": "`email_taken`: there is an account with this address"},
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def sign_up(body: SignUp, identity: IdentityDep, user_agent: UserAgent) -> Response:
    """Make an account with a workspace of its own, signed in."""
    answer = await identity.sign_up(email=body.email, password=body.password, name=body.name, user_agent=user_agent)
    return respond(answer, status=201, headers=_NO_STORE)


@auth_router.post(
    "/signin",
    summary="Sign in",
    response_model=Envelope[TokenAnswer],
    responses={
        401: {"model": ErrorEnvelope, "description": "`invalid_credentials`, alike for an unknown account"},
        403: {"model": ErrorEnvelope, "description": "`no_workspace`: the account is in no workspace any more"},
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def sign_in(body: SignIn, identity: IdentityDep, user_agent: UserAgent) -> Response:
    """Open a session in the workspace that was used last, at first the account's own."""
    answer = await identity.sign_in(email=body.email, password=body.password, user_agent=user_agent)
    return respond(answer, headers=_NO_STORE)


@auth_router.post(
    "/refresh",
    summary="Refresh a session",
    response_model=Envelope[TokenAnswer],
    responses={
        401: {
            "model": ErrorEnvelope,
            "description": "`refresh_invalid`, `session_expired`, `session_unknown`, or `session_revoked`: "
            "an old token was used again and the session has ended",
        },
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def refresh_session(body: Refresh, identity: IdentityDep, user_agent: UserAgent) -> Response:
    """Exchange the refresh token for a new pair. Each holds once; a lost answer can be asked for again within 30 s."""
    answer = await identity.refresh(body.refresh_token, user_agent=user_agent)
    return respond(answer, headers=_NO_STORE)


@auth_router.post(
    "/signout",
    status_code=204,
    response_class=Response,
    summary="Sign out",
    responses={
        401: {"model": ErrorEnvelope, "description": "Neither token is one of ours"},
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=PUBLIC,
)
async def sign_out(
    identity: IdentityDep, access_token: OptionalBearer, body: Annotated[SignOut | None, Body()] = None
) -> Response:
    """End the session of the bearer token or of the refresh token in the body. Doing it twice is no error."""
    await identity.sign_out(access_token, refresh_token=body.refresh_token if body else None)
    return Response(status_code=204, headers=_NO_STORE)


@me_router.get(
    "",
    summary="Read the caller",
    response_model=Envelope[MeRead],
    responses={401: {"model": ErrorEnvelope}, 503: _BUSY},
    openapi_extra=needs(Permission.PROFILE_READ),
)
async def get_me(scope: CurrentScope, identity: IdentityDep) -> Response:
    """Return the caller and the workspace that the token is for."""
    return respond(await identity.me(scope))


@me_router.patch(
    "",
    summary="Change the caller",
    response_model=Envelope[MeRead],
    responses={401: {"model": ErrorEnvelope}, 422: _INVALID, 503: _BUSY},
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def update_me(body: UserUpdate, scope: CurrentScope, identity: IdentityDep) -> Response:
    """Change the caller's name."""
    return respond(await identity.rename(scope, body.name))
