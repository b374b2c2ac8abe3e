"""One door for every kind of credential: our access tokens, API keys, other issuers' tokens."""

from typing import Protocol

from parley.core.errors import Unauthenticated
from parley.core.scope import Credential, Scope


class CredentialKind(Protocol):
    """Verifies one kind of credential."""

    def takes(self, token: str) -> bool:
        """Whether a bearer token looks like one of this kind. Cheap, and proves nothing."""
        ...

    def holds(self, scope: Scope) -> bool:
        """Whether a scope came from a credential of this kind."""
        ...

    async def authenticate(self, token: str) -> Credential:
        """Verify a token. Raises `Unauthenticated`, `Unavailable`."""
        ...

    async def reauthenticate(self, scope: Scope) -> Credential:
        """Check that a scope that was verified before still holds. Raises `Unauthenticated`."""
        ...


class BearerAuthenticator:
    """The `Authenticator` of the service: asks the first kind that takes a token. Order matters, the last takes all."""

    def __init__(self, kinds: tuple[CredentialKind, ...]) -> None:
        self._kinds = kinds

    async def authenticate(self, token: str) -> Credential:
        """Verify a bearer token of any kind. Raises `Unauthenticated`, `Unavailable`."""
        for kind in self._kinds:
            if token and kind.takes(token):
                return await kind.authenticate(token)
        raise Unauthenticated

    async def reauthenticate(self, scope: Scope) -> Credential:
        """Check that a scope that was verified before still holds. Raises `Unauthenticated`."""
        for kind in self._kinds:
            if kind.holds(scope):
                return await kind.reauthenticate(scope)
        raise Unauthenticated
