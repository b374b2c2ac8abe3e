"""Known devices: a proof that someone has signed in from here before, kept in a cookie.

Its holder has a counter of failed sign-ins of their own, so that a stranger who guesses from the same address cannot
keep them out. It opens nothing by itself, and ends with the password that it was made under.
"""

import hashlib
import hmac
import struct
from datetime import datetime, timedelta
from uuid import UUID

from parley.core import base64url, clock
from parley.core.secrets import KeyRing

LIFE = timedelta(days=365)

# The key's name, the user, seconds since 1970.
_HEADER = struct.Struct(">4s16sQ")
_MAC_BYTES = 20
_LENGTH = (_HEADER.size + _MAC_BYTES) // 3 * 4


class Devices:
    """Makes and verifies proofs."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def make(self, user_id: UUID) -> str:
        """Return a proof for the device that has just signed in."""
        key = self._keys.active
        header = _HEADER.pack(bytes.fromhex(key.kid), user_id.bytes, int(clock.timestamp()))
        return base64url.encode(header + _mac(key.value, header))

    def is_known(self, proof: str | None, user_id: UUID, *, password_since: datetime) -> bool:
        """Whether a proof is this user's, and newer than the password."""
        if not proof or len(proof) != _LENGTH or not proof.isascii():
            return False
        try:
            raw = base64url.decode(proof)
        except ValueError:
            return False
        header = raw[: _HEADER.size]
        kid, user, made = _HEADER.unpack(header)
        key = self._keys.find(kid.hex())
        if key is None or not hmac.compare_digest(_mac(key.value, header), raw[_HEADER.size :]):
            return False
        since = int(password_since.timestamp())
        return UUID(bytes=user) == user_id and since <= made and clock.timestamp() < made + LIFE.total_seconds()


def _mac(key: bytes, header: bytes) -> bytes:
    return hmac.new(key, header, hashlib.sha256).digest()[:_MAC_BYTES]
