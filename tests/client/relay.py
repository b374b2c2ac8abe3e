"""A network between a client and a server: it can be cut, and its far end can move."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Forwards TCP from a port of its own to `port`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.own_port = 0
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.own_port}"

    def cut(self) -> None:
        """Break every connection."""
        for writer in list(self._open):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        self._open |= {writer, far_writer}
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.transport.abort()
        self._open.discard(target)

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator["Relay"]:
        made = cls(port)
        server = await asyncio.start_server(made._accept, "127.0.0.1", 0, family=socket.AF_INET)
        made.own_port = server.sockets[0].getsockname()[1]
        try:
            yield made
        finally:
            server.close()
            made.cut()
            await asyncio.gather(*made._tasks)
