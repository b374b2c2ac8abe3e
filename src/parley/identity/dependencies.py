"""What routers ask of identity."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from parley.core.scope import bearer_token
from parley.identity.cookies import Cookies
from parley.identity.erasures import ErasureService
from parley.identity.exports import ExportService
from parley.identity.password_service import PasswordService
from parley.identity.service import IdentityService


async def _service(request: Request) -> IdentityService:
    service: IdentityService = request.app.state.identity
    return service


IdentityDep = Annotated[IdentityService, Depends(_service)]


async def _exports(request: Request) -> ExportService:
    service: ExportService = request.app.state.exports
    return service


ExportsDep = Annotated[ExportService, Depends(_exports)]


async def _erasures(request: Request) -> ErasureService:
    service: ErasureService = request.app.state.erasures
    return service


ErasuresDep = Annotated[ErasureService, Depends(_erasures)]


async def _passwords(request: Request) -> PasswordService:
    service: PasswordService = request.app.state.passwords
    return service


PasswordsDep = Annotated[PasswordService, Depends(_passwords)]


async def _cookies(request: Request) -> Cookies:
    cookies: Cookies = request.app.state.cookies
    return cookies


CookiesDep = Annotated[Cookies, Depends(_cookies)]

_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description="An access token from sign-up or sign-in.")


async def _cookie_mode(request: Request, cookies: CookiesDep) -> bool:
    return cookies.wanted(request)


CookieMode = Annotated[bool, Depends(_cookie_mode)]
"""Whether the request is in cookie mode. A dependency, so that a stranger's page is refused before its body is read."""


async def _optional_bearer(request: Request, _: Annotated[object, Depends(_bearer)]) -> str | None:
    return bearer_token(request.headers.get("authorization"))


OptionalBearer = Annotated[str | None, Depends(_optional_bearer)]
