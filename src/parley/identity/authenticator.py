"""From a bearer token to a scope, for every request: the token, then its session and membership."""

import asyncio
import hashlib
from collections import OrderedDict
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
from parley.identity.tokens import AccessClaims, AccessTokens
from parley.tenancy.permissions import permissions_of

_BOUND = 10_000
# With what a session is remembered for, its last use is known to the minute.
_NOTED_EVERY = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class _Standing:
    """A session that holds: its scope, when it ends, and when it was looked up."""

    scope: Scope
    ends_at: float
    seen_at: float

    def is_for(self, user_id: UUID, workspace_id: UUID) -> bool:
        return self.scope.user_id == user_id and self.scope.workspace_id == workspace_id


class _Recent[K, V](OrderedDict[K, V]):
    """A bounded memory: the entry that was stored longest ago goes first."""

    def remember(self, key: K, value: V) -> None:
        self[key] = value
        self.move_to_end(key)
        if len(self) > _BOUND:
            self.popitem(last=False)


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
        self._cache_s = cache_s
        # By digest, so that the memory of the process does not hold usable tokens. Keys are fixed for its life.
        self._verified: _Recent[bytes, AccessClaims] = _Recent()
        self._standings: _Recent[UUID, _Standing] = _Recent()
        self._loading: dict[UUID, asyncio.Task[_Standing]] = {}
        self._tasks: set[asyncio.Task[_Standing]] = set()
        self._revocations.subscribe(self.forget, reset=self.forget_all)

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
            self._standings.pop(revocation.id, None)
            self._loading.pop(revocation.id, None)
        elif revocation.kind != "key":
            # Whose session each look-up is for is not known yet.
            self._loading.clear()
            for id_ in [id_ for id_, known in self._standings.items() if revocation.concerns(known.scope)]:
                del self._standings[id_]

    def forget_all(self) -> None:
        """Look everything up again."""
        self._standings.clear()
        self._loading.clear()

    async def close(self) -> None:
        """Wait for the look-ups under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
        standing = self._fresh(session_id)
        if standing is None or not standing.is_for(user_id, workspace_id):
            # One that was remembered may have moved to another workspace since, in another process.
            standing = await self._load(session_id)
            if not standing.is_for(user_id, workspace_id):
                raise TokenInvalid
        return standing

    def _fresh(self, session_id: UUID) -> _Standing | None:
        standing = self._standings.get(session_id)
        if standing is None:
            return None
        now = clock.timestamp()
        if not 0 <= now - standing.seen_at < self._revocations.cache_s(self._cache_s):
            return None
        if now >= standing.ends_at:
            raise SessionExpired
        return standing

    async def _load(self, session_id: UUID) -> _Standing:
        """Look a session up; requests that come meanwhile wait for the same query."""
        task = self._loading.get(session_id)
        if task is None:
            task = asyncio.create_task(self._query(session_id))
            self._loading[session_id] = task
            self._tasks.add(task)
            task.add_done_callback(lambda done: self._loaded(session_id, done))
        # Shielded: one caller's disconnect must not fail the others.
        return await asyncio.shield(task)

    def _loaded(self, session_id: UUID, task: asyncio.Task[_Standing]) -> None:
        self._tasks.discard(task)
        # Forgotten meanwhile: what was read may be older than the revocation.
        current = self._loading.get(session_id) is task
        if current:
            del self._loading[session_id]
        if not task.cancelled() and task.exception() is None and current:
            self._standings.remember(session_id, task.result())

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
        return _Standing(scope, ends_at, now)
