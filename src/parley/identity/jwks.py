"""The public keys of an issuer, fetched from its JWKS and kept.

At most one fetch in five minutes for a key that is not known, however many tokens name one. An issuer that cannot be
reached does not end what its keys vouch for: they are kept for a day.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final

import httpx
import jwt
import orjson

from parley.core import clock
from parley.identity.issuers import Algorithm, Issuer

logger = logging.getLogger(__name__)

TTL_S: Final = 3600
UNKNOWN_KEY_S: Final = 300
STALE_S: Final = 24 * 3600
_TIMEOUT_S = 5.0
_MAX_BYTES = 64 * 1024
_MAX_KEYS = 50

# What a key must say of itself to be one of the algorithm.
_KINDS: dict[Algorithm, dict[str, str]] = {
    Algorithm.RS256: {"kty": "RSA"},
    Algorithm.ES256: {"kty": "EC", "crv": "P-256"},
    Algorithm.EDDSA: {"kty": "OKP", "crv": "Ed25519"},
}


class KeysUnavailable(Exception):
    """The issuer's keys cannot be had. Its text is safe to log."""


class Jwks:
    """The keys of one issuer."""

    def __init__(self, issuer: Issuer, http: httpx.AsyncClient) -> None:
        assert issuer.jwks_url is not None
        self._url = issuer.jwks_url
        self._name = issuer.name
        self._algorithm = issuer.algorithm
        self._http = http
        self._keys: dict[str | None, Any] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None) -> Any | None:
        """Return the key of a name, or None. A token without a name gets the key if there is one only."""
        now = clock.timestamp()
        if now - self._fetched_at >= TTL_S:
            await self._refresh(unless_tried_within=30)
        elif self._pick(kid) is None:
            await self._refresh(unless_tried_within=UNKNOWN_KEY_S)
        if clock.timestamp() - self._fetched_at >= STALE_S:
            return None
        return self._pick(kid)

    def _pick(self, kid: str | None) -> Any | None:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    async def _refresh(self, *, unless_tried_within: float) -> None:
        """Fetch the keys, once for all who wait."""
        async with self._lock:
            if 0 <= clock.timestamp() - self._tried_at < unless_tried_within:
                return
            self._tried_at = clock.timestamp()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    keys = self._read(await self._fetch())
            except (KeysUnavailable, httpx.HTTPError, OSError, TimeoutError) as error:
                logger.warning(
                    "the keys of an issuer cannot be fetched",
                    extra={"issuer": self._name, "cause": str(error) or type(error).__name__},
                )
                return
            self._keys, self._fetched_at = keys, clock.timestamp()

    async def _fetch(self) -> bytes:
        # Not compressed: what is counted is then what is held.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        async with self._http.stream("GET", self._url, headers=headers) as answer:
            if answer.status_code != 200:
                raise KeysUnavailable(f"status {answer.status_code}")
            body = b""
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > _MAX_BYTES:
                    raise KeysUnavailable("the answer is too large")
            return body

    def _read(self, body: bytes) -> dict[str | None, Any]:
        try:
            entries = orjson.loads(body)["keys"]
            fitting = [entry for entry in entries[:_MAX_KEYS] if self._fits(entry)]
        except (KeyError, TypeError, ValueError):
            raise KeysUnavailable("the answer holds no keys") from None
        found = {}
        for entry in fitting:
            # One that cannot be read must not take the others with it.
            with suppress(ValueError, TypeError, KeyError, AttributeError, jwt.PyJWTError):
                found[entry.get("kid")] = self._key(entry)
        if not found:
            raise KeysUnavailable(f"no key is one for {self._algorithm}")
        return found

    def _fits(self, entry: Any) -> bool:
        kind = _KINDS[self._algorithm]
        return (
            isinstance(entry, dict)
            and all(entry.get(name) == value for name, value in kind.items())
            and entry.get("use", "sig") == "sig"
            and entry.get("alg", self._algorithm.value) == self._algorithm.value
            and isinstance(entry.get("kid"), str | None)
        )

    def _key(self, entry: dict[str, Any]) -> Any:
        return jwt.PyJWK(entry, algorithm=self._algorithm.value).key
