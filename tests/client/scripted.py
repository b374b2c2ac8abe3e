"""A server for tests of the connection: a test takes each connection by the hand and says every frame of it."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from parley.client import ConnectionChange, RealtimeClient, Timing
from tests.client.author import CHANNEL, Author
from tests.documented import documented

Frame = dict[str, Any]
DEADLINE_S = 5
LIMITS = {"frame": 65536, "subs": 200, "rate": 20}


class Peer:
    """The server's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self._socket = socket
        self.heard: list[Frame] = []

    async def next(self, *wanted: str) -> Frame:
        """Return the next frame of these kinds (any, without a kind); `ack`s come only when they are named."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                raw = await self._socket.recv()
                assert isinstance(raw, str), "frames are text"
                frame: Frame = json.loads(raw)
                documented().sent(raw)
                self.heard.append(frame)
                if frame["t"] in wanted or (not wanted and frame["t"] != "ack"):
                    return frame

    async def say(self, *frames: Frame) -> None:
        for frame in frames:
            await self._socket.send(json.dumps(frame))

    async def welcome(self, **fields: Any) -> Frame:
        """Take the `hello` and welcome the client. Returns the `hello`."""
        hello = await self.next("hello")
        await self.say({"t": "welcome", "v": 1, "conn": "c", "hb": 30, "limits": LIMITS, "durable": True, **fields})
        return hello

    async def close(self, code: int, reason: str = "") -> None:
        await self._socket.close(code, reason)

    def abort(self) -> None:
        self._socket.transport.abort()

    async def ended(self) -> int | None:
        """Wait for the client to close; returns its code."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                while True:
                    await self._socket.recv()
            except ConnectionClosed:
                return self._socket.close_code


class ScriptedServer:
    """Hands each connection to the test. `refuse` answers the upgrade with an HTTP status instead."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[Peer] = asyncio.Queue()
        self.refuse: list[tuple[int, dict[str, str]]] = []
        self.url = ""
        self._server: Server | None = None

    async def accept(self) -> Peer:
        """Return the next connection."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._arrived.get()

    def stop_listening(self) -> None:
        """Refuse connections from now on; those that there are go on."""
        assert self._server is not None
        self._server.server.close()

    def nobody_came(self) -> bool:
        return self._arrived.empty()

    async def _serve(self, socket: ServerConnection) -> None:
        self._arrived.put_nowait(Peer(socket))
        await socket.wait_closed()

    def _check(self, socket: ServerConnection, request: Request) -> Response | None:
        if not self.refuse:
            return None
        status, headers = self.refuse.pop(0)
        answer = socket.respond(HTTPStatus(status), "no\n")
        answer.headers.update(headers)
        return answer

    @classmethod
    @asynccontextmanager
    async def running(cls, subprotocol: str | None = "parley.v1") -> AsyncIterator["ScriptedServer"]:
        made = cls()
        names = [Subprotocol(subprotocol)] if subprotocol else None
        async with serve(
            made._serve, "127.0.0.1", 0, subprotocols=names, process_request=made._check, ping_interval=None,
            compression=None, select_subprotocol=None if subprotocol else lambda *_: None,
        ) as server:  # fmt: skip
            made._server = server
            port = server.sockets[0].getsockname()[1]
            made.url = f"ws://127.0.0.1:{port}/api/v1/realtime"
            yield made


class Watched:
    """A client whose delays do not take time and whose changes are written down.

    Delays of `hold_s` and more last until `released` is set.
    """

    def __init__(self, url: str, *, timing: Timing | None = None, **options: Any) -> None:
        self.delays: list[float] = []
        self.slept: asyncio.Queue[float] = asyncio.Queue()
        self.hold_s = math.inf
        self.released = asyncio.Event()
        self.changes: list[ConnectionChange] = []
        self.events: list[tuple[str, str, Frame]] = []
        self.credentials_asked = 0
        self._changed = asyncio.Event()
        self.client = RealtimeClient(
            url,
            options.pop("credentials", self._credentials),
            on_event=options.pop("on_event", lambda ch, e, d: self.events.append((ch, e, d))),
            on_connection=self._change,
            timing=timing,
            random=lambda: 1.0,
            sleep=self._sleep,
            **options,
        )

    async def _credentials(self) -> dict[str, str]:
        self.credentials_asked += 1
        await asyncio.sleep(0)  # a real one goes over the network: what is asked meanwhile goes into `hello`
        return {"ticket": f"tk_{self.credentials_asked}"}

    async def _sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        self.slept.put_nowait(seconds)
        await (asyncio.sleep(0) if seconds < self.hold_s else self.released.wait())

    def _change(self, change: ConnectionChange) -> None:
        self.changes.append(change)
        self._changed.set()

    async def waits(self) -> float:
        """Return the next delay before an attempt."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.slept.get()

    async def until(self, state: str) -> ConnectionChange:
        """Wait until the newest change is to this state."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.changes or self.changes[-1].state != state:
                self._changed.clear()
                await self._changed.wait()
        return self.changes[-1]


async def following(watched: Watched, server: ScriptedServer, author: Author) -> Peer:
    """Return a connection that follows the author's conversation."""
    subscribing = asyncio.create_task(watched.client.subscribe(CHANNEL))
    peer = await server.accept()
    hello = await peer.welcome()
    sub = hello["subs"][0] if hello["subs"] else await peer.next("sub")
    assert sub["ch"] == CHANNEL
    await peer.say(*author.answer(None))
    async with asyncio.timeout(DEADLINE_S):
        assert await subscribing == author.state
    return peer
