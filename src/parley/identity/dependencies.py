"""What routers ask of identity."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from parley.core.scope import bearer_token
from parley.identity.service import IdentityService


async def _service(request: Request) -> IdentityService:
    service: IdentityService = request.app.state.identity
    return service


IdentityDep = Annotated[IdentityService, Depends(_service)]


async def _user_agent(request: Request) -> str | None:
    return request.headers.get("user-agent")


# Not a header parameter: it would stand in the document of every route.
UserAgent = Annotated[str | None, Depends(_user_agent)]

_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description="An access token from sign-up or sign-in.")


async def _optional_bearer(request: Request, _: Annotated[object, Depends(_bearer)]) -> str | None:
    return bearer_token(request.headers.get("authorization"))


OptionalBearer = Annotated[str | None, Depends(_optional_bearer)]
