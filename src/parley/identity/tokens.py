"""Access tokens: JWTs of our own (RFC 9068), signed with HS256. The only file that uses python-jose.

python-jose checks signatures and nothing else here. Its own checks of claims accept a token without `aud`, take any
`iat`, and read a clock that tests cannot move; so the claims are checked below, each one required.
"""

import secrets
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import orjson
from jose import jwk, jws
from jose.exceptions import JOSEError

from parley.core import clock
from parley.core.secrets import DerivedKey, KeyRing
from parley.identity.errors import TokenExpired, TokenInvalid

_ALGORITHM = "HS256"
_TYPE = "at+jwt"
_MAX_LENGTH = 2048
_MIN_KEY_BYTES = 32
_LEEWAY_S = 30
"""How far ahead the clock of the process that issued a token may be."""


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token and for how many seconds it holds."""

    token: str
    expires_in: int


@dataclass(frozen=True, slots=True)
class AccessClaims:
    """What a verified token says. `expires_at` is in seconds since 1970."""

    user_id: UUID
    workspace_id: UUID
    session_id: UUID
    expires_at: float


class AccessTokens:
    """Issues and verifies access tokens. The first key of the ring signs, all of them verify."""

    def __init__(self, keys: KeyRing, *, issuer: str, audience: str, life: timedelta) -> None:
        if any(len(key.value) < _MIN_KEY_BYTES for key in keys.keys):
            raise ValueError("a signing key needs at least 32 bytes")
        self._issuer = issuer
        self._audience = audience
        self.life = life
        self._headers = _headers(keys.active)
        self._signing_key = jwk.construct(keys.active.value, _ALGORITHM)
        # Our headers hold nothing that varies but the key's name, so each key has one spelling of its header. Only
        # that spelling is looked up: `none`, another algorithm or type, jku, jwk, x5u, crit and an unknown kid all
        # miss, and nothing that a stranger wrote is ever parsed.
        self._keys = {_header_of(key): jwk.construct(key.value, _ALGORITHM) for key in keys.keys}

    def issue(self, user_id: UUID, workspace_id: UUID, session_id: UUID) -> IssuedToken:
        """Return a new token."""
        now = int(clock.timestamp())
        life = int(self.life.total_seconds())
        claims = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": str(user_id),
            "wid": str(workspace_id),
            "sid": str(session_id),
            "iat": now,
            "exp": now + life,
            "jti": secrets.token_urlsafe(12),
        }
        return IssuedToken(jws.sign(claims, self._signing_key, headers=self._headers, algorithm=_ALGORITHM), life)

    def verify(self, token: str) -> AccessClaims:
        """Return what a token says. Raises `TokenInvalid` for anything that is not a token of ours, `TokenExpired`."""
        if len(token) > _MAX_LENGTH or not token.isascii():
            raise TokenInvalid
        key = self._keys.get(token.partition(".")[0])
        if key is None:
            raise TokenInvalid
        try:
            claims = orjson.loads(jws.verify(token, key, algorithms=[_ALGORITHM]))
        except (JOSEError, ValueError):
            raise TokenInvalid from None
        return self._check(claims)

    def _check(self, claims: object) -> AccessClaims:
        now = clock.timestamp()
        match claims:
            case {
                "iss": self._issuer,
                "aud": self._audience,
                "sub": str(subject),
                "wid": str(workspace),
                "sid": str(session),
                "iat": int(issued_at),
                "exp": int(expires_at),
            } if issued_at <= now + _LEEWAY_S:
                try:
                    found = AccessClaims(UUID(subject), UUID(workspace), UUID(session), expires_at)
                except ValueError:
                    raise TokenInvalid from None
            case _:
                raise TokenInvalid
        if now >= expires_at:
            raise TokenExpired
        return found


def _headers(key: DerivedKey) -> dict[str, str]:
    return {"typ": _TYPE, "kid": key.kid}


def _header_of(key: DerivedKey) -> str:
    token = jws.sign({}, key.value, headers=_headers(key), algorithm=_ALGORITHM)
    return token.partition(".")[0]
