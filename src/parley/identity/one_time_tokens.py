"""Secrets that go out by mail: good once, for a while, and only the newest of its purpose. Kept as a keyed hash."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

from parley.core import base64url, clock
from parley.core.db import UnitOfWork
from parley.core.ids import new_id
from parley.core.secrets import KeyRing
from parley.identity.errors import LinkInvalid

PREFIX = "parley_ot_"

_ID_BYTES = 16
_SECRET_BYTES = 26
_LENGTH = len(PREFIX) + (_ID_BYTES + _SECRET_BYTES) // 3 * 4
_KID_BYTES = 4

_SPEND_OLDER = "UPDATE one_time_tokens SET used_at = $3 WHERE user_id = $1 AND purpose = $2 AND used_at IS NULL"
_ADD = """
    INSERT INTO one_time_tokens (id, user_id, purpose, hash, email, expires_at) VALUES ($1, $2, $3, $4, $5, $6)
"""
_FIND = """
    SELECT user_id, hash, email FROM one_time_tokens
    WHERE id = $1 AND purpose = $2 AND used_at IS NULL AND expires_at > $3
"""
_CANCEL = """
    UPDATE one_time_tokens SET used_at = $3 WHERE user_id = $1 AND purpose = ANY($2::text[]) AND used_at IS NULL
"""
_SPEND = "UPDATE one_time_tokens SET used_at = $2 WHERE id = $1 AND used_at IS NULL RETURNING id"


class Purpose(StrEnum):
    """What a token is good for, and for nothing else."""

    VERIFY_EMAIL = "verify_email"
    CHANGE_EMAIL = "change_email"
    RESET_PASSWORD = "reset_password"  # noqa: S105 - a name


@dataclass(frozen=True, slots=True)
class Spent:
    """Whose token it was, and the address that it was sent to."""

    user_id: UUID
    email: str | None


class SecretHash:
    """Hashes secrets under our keys: the first one hashes, all of them verify."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def make(self, text: str) -> bytes:
        """Return what is stored: the key's name and the MAC."""
        active = self._keys.active
        return bytes.fromhex(active.kid) + _mac(active.value, text)

    def matches(self, text: str, stored: bytes) -> bool:
        """Whether a secret is the one that was stored; in constant time."""
        key = self._keys.find(stored[:_KID_BYTES].hex())
        return key is not None and hmac.compare_digest(_mac(key.value, text), stored[_KID_BYTES:])


def _mac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


class OneTimeTokens:
    """Makes and takes tokens, inside a unit of work of the system role."""

    def __init__(self, keys: KeyRing) -> None:
        self._hash = SecretHash(keys)

    async def mint(
        self, unit: UnitOfWork, user_id: UUID, purpose: Purpose, *, life: timedelta, email: str | None
    ) -> str:
        """Return a new token; those of the same user and purpose are good no more."""
        id_, now = new_id(), clock.now()
        text = PREFIX + base64url.encode(id_.bytes + secrets.token_bytes(_SECRET_BYTES))
        connection = await unit.driver()
        await connection.execute(_SPEND_OLDER, user_id, purpose.value, now)
        await connection.execute(_ADD, id_, user_id, purpose.value, self._hash.make(text), email, now + life)
        return text

    async def look(self, unit: UnitOfWork, token: str, purpose: Purpose) -> Spent:
        """Return whose token it is, and leave it good. Raises `LinkInvalid`."""
        connection = await unit.driver()
        row = await connection.fetchrow(_FIND, _id_of(token), purpose.value, clock.now())
        if row is None or not self._hash.matches(token, row["hash"]):
            raise LinkInvalid
        return Spent(row["user_id"], row["email"])

    async def spend(self, unit: UnitOfWork, token: str, purpose: Purpose) -> Spent:
        """Take a token, once: of two that come at the same moment one does. Raises `LinkInvalid`."""
        found = await self.look(unit, token, purpose)
        connection = await unit.driver()
        if await connection.fetchval(_SPEND, _id_of(token), clock.now()) is None:
            raise LinkInvalid
        return found

    async def cancel(self, unit: UnitOfWork, user_id: UUID, *purposes: Purpose) -> None:
        """Have a user's tokens of these purposes good no more."""
        connection = await unit.driver()
        await connection.execute(_CANCEL, user_id, [purpose.value for purpose in purposes], clock.now())


def _id_of(token: str) -> UUID:
    if len(token) != _LENGTH or not token.startswith(PREFIX):
        raise LinkInvalid
    try:
        raw = base64url.decode(token.removeprefix(PREFIX))
    except ValueError:
        raise LinkInvalid from None
    return UUID(bytes=raw[:_ID_BYTES])
