"""A provider that says exactly the bytes that a test gives it, and tells whether its caller went away."""

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

EVENTS = "text/event-stream"


@dataclass(slots=True)
class Asked:
    """A request, and what became of its connection."""

    path: str
    headers: dict[str, str]
    body: Any
    sent: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)


class RawServer:
    """Answers every request with `answer`; each piece is a chunk of its own. It never closes a connection itself."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.url = ""
        self._status = 200
        self._ends = True
        self._headers: Mapping[str, str] = {}
        self._pieces: Iterable[bytes] = ()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def answer(
        self,
        pieces: Iterable[bytes],
        *,
        status: int = 200,
        kind: str = EVENTS,
        headers: Mapping[str, str] | None = None,
        ends: bool = True,
    ) -> None:
        """Say what comes from now on, and whether the body ends behind it or stays open."""
        self._ends = ends
        self._pieces, self._status = pieces, status
        self._headers = {"content-type": kind, **(headers or {})}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        asked: Asked | None = None
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                request, *lines = head.decode("latin-1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                asked = Asked(request.split(" ")[1], headers, orjson.loads(body) if body else None)
                self.asked.append(asked)
                await self._say(asked, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if asked is not None:
                asked.closed.set()
            with suppress(ConnectionError):
                writer.close()
            self._tasks.discard(task)

    async def _say(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path.endswith("/cancel"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
            return
        fields = {"transfer-encoding": "chunked", **self._headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {self._status} Status\r\n{lines}\r\n".encode())
        for piece in self._pieces:
            if piece:
                asked.sent += len(piece)
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
        if self._ends:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
