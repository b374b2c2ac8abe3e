"""The same server over HTTP: requests whose answer is awaited, and streams of events."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from parley.conformance.errors import Failed, Skipped, require
from parley.conformance.transcript import Frame, Transcript

_LONGEST_WAIT_S = 5.0


@dataclass(frozen=True)
class SseEvent:
    """One server-sent event; `frame` is its data."""

    id: str | None
    event: str
    frame: Frame


class EventStream:
    """A stream of events that is being read."""

    def __init__(self, response: httpx.Response, transcript: Transcript, *, name: str, patience_s: float) -> None:
        self._response = response
        self._lines = response.aiter_lines()
        self._transcript = transcript
        self._name = name
        self._patience_s = patience_s

    async def receive(self, what: str, *, within_s: float | None = None) -> SseEvent | None:
        """Return the next event, None at the end of the stream."""
        patience_s = self._patience_s if within_s is None else within_s
        try:
            async with asyncio.timeout(patience_s):
                return await self._read()
        except TimeoutError:
            raise Failed(f"{what} did not come within {patience_s:g} s on the event stream") from None

    async def _read(self) -> SseEvent | None:
        fields: dict[str, str] = {}
        async for line in self._lines:
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                fields[name] = f"{fields[name]}\n{value}" if name == "data" and "data" in fields else value
            elif "data" in fields:
                self._transcript.received(self._name, f"id {fields.get('id')} {fields['data']}")
                frame = orjson.loads(fields["data"])
                return SseEvent(fields.get("id"), fields.get("event", "message"), frame)
            else:
                fields = {}
        return None


class Rest:
    """Requests of one account."""

    def __init__(self, http: httpx.AsyncClient, transcript: Transcript, *, name: str, token: str | None) -> None:
        self._http = http
        self._transcript = transcript
        self._name = name
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def send(self, method: str, path: str, *, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Send a request and return the response; one that is asked to wait a little is sent once more."""
        for attempt in range(2):
            self._transcript.sent(self._name, f"{method} {path}")
            response = await self._http.request(method, path, json=body, headers={**self._headers, **(headers or {})})
            self._transcript.received(self._name, f"{response.status_code} {method} {path}")
            wait_s = float(response.headers.get("Retry-After", "1") or 1)
            if response.status_code != 429 or attempt or wait_s > _LONGEST_WAIT_S:
                break
            await asyncio.sleep(wait_s)
        return response

    async def call(
        self, method: str, path: str, *, expect: int | tuple[int, ...], body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Any:  # fmt: skip
        """Send a request, see that it was answered with this status, and return its `data`."""
        response = await self.send(method, path, body=body, headers=headers)
        wanted = (expect,) if isinstance(expect, int) else expect
        if response.status_code == 429 and 429 not in wanted:
            raise Skipped("the server takes no more requests of this account for now: wait, or raise its limits")
        require(
            response.status_code in wanted,
            f"{method} {path} must answer {' or '.join(map(str, wanted))} and answered {response.status_code}",
            response.text[:300] if response.status_code >= 400 else response.status_code,
        )
        return response.json()["data"] if response.content and response.status_code < 400 else None

    @asynccontextmanager
    async def events(
        self, method: str, path: str, *, patience_s: float, params: dict[str, str] | None = None, body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[EventStream]:  # fmt: skip
        """Read a stream of events."""
        self._transcript.sent(self._name, f"{method} {path} {params or ''} (text/event-stream)")
        given = {**self._headers, "Accept": "text/event-stream", **(headers or {})}
        async with self._http.stream(method, path, params=params, json=body, headers=given) as response:
            self._transcript.received(self._name, f"{response.status_code} {method} {path}")
            kind = response.headers.get("content-type", "")
            require(
                response.status_code == 200 and kind.startswith("text/event-stream"),
                f"{method} {path} must answer with a stream of events; it answered {response.status_code} {kind}",
            )
            yield EventStream(response, self._transcript, name=self._name, patience_s=patience_s)
