"""From a bearer token to a scope, for every request: the token, then its session and membership."""

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy.exc import TimeoutError as PoolTimeout

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import Unauthenticated, Unavailable
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Credential, Role, Scope
from parley.identity.errors import SessionExpired, SessionRevoked, TokenExpired, TokenInvalid
from parley.identity.session_repository import UnscopedSessionRepository
from parley.identity.standings import Recent, Standings
from parley.identity.tokens import AccessClaims, AccessTokens
from parley.tenancy.permissions import permissions_of

# With what a session is remembered for, its last use is known to the minute.
_NOTED_EVERY = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class _Standing:
    """A session that holds: its scope, and when it ends."""

    scope: Scope
    ends_at: float

    def is_for(self, user_id: UUID, workspace_id: UUID) -> bool:
        return self.scope.user_id == user_id and self.scope.workspace_id == workspace_id


class SessionAuthenticator:
    """Verifies tokens against their sessions. A session is looked up at most once in `cache_s` seconds.

    A revocation counts as soon as it is heard of; `cache_s` is the longest that it takes without.
    """

    def __init__(
        self, database: Database, tokens: AccessTokens, *, cache_s: float, revocations: Revocations | None = None
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._revocations = revocations or Revocations()
        # By digest, so that the memory of the process does not hold usable tokens. Keys are fixed for its life.
        self._verified: Recent[bytes, AccessClaims] = Recent()
        self._standings: Standings[UUID, _Standing] = Standings(lambda: self._revocations.cache_s(cache_s))
        self._revocations.subscribe(self.forget, reset=self._standings.forget_all)

    def takes(self, token: str) -> bool:
        """Whether a bearer token may be one of ours: whatever no other kind took."""
        return bool(token)

    def holds(self, scope: Scope) -> bool:
        """Whether a scope came from a session."""
        return scope.session_id is not None

    async def authenticate(self, token: str) -> Credential:
        """Verify a bearer token, its session and its membership. Raises `Unauthenticated`, `Unavailable`."""
        if not token:
            raise Unauthenticated
        claims = self._claims(token)
        standing = await self._standing(claims.session_id, claims.user_id, claims.workspace_id)
        return Credential(standing.scope, min(claims.expires_at, standing.ends_at))

    async def reauthenticate(self, scope: Scope) -> Credential:
        """Check that a scope that was verified before still holds; it holds for an access token's life from now."""
        if scope.session_id is None:
            raise Unauthenticated
        standing = await self._standing(scope.session_id, scope.user_id, scope.workspace_id)
        life = self._tokens.life.total_seconds()
        return Credential(standing.scope, min(clock.timestamp() + life, standing.ends_at))

    def forget(self, revocation: Revocation) -> None:
        """Look up again what rests on what was revoked. Look-ups that are under way are not remembered."""
        if revocation.kind in {"session", "switch"}:
            self._standings.forget(revocation.id)
        elif revocation.kind != "key":
            self._standings.forget_where(lambda known: revocation.concerns(known.scope))

    async def close(self) -> None:
        """Wait for the look-ups under way."""
        await self._standings.close()

    def _claims(self, token: str) -> AccessClaims:
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        claims = self._verified.get(digest)
        if claims is None:
            claims = self._tokens.verify(token)
            self._verified.remember(digest, claims)
        elif clock.timestamp() >= claims.expires_at:
            del self._verified[digest]
            raise TokenExpired
        return claims

    async def _standing(self, session_id: UUID, user_id: UUID, workspace_id: UUID) -> _Standing:
        standing = self._standings.find(session_id)
        if standing is not None and clock.timestamp() >= standing.ends_at:
            raise SessionExpired
        if standing is None or not standing.is_for(user_id, workspace_id):
            # One that was remembered may have moved to another workspace since, in another process.
            standing = await self._standings.load(session_id, lambda: self._query(session_id))
            if not standing.is_for(user_id, workspace_id):
                raise TokenInvalid
        return standing

    async def _query(self, session_id: UUID) -> _Standing:
        now = clock.timestamp()
        try:
            async with self._database.system_unit_of_work() as unit:
                repository = UnscopedSessionRepository(unit)
                row = await repository.find_standing(session_id)
                if row is not None and clock.now() - row["last_used_at"] > _NOTED_EVERY:
                    await repository.touch(session_id, now=clock.now())
        except PoolTimeout as error:
            raise Unavailable("The database is not available.", retry_after_s=2) from error
        if row is None or row["revoked_at"] is not None or row["disabled_at"] is not None or row["role"] is None:
            raise SessionRevoked
        ends_at = min(row["idle_expires_at"], row["absolute_expires_at"]).timestamp()
        if now >= ends_at:
            raise SessionExpired
        user_id: UUID = row["user_id"]
        role = Role(row["role"])
        scope = Scope(
            row["workspace_id"],
            user_id,
            role,
            session_id,
            subject=str(user_id),
            permissions=permissions_of(role),
        )
        return _Standing(scope, ends_at)
