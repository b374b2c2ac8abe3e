"""Fetches the images that a request names by their address, where the operator allows it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import httpx

from parley.core.http import chunk_reader
from parley.dialect.errors import RequestInvalid

MAX_BYTES: Final = 10 * 1024 * 1024
MAX_FETCHED: Final = 10
TOTAL_S: Final = 15.0


class Images:
    """Fetches by a guarded client, whose bounds are `MAX_BYTES` and `TOTAL_S`; None refuses every address."""

    def __init__(self, http: httpx.AsyncClient | None) -> None:
        self._http = http

    async def fetch(self, urls: Mapping[str, str]) -> dict[str, bytes]:
        """Return the content of each address, given with the field that names it first. Raises `RequestInvalid`.

        Why one could not be had is not told: it would say what there is behind an address.
        """
        first = next(iter(urls.values()), None)
        if self._http is None and urls:
            raise RequestInvalid("Images are taken as data: URLs; this server does not fetch addresses.", param=first)
        if len(urls) > MAX_FETCHED:
            raise RequestInvalid(f"More than {MAX_FETCHED} images are to be fetched.", param="messages")
        found = await asyncio.gather(*(self._fetch_one(url) for url in urls))
        return self._all_or_none(urls, found)

    @staticmethod
    def _all_or_none(urls: Mapping[str, str], found: Sequence[bytes | None]) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        for (url, param), content in zip(urls.items(), found, strict=True):
            if content is None:
                raise RequestInvalid("The image could not be fetched.", param=param)
            contents[url] = content
        return contents

    async def _fetch_one(self, url: str) -> bytes | None:
        assert self._http is not None
        try:
            async with self._http.stream("GET", url, headers={"accept": "image/*"}) as response:
                if response.status_code != 200:
                    return None
                read = chunk_reader(response)
                content = bytearray()
                while chunk := await read():
                    content += chunk
        except (httpx.HTTPError, httpx.InvalidURL):
            return None
        return bytes(content)
