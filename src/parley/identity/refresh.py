"""Refresh tokens: nothing of them is stored.

`parley_rt_` and base64url of version, key's name, session, counter and an HMAC-SHA256 over the session's salt and all
of these. Only the holder of the key can make one, so a copy of the database is not enough to forge one, and the
successor of a token can be made again for a client that never received it.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass
from uuid import UUID

from parley.core import base64url
from parley.core.secrets import KeyRing
from parley.identity.errors import RefreshInvalid

_PREFIX = "parley_rt_"
_VERSION = 1
# Version, kid (the eight hex digits of a key's name), session, counter.
_HEADER = struct.Struct(">B4s16sI")
_MAC_BYTES = 32
_LENGTH = len(_PREFIX) + (_HEADER.size + _MAC_BYTES) // 3 * 4


@dataclass(frozen=True, slots=True)
class PresentedRefreshToken:
    """A token that was parsed. It proves nothing before `RefreshTokens.verify`."""

    kid: str
    session_id: UUID
    counter: int
    header: bytes
    mac: bytes


class RefreshTokens:
    """Makes and verifies refresh tokens. The first key of the ring makes them, all of them verify."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def make(self, session_id: UUID, counter: int, *, salt: bytes) -> str:
        """Return the token of a session at a counter: always the same one while the key stays."""
        key = self._keys.active
        header = _HEADER.pack(_VERSION, bytes.fromhex(key.kid), session_id.bytes, counter)
        return _PREFIX + base64url.encode(header + _mac(key.value, salt, header))

    def parse(self, token: str) -> PresentedRefreshToken:
        """Take a token apart. Raises `RefreshInvalid`."""
        if len(token) != _LENGTH or not token.startswith(_PREFIX):
            raise RefreshInvalid
        try:
            raw = base64url.decode(token.removeprefix(_PREFIX))
        except ValueError:
            raise RefreshInvalid from None
        if len(raw) != _HEADER.size + _MAC_BYTES:
            raise RefreshInvalid
        header = raw[: _HEADER.size]
        version, kid, session, counter = _HEADER.unpack(header)
        if version != _VERSION:
            raise RefreshInvalid
        return PresentedRefreshToken(kid.hex(), UUID(bytes=session), counter, header, raw[_HEADER.size :])

    def verify(self, presented: PresentedRefreshToken, *, salt: bytes) -> None:
        """Check the MAC, in constant time. Raises `RefreshInvalid`."""
        key = self._keys.find(presented.kid)
        if key is None or not hmac.compare_digest(_mac(key.value, salt, presented.header), presented.mac):
            raise RefreshInvalid


def _mac(key: bytes, salt: bytes, header: bytes) -> bytes:
    return hmac.new(key, salt + header, hashlib.sha256).digest()
