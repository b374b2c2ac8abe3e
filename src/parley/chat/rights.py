"""What whoever asked for a reply may do by now: a reply can outlive the rights that it was asked for with."""

from dataclasses import replace

from parley.core.db import Database
from parley.core.errors import Unauthenticated
from parley.core.scope import Authenticator, Role, Scope
from parley.identity.errors import TokenInvalid
from parley.tenancy.permissions import permissions_of

_ROLE = "SELECT role FROM memberships WHERE workspace_id = $1 AND user_id = $2"


class Rights:
    """Looks at an asker's credential again. Usually that is a look into memory, which forgets what is revoked."""

    def __init__(self, database: Database, authenticator: Authenticator) -> None:
        self._database = database
        self._authenticator = authenticator

    async def now(self, scope: Scope) -> Scope:
        """Return a scope with what is left of its rights: never more than it had.

        Raises `Unauthenticated` when its credential holds no more or the user is no member any more, `Unavailable`
        when that cannot be known.
        """
        if scope.key_id is None and scope.session_id is None and scope.issuer is None:
            return await self._by_membership(scope)
        try:
            found = (await self._authenticator.reauthenticate(scope)).scope
        except TokenInvalid:
            if scope.session_id is None:
                raise
            # The session is in another workspace by now. It has not ended, and neither has what it began here.
            return await self._by_membership(scope)
        return replace(scope, role=found.role, permissions=scope.permissions & found.permissions)

    async def _by_membership(self, scope: Scope) -> Scope:
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            role = await connection.fetchval(_ROLE, scope.workspace_id, scope.user_id)
        if role is None:
            raise Unauthenticated
        return replace(scope, role=Role(role), permissions=scope.permissions & permissions_of(Role(role)))
