"""A streamed completion over OpenAI's dialect as a measuring client follows it: one connection, one answer at a time."""

import asyncio
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import orjson

from benchmarks.replies import Faults

_STAMP = re.compile(rb'"content":"(\d+)\|"')
# An event ends in an empty line, and what was sent in one go in the end of a chunk of HTTP's.
_EVENT_END = b"\n\n\r\n"


class CompletionFollower(asyncio.Protocol):
    """A keep-alive connection with a key. `on_deltas` gets the provider's stamps that came and when they were read."""

    def __init__(self, key: str, faults: Faults, on_deltas: Callable[[list[int], int], None] | None = None) -> None:
        self.faults = faults
        self.deltas = 0
        self.frames = 0
        self.sent_at = 0
        self._new_future: Callable[[], asyncio.Future[Any]] = asyncio.get_running_loop().create_future
        self.first: asyncio.Future[tuple[int, int]] = self._new_future()
        self.ended: asyncio.Future[None] = self._new_future()
        self._key = key.encode()
        self._on_deltas = on_deltas
        self._rest = b""
        self._head = b""
        self._expected = 0
        self._came = 0
        self._last = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"closed: {exc}")

    def send(self, plan: str, *, deltas: int) -> None:
        """Ask for an answer of so many stamped deltas. `first` and `ended` tell what becomes of it."""
        self.first, self.ended = self._new_future(), self._new_future()
        self._rest, self._head, self._expected, self._came, self._last = b"", b"", deltas, 0, 0
        messages = [{"role": "user", "content": f"{plan} deltas={deltas} stamp=1"}]
        body = orjson.dumps({"model": "gpt", "stream": True, "messages": messages})
        self.sent_at = time.monotonic_ns()
        self._transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b" % (self._key, len(body), body)
        )

    def close(self) -> None:
        """Drop the connection."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._rest += data
        if not self._head:
            head, found, rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                return
            self._head, self._rest = head, rest
            if not head.startswith(b"HTTP/1.1 200"):
                self._fail(f"refused: {head[:200]!r}")
                return
        end = self._rest.rfind(_EVENT_END)
        if end >= 0:
            whole, self._rest = self._rest[: end + len(_EVENT_END)], self._rest[end + len(_EVENT_END) :]
            self._events(whole, now)

    def _events(self, whole: bytes, now: int) -> None:
        self.frames += whole.count(_EVENT_END)
        stamps = [int(stamp) for stamp in _STAMP.findall(whole)]
        if stamps:
            if not self.first.done():
                self.first.set_result((now, stamps[0]))
            if stamps != sorted(stamps) or stamps[0] < self._last:
                self.faults.reordered += 1
            self._last = stamps[-1]
            self._came += len(stamps)
            self.deltas += len(stamps)
            if self._on_deltas is not None:
                self._on_deltas(stamps, now)
        if b"data: [DONE]" in whole:
            if self._came != self._expected:
                self.faults.lost += 1
            self.ended.set_result(None)
        elif b'data: {"error"' in whole:
            self._fail("the stream ended in an error")

    def _fail(self, why: str) -> None:
        waited = [one for one in (self.first, self.ended) if not one.done()]
        if self.sent_at and waited:
            self.faults.failed += 1
        for one in waited:
            one.set_exception(RuntimeError(why))
            one.exception()


async def open_completions(
    port: int, keys: list[str], faults: Faults, on_deltas: Callable[[list[int], int], None] | None = None
) -> list[CompletionFollower]:
    """Connect once for each of these keys."""
    loop = asyncio.get_running_loop()
    found = [CompletionFollower(key, faults, on_deltas) for key in keys]
    for one in found:
        await loop.create_connection(partial(_same, one), "127.0.0.1", port)
    return found


def _same(follower: CompletionFollower) -> CompletionFollower:
    return follower
