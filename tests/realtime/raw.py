"""A client below the level of messages: bytes that no library would send."""

import asyncio
import base64
import os
import resource
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.realtime.conftest import LiveServer

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def raw_handshake(live_server: LiveServer, *lines: str) -> AsyncIterator[Streams]:
    """Open a socket by hand; leaving it drops the connection."""
    key = base64.b64encode(os.urandom(16)).decode()
    head = [
        "GET /api/v1/realtime HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: parley.v1", *lines, "", "",
    ]  # fmt: skip
    async with live_server.bytes() as (reader, writer):
        writer.write("\r\n".join(head).encode("latin-1"))
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        yield reader, writer


def masked(opcode: int, data: bytes, *, fin: bool = True, rsv: int = 0) -> bytes:
    """Return a client's frame."""
    size = len(data)
    head = bytes([(0x80 if fin else 0) | rsv | opcode])
    head += bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack("!H", size)
    return head + b"\0\0\0\0" + data


async def close_code(reader: asyncio.StreamReader) -> int:
    """Read frames up to the server's close."""
    async with asyncio.timeout(10):
        while True:
            first, second = await reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack("!H", await reader.readexactly(2))
            data = await reader.readexactly(size)
            if first & 0x0F == 8:
                return int.from_bytes(data[:2])


def resident_bytes() -> int:
    """How much memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
