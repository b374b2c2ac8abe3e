"""Lean clients for load: a WebSocket that speaks `parley.v1`, and an HTTP stream from the provider.

Raw asyncio protocols and orjson: what measures must cost less than what is measured. Frames are read by the protocol's
client rule, so a lost, doubled or reordered event is counted and not overlooked.
"""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Self, cast

import orjson

_UPGRADE = (
    b"GET /api/v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: cGFybGV5LWJlbmNobWFyaw==\r\n"
    b"Sec-WebSocket-Protocol: parley.v1\r\n\r\n"
)
_STAMP = re.compile(rb'"content":"(\d+)\|"')


def text_frame(value: object) -> bytes:
    """Return a text frame as a client sends it. The mask is zero, so that masking costs nothing."""
    data = orjson.dumps(value)
    if len(data) < 126:
        head = b"\x81" + bytes([0x80 | len(data)])
    else:
        head = b"\x81\xfe" + len(data).to_bytes(2)
    return head + b"\0\0\0\0" + data


class Socket(asyncio.Protocol):
    """One connection. `on_frame` gets each frame and the time (monotonic ns) at which it was read."""

    def __init__(self, hello: dict[str, Any], on_frame: Callable[[dict[str, Any], int], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.on_frame = on_frame
        self.welcome: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()
        self._hello = hello
        self._rest = b""
        self._upgraded = False
        self._transport: asyncio.Transport

    @classmethod
    async def open(
        cls, port: int, hello: dict[str, Any], on_frame: Callable[[dict[str, Any], int], None] | None = None
    ) -> Self:
        """Connect and say `hello`. Returns once both are on their way; `welcome` tells when they have been answered."""
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(lambda: cls(hello, on_frame), "127.0.0.1", port)
        return made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(_UPGRADE)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(str(exc or "closed"))
        if not self.welcome.done():
            self.welcome.set_exception(ConnectionError(self.closed.result()))
            self.welcome.exception()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._rest:
            data = self._rest + data
        at = 0
        if not self._upgraded:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return
            if not data.startswith(b"HTTP/1.1 101"):
                self._transport.abort()
                return
            self._upgraded = True
            self.send(self._hello)
            at = end + 4
        while len(data) - at >= 2:
            length, start = data[at + 1], at + 2
            if length == 126:
                length, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
            elif length == 127:
                length, start = int.from_bytes(data[at + 2 : at + 10]), at + 10
            if start + length > len(data):
                break
            self._frame(data[at] & 15, data[start : start + length], now)
            at = start + length
        self._rest = data[at:]

    def _frame(self, opcode: int, payload: bytes, now: int) -> None:
        if opcode == 8:
            self.closed.set_result(f"{int.from_bytes(payload[:2])} {payload[2:].decode()}")
            self._transport.close()
        elif opcode == 9:
            self._transport.write(b"\x8a" + bytes([0x80 | len(payload)]) + b"\0\0\0\0" + payload)
        elif opcode == 1:
            frame = orjson.loads(payload)
            kind = frame["t"]
            if kind == "welcome":
                self.welcome.set_result(None)
            elif kind == "hb":
                self.send({"t": "hb"})
            elif self.on_frame is not None:
                self.on_frame(frame, now)

    def send(self, frame: dict[str, Any]) -> None:
        """Send a frame."""
        self._transport.write(text_frame(frame))

    def drop(self) -> None:
        """Let the connection go without a word."""
        self._transport.abort()


def hello(token: str, *channels: str, since: int | None = -1) -> dict[str, Any]:
    """Return a `hello` that subscribes: from now on, from a position, or with a snapshot (None)."""
    position = {} if since is None else {"since": {"seq": since}}
    return {"t": "hello", "v": 1, "auth": {"token": token}, "subs": [{"ch": ch, **position} for ch in channels]}


class ProviderStream(asyncio.Protocol):
    """A keep-alive connection to the fake provider that notes when each stamped delta was sent and came."""

    def __init__(self) -> None:
        self.stamps: list[tuple[int, int]] = []
        self._transport: asyncio.Transport
        self._first: asyncio.Future[int] | None = None
        self._end: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connect."""
        _, made = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        for stamp in _STAMP.findall(data):
            self.stamps.append((int(stamp), now))
            if self._first is not None and not self._first.done():
                self._first.set_result(now)
        if data.endswith(b"0\r\n\r\n") and self._end is not None and not self._end.done():
            self._end.set_result(None)

    def ask(self, plan: str) -> tuple[asyncio.Future[int], asyncio.Future[None]]:
        """Ask for an answer; the futures tell when its first delta came and when it ended."""
        loop = asyncio.get_running_loop()
        self._first, self._end = loop.create_future(), loop.create_future()
        body = orjson.dumps({"model": "fake", "stream": True, "messages": [{"role": "user", "content": plan}]})
        self._transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        return self._first, self._end

    def close(self) -> None:
        """Close."""
        self._transport.close()
