"""A real server in the test's own event loop, and a bare client of `parley.v1` that hides nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import orjson
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from parley.cli.serve import uvicorn_config
from parley.core.settings import Settings
from parley.main import create_app
from tests.documented import documented

Frame = dict[str, Any]


@dataclass(frozen=True)
class LiveServer:
    """Where a running server is."""

    app: FastAPI
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/v1/realtime"


class HasSocket(Protocol):
    """Anything that a socket can be opened to."""

    @property
    def ws_url(self) -> str: ...


class _Quiet(uvicorn.Server):
    def capture_signals(self) -> Any:
        # Signals are the test runner's.
        import contextlib

        return contextlib.nullcontext()


@asynccontextmanager
async def live(settings: Settings) -> AsyncIterator[LiveServer]:
    """Run a server on a free port with the options that `parley serve` uses."""
    app = create_app(settings)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    config = uvicorn_config(app, settings)
    config.timeout_graceful_shutdown = 1
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the server did not start; its log says why")
        await asyncio.sleep(0.002)
    try:
        yield LiveServer(app, listening.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listening.close()


@dataclass
class Socket:
    """A connection that keeps every frame it received. Frames that the AsyncAPI document does not have are refused."""

    connection: ClientConnection
    frames: list[Frame] = field(default_factory=list)
    _next: int = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.connection.close()

    async def send(self, **frame: Any) -> None:
        """Send a frame."""
        text = orjson.dumps(frame).decode()
        documented().sent(text)
        await self.connection.send(text)

    async def receive(self, *, timeout_s: float = 5) -> Frame:
        """Return the next frame."""
        async with asyncio.timeout(timeout_s):
            frame = documented().received(orjson.loads(await self.connection.recv()))
        self.frames.append(frame)
        return frame

    async def until(self, holds: Callable[[Frame], bool], *, timeout_s: float = 10) -> Frame:
        """Return the first frame of which it holds; those before it are kept in `frames`."""
        async with asyncio.timeout(timeout_s):
            while True:
                frame = await self.receive(timeout_s=timeout_s)
                if holds(frame):
                    return frame

    async def of_type(self, t: str, *, timeout_s: float = 10) -> Frame:
        """Return the next frame of a type."""
        return await self.until(lambda frame: frame["t"] == t, timeout_s=timeout_s)

    async def closed(self, *, timeout_s: float = 10) -> int:
        """Return the close code, once the server has closed."""
        try:
            while True:
                await self.receive(timeout_s=timeout_s)
        except ConnectionClosed:
            assert self.connection.close_code is not None
            return self.connection.close_code

    def drop(self) -> None:
        """Cut the connection without a word."""
        self.connection.transport.abort()


async def dial(server: HasSocket, **options: Any) -> Socket:
    """Open a socket; nothing is said yet."""
    options.setdefault("subprotocols", [Subprotocol("parley.v1")])
    connection = await connect(
        server.ws_url, compression=None, max_size=None, max_queue=None, ping_interval=None, close_timeout=1, **options
    )
    return Socket(connection)


async def greet(server: LiveServer, token: str, *, subs: list[Frame] | None = None, **options: Any) -> Socket:
    """Open a socket and say hello with an access token."""
    made = await dial(server, **options)
    await made.send(t="hello", v=1, auth={"token": token}, subs=subs or [])
    welcome = await made.receive()
    assert welcome["t"] == "welcome", welcome
    return made
