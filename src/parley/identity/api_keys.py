"""API keys: credentials of machines, with some of their maker's rights.

`parley_sk_` and base64url of version, key's id, workspace, 26 random bytes and a CRC-32 over all of it: a typo is
refused without a query, and a scanner can tell a key from other text. Stored is the name of one of our secrets' keys
and an HMAC-SHA256 under it, so that a copy of the database is not enough to try keys.
"""

import hashlib
import hmac
import secrets
import struct
import zlib
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from parley.core import base64url, clock
from parley.core.db import Database, UnitOfWork
from parley.core.errors import Unauthenticated
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Credential, Role, Scope
from parley.core.secrets import KeyRing
from parley.identity.api_key_repository import ApiKeyRepository, UnscopedApiKeyRepository
from parley.identity.api_key_schemas import ApiKeyCreate, ApiKeyCreated, ApiKeyRead
from parley.identity.errors import ApiKeyExpired, ApiKeyInvalid
from parley.identity.models import ApiKey
from parley.identity.standings import Standings
from parley.tenancy.audit import Action, record
from parley.tenancy.permissions import KEY_SCOPES, permissions_of

PREFIX: Final = "parley_sk_"

_VERSION = 1
# Version, key's id, workspace. The id first: what is shown of a key tells it from others.
_HEADER = struct.Struct(">B16s16s")
_RANDOM_BYTES = 26
_CHECK_BYTES = 4
_BYTES = _HEADER.size + _RANDOM_BYTES + _CHECK_BYTES
_LENGTH = len(PREFIX) + _BYTES // 3 * 4
_SHOWN = len(PREFIX) + 12
_KID_BYTES = 4

_NOTED_EVERY = timedelta(minutes=1)
_HOLDS_S = 24 * 3600
"""How long a connection of a key that does not expire goes on before the key is looked at again."""


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A key that was parsed. It proves nothing before its hash was compared."""

    id: UUID
    workspace_id: UUID
    text: str


class KeyFormat:
    """Makes, reads and hashes keys. The first secret of the ring hashes, all of them verify."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    @staticmethod
    def make(id: UUID, workspace_id: UUID) -> PresentedKey:
        """Return a new key."""
        raw = _HEADER.pack(_VERSION, id.bytes, workspace_id.bytes) + secrets.token_bytes(_RANDOM_BYTES)
        text = PREFIX + base64url.encode(raw + _check(raw))
        return PresentedKey(id, workspace_id, text)

    @staticmethod
    def parse(text: str) -> PresentedKey:
        """Take a key apart. Raises `ApiKeyInvalid` for all that was never a key."""
        if len(text) != _LENGTH or not text.startswith(PREFIX):
            raise ApiKeyInvalid
        try:
            raw = base64url.decode(text.removeprefix(PREFIX))
        except ValueError:
            raise ApiKeyInvalid from None
        body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if len(raw) != _BYTES or check != _check(body):
            raise ApiKeyInvalid
        version, id_, workspace = _HEADER.unpack(body[: _HEADER.size])
        if version != _VERSION:
            raise ApiKeyInvalid
        return PresentedKey(UUID(bytes=id_), UUID(bytes=workspace), text)

    def hash(self, key: PresentedKey) -> bytes:
        """Return what is stored of a key: the secret's name and the MAC."""
        active = self._keys.active
        return bytes.fromhex(active.kid) + _mac(active.value, key)

    def matches(self, key: PresentedKey, stored: bytes) -> bool:
        """Whether a key is the one that was stored; in constant time."""
        secret = self._keys.find(stored[:_KID_BYTES].hex())
        return secret is not None and hmac.compare_digest(_mac(secret.value, key), stored[_KID_BYTES:])


def _check(raw: bytes) -> bytes:
    return zlib.crc32(PREFIX.encode() + raw).to_bytes(_CHECK_BYTES)


def _mac(secret: bytes, key: PresentedKey) -> bytes:
    return hmac.new(secret, key.text.encode(), hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class _Standing:
    """A key as it was looked up. `ends_at` is in seconds since 1970."""

    scope: Scope
    hash: bytes
    last_used_at: datetime | None
    ends_at: float | None


class ApiKeys:
    """Verifies API keys. A key is looked up at most once in `cache_s` seconds.

    `forget` makes a revocation count at once; without it a change counts after `cache_s` at the latest.
    """

    def __init__(
        self, database: Database, keys: KeyRing, *, cache_s: float, revocations: Revocations | None = None
    ) -> None:
        self._database = database
        self._revocations = revocations or Revocations()
        self.format = KeyFormat(keys)
        self._standings: Standings[UUID, _Standing] = Standings(lambda: self._revocations.cache_s(cache_s))
        self._revocations.subscribe(self.forget, reset=self._standings.forget_all)

    def takes(self, token: str) -> bool:
        """Whether a bearer token looks like an API key."""
        return token.startswith(PREFIX)

    def holds(self, scope: Scope) -> bool:
        """Whether a scope came from an API key."""
        return scope.key_id is not None

    async def authenticate(self, token: str) -> Credential:
        """Verify a key and its maker's membership. Raises `ApiKeyInvalid`, `ApiKeyExpired`, `Unavailable`."""
        key = self.format.parse(token)
        standing = await self._standing(key.id, key.workspace_id)
        if not self.format.matches(key, standing.hash):
            raise ApiKeyInvalid
        credential = _credential(standing)
        await self._note_use(key, standing)
        return credential

    async def reauthenticate(self, scope: Scope) -> Credential:
        """Check that a key that was verified before still holds. Raises as `authenticate` does."""
        if scope.key_id is None:
            raise Unauthenticated
        standing = await self._standing(scope.key_id, scope.workspace_id)
        if standing.scope.user_id != scope.user_id:
            raise ApiKeyInvalid
        return _credential(standing)

    def forget(self, revocation: Revocation) -> None:
        """Look up again what rests on what was revoked. Look-ups that are under way are not remembered."""
        if revocation.kind not in {"session", "switch"}:
            self._standings.forget_where(lambda known: revocation.concerns(known.scope))

    async def close(self) -> None:
        """Wait for the look-ups under way."""
        await self._standings.close()

    async def _standing(self, id: UUID, workspace_id: UUID) -> _Standing:
        standing = self._standings.find(id)
        if standing is None:
            standing = await self._standings.load(id, lambda: self._query(id, workspace_id))
        if standing.scope.workspace_id != workspace_id:
            raise ApiKeyInvalid
        return standing

    async def _query(self, id: UUID, workspace_id: UUID) -> _Standing:
        async with self._database.system_unit_of_work() as unit:
            row = await UnscopedApiKeyRepository(unit).find_standing(workspace_id, id)
        if row is None or row["revoked_at"] is not None or row["disabled_at"] is not None:
            raise ApiKeyInvalid
        user_id: UUID = row["user_id"]
        role = Role(row["role"])
        scope = Scope(
            workspace_id,
            user_id,
            role,
            subject=str(user_id),
            # What the maker may now, of what a key may at all, of what this one was given.
            permissions=permissions_of(role) & KEY_SCOPES & frozenset(row["scopes"]),
            key_id=id,
        )
        ends_at = row["expires_at"].timestamp() if row["expires_at"] else None
        return _Standing(scope, row["hash"], row["last_used_at"], ends_at)

    async def _note_use(self, key: PresentedKey, standing: _Standing) -> None:
        now = clock.now()
        if standing.last_used_at is not None and standing.last_used_at > now - _NOTED_EVERY:
            return
        # Before the write, so that of many requests at once one writes.
        self._standings.replace(key.id, standing, replace(standing, last_used_at=now))
        async with self._database.system_unit_of_work() as unit:
            # The hash again: keys in use outlive the secret that they were first hashed under.
            await UnscopedApiKeyRepository(unit).touch(
                key.workspace_id, key.id, hash=self.format.hash(key), now=now, unless_since=now - _NOTED_EVERY
            )


def _credential(standing: _Standing) -> Credential:
    now = clock.timestamp()
    if standing.ends_at is not None and now >= standing.ends_at:
        raise ApiKeyExpired
    return Credential(standing.scope, min(standing.ends_at or now + _HOLDS_S, now + _HOLDS_S))


class ApiKeyService:
    """Makes, lists and revokes the caller's keys, inside one unit of work."""

    def __init__(self, unit: UnitOfWork, scope: Scope, key_format: KeyFormat, revocations: Revocations) -> None:
        self._unit = unit
        self._scope = scope
        self._format = key_format
        self._revocations = revocations
        self._repository = ApiKeyRepository(unit, scope)

    async def list(self, page: PageRequest) -> tuple[list[ApiKeyRead], int]:
        """Return one page, newest first, and how many there are in all. Revoked ones are gone."""
        rows, total = await self._repository.list(page)
        return [ApiKeyRead.model_validate(dict(row)) for row in rows], total

    async def create(self, wanted: ApiKeyCreate) -> ApiKeyCreated:
        """Make a key. The answer is the only place where it can be read."""
        scope = self._scope
        id_ = new_id()
        key = self._format.make(id_, scope.workspace_id)
        scopes = sorted({scope_.value for scope_ in (wanted.scopes if wanted.scopes is not None else KEY_SCOPES)})
        row = await self._repository.add(
            ApiKey(
                workspace_id=scope.workspace_id,
                id=id_,
                user_id=scope.user_id,
                name=wanted.name,
                prefix=key.text[:_SHOWN],
                last_four=key.text[-4:],
                hash=self._format.hash(key),
                scopes=scopes,
                expires_at=wanted.expires_at,
            )
        )
        details = {"prefix": row.prefix, "scopes": scopes, "expires_at": wanted.expires_at}
        await record(self._unit, Action.API_KEY_CREATED, scope=scope, target=str(id_), details=details)
        return ApiKeyCreated(**ApiKeyRead.model_validate(row).model_dump(), key=key.text)

    async def revoke(self, id: UUID) -> None:
        """End a key, at once and everywhere. Raises `ApiKeyNotFound`."""
        await self._repository.revoke(id, now=clock.now())
        await record(self._unit, Action.API_KEY_REVOKED, scope=self._scope, target=str(id))
        await self._revocations.announce(self._unit, Revocation("key", id))
