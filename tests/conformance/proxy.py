"""A server that is wrong in one way: everything passes through it, and one thing is broken on the way."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.process import ServerProcess

Frame = dict[str, Any]

LAST_WORDS = "last words"

_HOP_BY_HOP = {b"connection", b"transfer-encoding", b"content-length", b"host", b"date", b"content-encoding"}


class Fault:
    """What is wrong on one connection; this one is nothing."""

    def to_client(self, frame: Frame) -> list[Frame]:
        """Return what the client gets for a frame of the server."""
        return [frame]

    def to_server(self, frame: Frame) -> list[Frame]:
        """Return what the server gets for a frame of the client."""
        return [frame]

    def close_code(self, code: int) -> int:
        """Return the close code that the client gets."""
        return code

    def after_the_client(self) -> list[Frame]:
        """Return a request that the server gets once the client has gone."""
        return []


class Proxy:
    """An ASGI application in front of a server."""

    def __init__(self, server: ServerProcess, fault: type[Fault]) -> None:
        self._server = server
        self._fault = fault
        self._http = httpx.AsyncClient(base_url=server.url, timeout=30)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)

    async def close(self) -> None:
        await self._http.aclose()

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = [(name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP]
        url = f"{scope['path']}?{scope['query_string'].decode()}"
        async with self._http.stream(scope["method"], url, headers=headers, content=body) as response:
            kept = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            with contextlib.suppress(httpx.HTTPError):
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        offered = [Subprotocol(name) for name in scope["subprotocols"]]
        upstream = await connect(
            self._server.ws_url, subprotocols=offered or None, compression=None, max_size=None, max_queue=None,
            ping_interval=None, close_timeout=1,
        )  # fmt: skip
        await send({"type": "websocket.accept", "subprotocol": upstream.subprotocol})
        fault, answered = self._fault(), asyncio.Event()
        outward = asyncio.create_task(self._outward(upstream, fault, send, answered))
        inward = asyncio.create_task(self._inward(upstream, fault, receive, answered))
        try:
            await asyncio.wait({outward, inward}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (outward, inward):
                task.cancel()
            await asyncio.gather(outward, inward, return_exceptions=True)
            await upstream.close()

    async def _outward(self, upstream: ClientConnection, fault: Fault, send: Send, answered: asyncio.Event) -> None:
        gone = False
        try:
            while True:
                frame = orjson.loads(await upstream.recv())
                if frame.get("id") == LAST_WORDS:
                    answered.set()
                for one in [] if gone else fault.to_client(frame):
                    try:
                        await send({"type": "websocket.send", "text": orjson.dumps(one).decode()})
                    except (OSError, RuntimeError):
                        # Who has gone is noticed inward; what is still said to the server is answered.
                        gone = True
        except ConnectionClosed as closed:
            if closed.rcvd is not None and not gone:
                code = fault.close_code(closed.rcvd.code)
                await send({"type": "websocket.close", "code": code, "reason": closed.rcvd.reason})

    async def _inward(
        self, upstream: ClientConnection, fault: Fault, receive: Receive, answered: asyncio.Event
    ) -> None:  # fmt: skip
        with contextlib.suppress(ConnectionClosed):
            while (message := await receive())["type"] == "websocket.receive":
                for data in _broken(message, fault):
                    await upstream.send(data)
            for frame in fault.after_the_client():
                await upstream.send(orjson.dumps({**frame, "id": LAST_WORDS}).decode())
                await answered.wait()


def _broken(message: Message, fault: Fault) -> list[str | bytes]:
    text = message.get("text")
    if text is None:
        return [bytes(message["bytes"])]
    try:
        frame = orjson.loads(text)
    except orjson.JSONDecodeError:
        return [text]
    if not isinstance(frame, dict):
        return [text]
    given = fault.to_server(frame)
    # As the client wrote it, where nothing was changed: sizes count.
    return [text] if given == [frame] else [orjson.dumps(one).decode() for one in given]


class _Quiet(uvicorn.Server):
    def capture_signals(self) -> Any:
        # Signals are the test runner's.
        return contextlib.nullcontext()


@asynccontextmanager
async def wrong_server(server: ServerProcess, fault: type[Fault]) -> AsyncIterator[str]:
    """Run a proxy with a fault, and yield its address."""
    proxy = Proxy(server, fault)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    config = uvicorn.Config(
        proxy, lifespan="off", log_config=None, access_log=False, ws_per_message_deflate=False,
        ws="websockets-sansio", timeout_graceful_shutdown=1,
    )  # fmt: skip
    running = _Quiet(config)
    task = asyncio.create_task(running.serve(sockets=[listening]))
    while not running.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.002)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        await task
        listening.close()
        await proxy.close()
