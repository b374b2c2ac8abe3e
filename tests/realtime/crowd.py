"""A process full of clients: `python crowd.py PORT TOKEN COUNT`. A line on its input cuts them all, and they come back.

In a process of their own, so that a server under test has its own to itself.
"""

import asyncio
import json
import random
import struct
import sys
import time

HEAD = (
    b"GET /api/v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: parley.v1\r\n\r\n"
)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def come(port: int, hello: bytes) -> tuple[Streams, int]:
    """Connect until it is live; return the connection and how often it was sent away."""
    for tried in range(1000):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD)
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(hello)
            await reader.readuntil(b'"t":"live"')
        except (asyncio.IncompleteReadError, OSError):
            writer.transport.abort()
            await asyncio.sleep(random.uniform(0, min(20, 0.5 * 2**tried)))
        else:
            return (reader, writer), tried
    raise AssertionError("never let in")


async def main(port: int, token: str, count: int) -> None:
    """Fill up gently, then come back all at once."""
    text = json.dumps({"t": "hello", "v": 1, "auth": {"token": token}, "subs": [{"ch": "tasks"}]}).encode()
    hello = bytes([0x81, 0x80 | 126]) + struct.pack("!H", len(text)) + b"\0\0\0\0" + text
    held: list[Streams] = []
    for start in range(0, count, 50):
        found = await asyncio.gather(*(come(port, hello) for _ in range(min(50, count - start))))
        held += [streams for streams, _ in found]
    print(json.dumps({"here": len(held)}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for _, writer in held:
        writer.transport.abort()
    began = time.monotonic()
    found = await asyncio.gather(*(come(port, hello) for _ in range(count)))
    took_s = time.monotonic() - began
    print(json.dumps({"here": len(found), "took_s": took_s, "sent_away": sum(n for _, n in found)}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
