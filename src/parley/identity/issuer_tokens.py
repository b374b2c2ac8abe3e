"""Tokens of other issuers. The only file that verifies with PyJWT.

The unverified `iss` chooses the entry, and that is all that is believed of a token before its signature. Algorithm, key
source, audience and parties come from the entry; the header's `jku`, `jwk`, `x5u` and `x5c` are never read.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
import orjson

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import Unauthenticated
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Credential, Scope
from parley.identity.errors import TokenExpired, TokenInvalid
from parley.identity.external_users import ExternalStanding, UnscopedExternalUsers
from parley.identity.issuers import Algorithm, Issuer
from parley.identity.jwks import Jwks
from parley.identity.standings import Standings
from parley.tenancy.permissions import permissions_of

logger = logging.getLogger(__name__)

_MAX_LENGTH = 8192
_LEEWAY_S = 30
_SUBJECT_LENGTH = 255
_LAST_MOMENT = 2**33
"""Seconds since 1970; what is beyond is no time."""
_HOLDS_S = 15 * 60
_TICKET_S = 60
"""How long a connection goes on before its subject is looked at again."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A verified token and who it is here. Times are in seconds since 1970."""

    scope: Scope
    expires_at: float


class IssuerTokens:
    """Verifies tokens of the configured issuers; users are made on first sight where an entry allows it."""

    def __init__(
        self,
        database: Database,
        issuers: tuple[Issuer, ...],
        http: httpx.AsyncClient,
        *,
        cache_s: float,
        revocations: Revocations,
        workspaces_per_month: int | None = None,
    ) -> None:
        self._by_issuer = {entry.issuer: entry for entry in issuers}
        self._keys = {entry.name: Jwks(entry, http) for entry in issuers if entry.jwks_url is not None}
        self._users = UnscopedExternalUsers(database, workspaces_per_month=workspaces_per_month)
        # By digest, so that the memory of the process does not hold usable tokens.
        self._known: Standings[bytes, _Known] = Standings(lambda: revocations.cache_s(cache_s))
        revocations.subscribe(self.forget, reset=self._known.forget_all)

    def takes(self, token: str) -> bool:
        """Whether a token names an issuer of ours, or none where an entry is for those."""
        return bool(self._by_issuer) and self._entry(token) is not None

    def holds(self, scope: Scope) -> bool:
        """Whether a scope came from another issuer's token."""
        return scope.issuer is not None

    async def authenticate(self, token: str) -> Credential:
        """Verify a token and its subject. Raises `TokenInvalid`, `TokenExpired`, `UserUnknown`, `NoWorkspace`."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._known.find(digest)
        if known is None:
            known = await self._known.load(digest, lambda: self._verify(token))
        if clock.timestamp() >= known.expires_at + _LEEWAY_S:
            raise TokenExpired
        return Credential(known.scope, known.expires_at)

    async def reauthenticate(self, scope: Scope) -> Credential:
        """Check that the subject of a scope still has its place. Raises `TokenInvalid`."""
        if scope.issuer is None:
            raise Unauthenticated
        standing = await self._users.find(scope.issuer, scope.subject, scope.workspace_id)
        if standing is None or standing.user_id != scope.user_id:
            raise TokenInvalid
        # A ticket does not say when its token was made; it is itself younger than this.
        issued_at = scope.issued_at if scope.issued_at is not None else clock.timestamp() - _TICKET_S
        if standing.tokens_valid_after is not None and issued_at < standing.tokens_valid_after.timestamp():
            raise TokenInvalid
        return Credential(_scope(scope.issuer, scope.subject, standing, issued_at), clock.timestamp() + _HOLDS_S)

    def forget(self, revocation: Revocation) -> None:
        """Look up again what rests on what was revoked."""
        if revocation.kind not in {"session", "switch", "key"}:
            self._known.forget_where(lambda known: revocation.concerns(known.scope))

    async def close(self) -> None:
        """Wait for the look-ups under way."""
        await self._known.close()

    async def _verify(self, token: str) -> _Known:
        entry = self._entry(token)
        if entry is None:
            raise TokenInvalid
        claims = await self._claims(entry, token)
        subject, issued_at, expires_at = claims["sub"], float(claims["iat"]), float(claims["exp"])
        standing = await self._users.stand(entry, subject, claims)
        after = standing.tokens_valid_after
        if after is not None and issued_at < after.timestamp():
            raise TokenInvalid
        return _Known(_scope(entry.name, subject, standing, issued_at), expires_at)

    def _entry(self, token: str) -> Issuer | None:
        """Return the entry that a token's unverified `iss` names."""
        if len(token) > _MAX_LENGTH or not token.isascii() or token.count(".") != 2:
            return None
        try:
            payload = token.split(".")[1]
            claims = orjson.loads(jwt.utils.base64url_decode(payload))
        except (ValueError, TypeError):
            return None
        if not isinstance(claims, dict):
            return None
        issuer = claims.get("iss")
        return self._by_issuer.get(issuer) if isinstance(issuer, str | None) else None

    async def _claims(self, entry: Issuer, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            if "crit" in header or header.get("alg") != entry.algorithm.value:
                raise TokenInvalid
            key = await self._key(entry, header.get("kid"))
            if key is None:
                raise TokenInvalid
            claims = jwt.decode(
                token,
                key,
                algorithms=[entry.algorithm.value],
                audience=entry.audience,
                issuer=entry.issuer,
                # Times are checked below, against a clock that tests can move.
                options={
                    "require": [
                        "exp",
                        "iat",
                        "sub",
                        *(["iss"] if entry.issuer else []),
                        *(["aud"] if entry.audience else []),
                    ],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "verify_aud": entry.audience is not None,
                },
            )
        except TokenInvalid:
            raise
        except Exception:  # noqa: BLE001 - PyJWT raises TypeError and others too; whatever it is, the token does not hold
            raise TokenInvalid from None
        self._check(entry, claims)
        return claims

    async def _key(self, entry: Issuer, kid: object) -> Any | None:
        if entry.algorithm is Algorithm.HS256:
            return entry.secret.get_secret_value() if entry.secret is not None else None
        return await self._keys[entry.name].find(kid if isinstance(kid, str) else None)

    @staticmethod
    def _check(entry: Issuer, claims: dict[str, Any]) -> None:
        now = clock.timestamp()
        subject, issued_at, expires_at = claims.get("sub"), claims.get("iat"), claims.get("exp")
        not_before = claims.get("nbf", issued_at)
        # JSON knows numbers that no clock shows, and Python's reader some that JSON does not: infinity, NaN.
        for time in (issued_at, expires_at, not_before):
            if not isinstance(time, int | float) or isinstance(time, bool) or not 0 <= time < _LAST_MOMENT:
                raise TokenInvalid
        if not isinstance(subject, str) or not 0 < len(subject) <= _SUBJECT_LENGTH or not subject.isprintable():
            raise TokenInvalid
        if max(float(issued_at), float(not_before)) > now + _LEEWAY_S:  # type: ignore[arg-type]  # checked above
            raise TokenInvalid
        # The party that a token was made for; Clerk's has one, and one without is another kind of token.
        if entry.azp is not None and claims.get("azp") not in entry.azp:
            raise TokenInvalid
        # Clerk: somebody who has not finished signing in.
        if claims.get("sts", "active") != "active":
            raise TokenInvalid
        if now >= float(expires_at) + _LEEWAY_S:  # type: ignore[arg-type]  # checked above
            raise TokenExpired


def _scope(issuer: str, subject: str, standing: ExternalStanding, issued_at: float) -> Scope:
    return Scope(
        standing.workspace_id,
        standing.user_id,
        standing.role,
        subject=subject,
        permissions=permissions_of(standing.role),
        issuer=issuer,
        issued_at=issued_at,
    )
