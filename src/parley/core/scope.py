"""Who is asking, in which workspace. A `Scope` is built only from a verified credential."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Protocol
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from parley.core.errors import Forbidden, Unauthenticated
from parley.core.logging import bind_log_context

NO_WORKSPACE: Final = UUID(int=0)
"""Stands where a workspace is asked for and there is none: work and records of the installation itself."""

PERMISSION_KEY: Final = "x-permission"
"""Where a route's entry in the OpenAPI document says what it asks of the caller."""

PUBLIC: Final[dict[str, Any]] = {PERMISSION_KEY: "public"}
"""For `openapi_extra` of a route that anyone may call."""


class Role(StrEnum):
    """What a member may do; a later one may all that an earlier one may."""

    VIEWER = "viewer"
    MEMBER = "member"
    ADMIN = "admin"
    OWNER = "owner"

    def at_least(self, other: "Role") -> bool:
        """Whether this role has the rights of the other one."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Scope:
    """The workspace, user and role that a piece of work runs as.

    `subject` is the credential's own `sub`: for our tokens the user's id as text. `permissions` is what the role and
    the credential allow together; one of `session_id`, `key_id` and `issuer` says which credential it was.
    """

    workspace_id: UUID
    user_id: UUID
    role: Role
    session_id: UUID | None = None
    subject: str = ""
    permissions: frozenset[str] = frozenset()
    key_id: UUID | None = None
    issuer: str | None = None
    issued_at: float | None = None
    """When another issuer's token was made, in seconds since 1970: it has no session that could be ended."""

    def require(self, permission: str) -> None:
        """Raise `Forbidden` unless the scope has the permission."""
        if permission not in self.permissions:
            raise Forbidden(details={"permission": permission})


@dataclass(frozen=True, slots=True)
class Credential:
    """A scope and until when it holds. `expires_at` is in seconds since 1970."""

    scope: Scope
    expires_at: float


class Authenticator(Protocol):
    """Turns credentials into scopes; identity provides it, everything else only asks."""

    async def authenticate(self, token: str) -> Credential:
        """Verify a bearer token, its session and its membership. Raises `Unauthenticated`."""
        ...

    async def reauthenticate(self, scope: Scope) -> Credential:
        """Check that a scope that was verified before still holds. Raises `Unauthenticated`."""
        ...


class Admission(Protocol):
    """Counts requests against their limits; each method raises `RateLimited` when there are too many."""

    async def before_verifying(self, address: str | None) -> None:
        """Look whether credentials are taken from an address at all."""
        ...

    async def refused(self, address: str | None) -> None:
        """Count a credential that did not hold."""
        ...

    async def request(self, scope: "Scope") -> object | None:
        """Count a request; return what is left."""
        ...


def bearer_token(header: str | None) -> str | None:
    """Return the token of an Authorization header, or None when there is none to speak of."""
    if not header:
        return None
    scheme, _, token = header.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


class ScopeBearer(HTTPBearer):
    """The bearer scheme of the API's document, which gives the scope itself.

    FastAPI's own answers 403 to a header that it cannot read; here every credential that does not hold is a 401.
    """

    async def __call__(self, request: Request) -> Scope:  # type: ignore[override]  # the scope and not the raw header
        """Return the caller's scope. Raises `Unauthenticated`, and `Forbidden` without the route's permission."""
        state = request.app.state
        authenticator: Authenticator = state.authenticator
        admission: Admission = state.api_limits
        client = request.scope.get("client")
        address = client[0] if client else None
        token = bearer_token(request.headers.get("authorization")) or ""
        await admission.before_verifying(address)
        try:
            credential = await authenticator.authenticate(token)
        except Unauthenticated:
            # Without one nothing was tried.
            if token:
                await admission.refused(address)
            raise
        request.state.credential = credential
        # Counted before the permission is looked at: what is refused is asked too.
        request.state.room = await admission.request(credential.scope)
        bind_log_context(workspace_id=str(credential.scope.workspace_id), user_id=str(credential.scope.user_id))
        # A route that declares nothing is closed; `install_routes` does not even register one.
        credential.scope.require((request.scope["route"].openapi_extra or {}).get(PERMISSION_KEY, ""))
        return credential.scope


current_scope = ScopeBearer(
    auto_error=False, scheme_name="bearer", description="An access token from sign-up or sign-in, or an API key."
)

CurrentScope = Annotated[Scope, Depends(current_scope)]
