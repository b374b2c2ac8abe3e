"""A bucket of an S3-compatible store: put, get and delete objects, nothing more.

Addressed by path (`endpoint/bucket/key`), which every such store understands. Bodies are signed with their hash.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final
from urllib.parse import quote, urlsplit

import httpx

from parley.core import clock
from parley.core.errors import Unavailable
from parley.core.http import chunk_reader
from parley.core.settings import AttachmentSettings
from parley.core.signatures import EMPTY_SHA256, Signer

logger = logging.getLogger(__name__)

_ATTEMPTS: Final = 3
_DELAY_S: Final = 0.2
_BUSY: Final = frozenset({429, 500, 502, 503, 504})


class StoreUnavailable(Unavailable):
    """The store outside the database does not answer, or refuses."""

    message = "The store for files is not available right now."


class ObjectMissing(Exception):
    """There is no such object."""


class Bucket:
    """One bucket. Keys are of plain characters: ids and slashes."""

    def __init__(self, http: httpx.AsyncClient, settings: AttachmentSettings) -> None:
        if settings.s3_secret_key is None:
            raise ValueError("no key for the bucket")
        self._http = http
        self._endpoint = settings.s3_endpoint.rstrip("/")
        self._host = urlsplit(self._endpoint).netloc
        self._root = quote(f"/{settings.s3_bucket}/{settings.s3_prefix}", safe="/-_.~")
        self._signer = Signer(settings.s3_access_key, settings.s3_secret_key.get_secret_value(), settings.s3_region)

    async def put(
        self, key: str, pieces: Callable[[], Iterable[bytes]], *, size: int, sha256: str, media_type: str
    ) -> None:
        """Store an object, in the place of one with the same key. `pieces` is called once for each attempt.

        Raises `StoreUnavailable`.
        """

        async def body() -> AsyncIterator[bytes]:
            for piece in pieces():
                yield piece

        def request() -> httpx.Request:
            headers = {"content-length": str(size), "content-type": media_type}
            return self._request("PUT", key, sha256=sha256, headers=headers, content=body())

        async with await self._send(request) as response:
            await response.aread()

    async def get(self, key: str) -> AsyncIterator[bytes]:
        """Yield an object's bytes as they come. Raises `ObjectMissing` and `StoreUnavailable`, before the first."""
        async with await self._send(lambda: self._request("GET", key)) as response:
            read = chunk_reader(response)
            try:
                while piece := await read():
                    yield piece
            except httpx.HTTPError as error:
                raise StoreUnavailable from error

    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is removed already. Raises `StoreUnavailable`."""
        try:
            async with await self._send(lambda: self._request("DELETE", key)) as response:
                await response.aread()
        except ObjectMissing:
            pass

    def _request(
        self,
        method: str,
        key: str,
        *,
        sha256: str = EMPTY_SHA256,
        headers: dict[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
    ) -> httpx.Request:
        path = self._root + quote(key, safe="/-_.~")
        signed = self._signer.headers(method, path, host=self._host, sha256=sha256, now=clock.now())
        plain = {"accept-encoding": "identity", **(headers or {})}
        return self._http.build_request(method, self._endpoint + path, headers={**plain, **signed}, content=content)

    async def _send(self, request: Callable[[], httpx.Request]) -> "_Answer":
        """Send until the store has answered, a few times; return a good answer, still unread."""
        for attempt in range(1, _ATTEMPTS + 1):
            cause: Exception | None = None
            try:
                response = await self._http.send(request(), stream=True)
                if response.is_success:
                    return _Answer(response)
                await response.aclose()
                if response.status_code == 404:
                    raise ObjectMissing
                if response.status_code not in _BUSY:
                    # The store's own text may repeat what was signed.
                    logger.error("the store refused a request", extra={"status": response.status_code})
                    raise StoreUnavailable
            except httpx.HTTPError as error:
                cause = error
            if attempt < _ATTEMPTS:
                await asyncio.sleep(_DELAY_S * attempt)
        logger.warning("the store does not answer", extra={"cause": type(cause).__name__ if cause else "busy"})
        raise StoreUnavailable from cause


def open_bucket(http: httpx.AsyncClient, settings: AttachmentSettings) -> Bucket | None:
    """Return the bucket that is configured, or None."""
    return Bucket(http, settings) if settings.has_s3 else None


class _Answer:
    """A response that is closed when it is left."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def __aenter__(self) -> httpx.Response:
        return self._response

    async def __aexit__(self, *_: object) -> None:
        await self._response.aclose()
