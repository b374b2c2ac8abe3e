"""A network that fails on purpose: between clients and a server, or a server and PostgreSQL or Valkey.

Faults are per direction: `up` is from who connected to the far end, `down` the way back.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Direction = Literal["up", "down"]

_RST = struct.pack("ii", 1, 0)
_CHUNK = 16 * 1024


@dataclass
class Faults:
    """What is done to the bytes of one direction. Changes hold for what is read from then on."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    cut_after: int | None = None
    """Reset each connection once so many bytes of it went this way."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def black_hole(self) -> None:
        """Let nothing through; nobody is told."""
        self._open.clear()

    def heal(self) -> None:
        """Let everything through again, what was held back first."""
        self.delay_s = self.bytes_per_s = 0.0
        self.cut_after = None
        self._open.set()

    async def passed(self) -> None:
        """Wait while nothing goes through."""
        await self._open.wait()


class _Link:
    """One connection and its way on."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.ends = (near, far)
        self.passed: dict[Direction, int] = {"up": 0, "down": 0}
        self.tasks: list[asyncio.Task[None]] = []

    def reset(self) -> None:
        for writer in self.ends:
            endpoint = writer.transport.get_extra_info("socket")
            if endpoint is not None and endpoint.family in {socket.AF_INET, socket.AF_INET6}:
                with suppress(OSError):
                    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            writer.transport.abort()


class FaultProxy:
    """Forwards connections to `far`: a TCP port of this machine, or the path of a Unix socket."""

    def __init__(self, far: int | Path) -> None:
        self.far = far
        self.port = 0
        self.refuse = False
        self.faults: dict[Direction, Faults] = {"up": Faults(), "down": Faults()}
        self.accepted = 0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def up(self) -> Faults:
        """Faults on the way to the far end."""
        return self.faults["up"]

    @property
    def down(self) -> Faults:
        """Faults on the way back."""
        return self.faults["down"]

    @property
    def open(self) -> int:
        """How many connections go through."""
        return len(self._links)

    def passed(self, direction: Direction) -> int:
        """Return how many bytes went this way on the connections that are open."""
        return sum(link.passed[direction] for link in self._links)

    def reset(self) -> None:
        """Cut every connection with a RST."""
        for link in list(self._links):
            link.reset()

    def finish(self, direction: Direction = "down") -> None:
        """End every connection with a FIN towards one side, as a proxy that restarts."""
        for link in list(self._links):
            with suppress(OSError):
                link.ends[0 if direction == "down" else 1].write_eof()

    def black_hole(self) -> None:
        """Let nothing through either way: the peers wait."""
        self.up.black_hole()
        self.down.black_hole()

    def heal(self) -> None:
        """No faults any more."""
        self.refuse = False
        self.up.heal()
        self.down.heal()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refuse:
            writer.transport.abort()
            return
        try:
            if isinstance(self.far, int):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.far)
            else:
                far_reader, far_writer = await asyncio.open_unix_connection(self.far)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, far_writer)
        self._links.add(link)
        for direction, source, target in (("up", reader, far_writer), ("down", far_reader, writer)):
            task = asyncio.create_task(self._pump(link, direction, source, target))  # type: ignore[arg-type]  # a Direction
            link.tasks.append(task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, link: _Link, direction: Direction, source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        faults = self.faults[direction]
        try:
            while data := await source.read(_CHUNK):
                await faults.passed()
                if faults.delay_s:
                    await asyncio.sleep(faults.delay_s)
                    await faults.passed()
                if faults.bytes_per_s:
                    await asyncio.sleep(len(data) / faults.bytes_per_s)
                if faults.cut_after is not None and link.passed[direction] + len(data) >= faults.cut_after:
                    data = data[: max(0, faults.cut_after - link.passed[direction])]
                    target.write(data)
                    link.passed[direction] += len(data)
                    await target.drain()
                    link.reset()
                    return
                target.write(data)
                link.passed[direction] += len(data)
                await target.drain()
            # Also a FIN is held up by a black hole.
            await faults.passed()
            with suppress(OSError, RuntimeError):
                target.write_eof()
        except OSError:
            link.reset()
        finally:
            if all(task.done() or task is asyncio.current_task() for task in link.tasks):
                self._links.discard(link)
                for writer in link.ends:
                    writer.close()

    async def listen(self, path: Path | None = None) -> None:
        """Begin to accept: on a free TCP port, or on a Unix socket."""
        if path is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
            self.port = self._server.sockets[0].getsockname()[1]
        else:
            self._server = await asyncio.start_unix_server(self._accept, path, backlog=1024)

    async def close(self) -> None:
        """Cut everything and stop."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def fault_proxy(far: int | Path, *, path: Path | None = None) -> AsyncIterator[FaultProxy]:
    """Run a proxy for the length of the block."""
    made = FaultProxy(far)
    await made.listen(path)
    try:
        yield made
    finally:
        await made.close()
