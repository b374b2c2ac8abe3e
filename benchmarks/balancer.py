"""What stands before several processes: passes TCP on in turns to those whose /health/ready says 200.

`python -m benchmarks.balancer PORT BACKEND_PORT...`. Connections that there are stay until one of their ends goes.
"""

import asyncio
import sys
from typing import cast

import uvloop

from benchmarks.processes import raise_file_limit

_LOOK_S = 0.1
_ASK = b"GET /health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


class Balancer:
    """Which processes are in it, and whose turn it is."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._ready: set[int] = set()
        self._turn = 0

    async def look(self, port: int) -> None:
        """Ask a process again and again whether it is ready."""
        while True:
            (self._ready.add if await _is_ready(port) else self._ready.discard)(port)
            await asyncio.sleep(_LOOK_S)

    def next_port(self) -> int | None:
        """Return whose turn it is, or None when nobody is ready."""
        for _ in self._ports:
            self._turn = (self._turn + 1) % len(self._ports)
            if self._ports[self._turn] in self._ready:
                return self._ports[self._turn]
        return None

    def out(self, port: int) -> None:
        """Take a process out that does not take connections."""
        self._ready.discard(port)


async def _is_ready(port: int) -> bool:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(_ASK)
                return (await reader.readline()).startswith(b"HTTP/1.1 200")
            finally:
                writer.close()
    except OSError:
        return False


class _End(asyncio.Protocol):
    """One end of a connection; what it hears the other end says."""

    def __init__(self, balancer: Balancer, other: "_End | None" = None) -> None:
        self._balancer = balancer
        self._other = other
        self._early: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._other is None:
            self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        while (port := self._balancer.next_port()) is not None:
            try:
                _, made = await loop.create_connection(lambda: _End(self._balancer, self), "127.0.0.1", port)
            except OSError:
                self._balancer.out(port)
                continue
            self._other = made
            made.transport.writelines(self._early)
            if self.transport.is_closing():
                made.transport.close()
            return
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early.append(data)
        else:
            self._other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._other is not None:
            (self._other.transport.abort if exc else self._other.transport.close)()

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.resume_reading()


async def _serve(port: int, backends: list[int]) -> None:
    balancer = Balancer(backends)
    looking = [asyncio.create_task(balancer.look(backend)) for backend in backends]
    server = await asyncio.get_running_loop().create_server(lambda: _End(balancer), "127.0.0.1", port, backlog=4096)
    async with server:
        await asyncio.gather(server.serve_forever(), *looking)


def main() -> None:
    raise_file_limit()
    port, *backends = map(int, sys.argv[1:])
    uvloop.run(_serve(port, backends))


if __name__ == "__main__":
    main()
