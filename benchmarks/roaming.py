"""A client that comes back: resumes after a cut, moves when it is asked to, as the protocol asks of every client."""

import asyncio
import os
import random
import socket
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

from benchmarks.channels import Channel, OnEvent, Wrong
from benchmarks.sockets import Socket
from parley.client.policy import ABNORMAL, GOAWAY, OVERLOADED, TOO_MANY, Ending, next_attempt_s

_OPEN_S = 10.0
_ACK_S = 1.0
_CLOSE = b"\x88\x82\0\0\0\0" + (1000).to_bytes(2)
_RESET = struct.pack("ii", 1, 0)


class _Link(Socket):
    """One connection of a client. Heard from its `welcome` until the next one is welcomed."""

    def __init__(self, client: "Roamer", hello: dict[str, Any], asked: dict[str, int]) -> None:
        super().__init__(hello, self._heard)
        self.asked = asked
        self.goaway: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.retry_after_s: dict[int, float] = {}
        self._client: Roamer | None = client
        self._waits = set(asked)
        self._made = False

    def _heard(self, frame: dict[str, Any], now: int) -> None:
        client = self._client
        if client is None:
            return
        kind = frame["t"]
        if kind == "err":
            client.refusals.append(frame["code"])
            if frame.get("retry_after_ms") is not None:
                self.retry_after_s[OVERLOADED] = self.retry_after_s[TOO_MANY] = frame["retry_after_ms"] / 1000
            return
        if not self.welcome.done() or self.welcome.exception() is not None:
            return
        if client.link is not self:
            client.adopt(self)
        if kind == "ev":
            client.channels[frame["ch"]].event(frame, now)
            client.moved()
        elif kind == "subbed":
            client.channels[frame["ch"]].subbed(frame, self.asked[frame["ch"]])
            client.recovered += frame["recovered"]
        elif kind == "snap":
            client.channels[frame["ch"]].snap(frame)
        elif kind == "live":
            self._waits.discard(frame["ch"])
            if not self._waits:
                client.became_live(now)
        elif kind == "goaway" and not self.goaway.done():
            self.goaway.set_result(frame["reconnect_after_ms"] / 1000)

    def leave(self) -> None:
        """Say goodbye; what still comes is not heard."""
        self._client = None
        if not self._transport.is_closing():
            self._transport.write(_CLOSE)

    def cut(self) -> None:
        """End as a network does that loses everything: with a reset."""
        if not self._transport.is_closing():
            # The loop's own object for it cannot set this.
            with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def give_up(self) -> None:
        """Drop an attempt, however far it came."""
        self._client = None
        if self._made:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made = True
        super().connection_made(transport)

    @property
    def ending(self) -> Ending:
        """How it ended."""
        text = self.closed.result() if self.closed.done() else ""
        word = text.split(" ", 1)[0]
        code = int(word) if word.isdigit() else ABNORMAL
        return Ending(code, text, self.retry_after_s.get(code))


class Roamer:
    """A client of some channels, for as long as it is open. `port` is asked before each attempt."""

    def __init__(
        self,
        port: Callable[[], int],
        token: str,
        names: Sequence[str],
        wrong: Wrong,
        on_event: OnEvent | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self.channels = {name: Channel(name, wrong, on_event, keep=keep) for name in names}
        self.link: _Link | None = None
        self.wrong = wrong
        self.attempts = 0
        self.losses = 0
        self.recovered = 0
        self.refusals: list[str] = []
        self.live_at = 0
        self.stopped: Ending | None = None
        self._port = port
        self._token = token
        self._live = asyncio.Event()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._acks: asyncio.TimerHandle | None = None

    async def open(self) -> Self:
        """Connect; return when every channel is live."""
        self._task = asyncio.create_task(self._run())
        await self.live()
        return self

    async def live(self) -> None:
        """Wait until every channel is live. Raises when the server does not want this client."""
        await self._live.wait()
        if self.stopped is not None:
            raise RuntimeError(f"turned away: {self.stopped}, {self.refusals[-3:]}")

    def cut(self) -> None:
        """Lose the connection."""
        self._live.clear()
        if self.link is not None:
            self.link.cut()

    async def close(self) -> None:
        """Leave for good."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._acks is not None:
            self._acks.cancel()
        if self.link is not None:
            self.link.drop()

    def send(self, channel: str, plan: str, *, model: str | None = None) -> None:
        """Ask for a reply."""
        frame: dict[str, Any] = {
            "t": "chat.send", "id": 1, "ch": channel, "cid": str(uuid.uuid4()), "parts": [{"type": "text", "text": plan}],
        }  # fmt: skip
        self.say(frame | ({"opts": {"model": model}} if model else {}))

    def say(self, frame: dict[str, Any]) -> None:
        """Send a frame over the connection that there is."""
        assert self.link is not None
        self.link.send(frame)

    # -- what the connection calls -------------------------------------------------------------------------------

    def adopt(self, link: _Link) -> None:
        """Go over to a connection that was welcomed."""
        before, self.link = self.link, link
        if before is not None:
            before.leave()

    def moved(self) -> None:
        """Note that there is something to acknowledge."""
        self._failures = 0
        if self._acks is None:
            self._acks = asyncio.get_running_loop().call_later(_ACK_S, self._acknowledge)

    def became_live(self, now: int) -> None:
        """Note that every channel of the connection is live."""
        self._failures = 0
        self.live_at = now
        self._live.set()

    def _acknowledge(self) -> None:
        self._acks = None
        if self.link is not None and not self.link.closed.done():
            self.link.send({"t": "ack", "a": {name: one.last for name, one in self.channels.items() if one.last >= 0}})

    # -- connections ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            ending = await self._attempt()
            delay = next_attempt_s(ending, failures=self._failures, refused=False, random=random.random)
            if delay is None:
                self.stopped = ending
                self.wrong.refused += 1
                self._live.set()
                return
            self._failures += 1
            await asyncio.sleep(delay)

    async def _attempt(self) -> Ending:
        """Connect and stay until the connection ends, or is to be replaced while it still serves."""
        self.attempts += 1
        subs = [channel.sub for channel in self.channels.values()]
        asked = {sub["ch"]: sub["since"]["seq"] for sub in subs}
        hello = {"t": "hello", "v": 1, "auth": {"token": self._token}, "subs": subs}
        link = _Link(self, hello, asked)
        try:
            async with asyncio.timeout(_OPEN_S):
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: link, "127.0.0.1", self._port())
                await link.welcome
        except OSError:  # a refusal, a reset and a time that ran out are all of this kind
            link.give_up()
            return link.ending
        if self.link is not link:
            self.adopt(link)
        ends: set[asyncio.Future[Any]] = {link.closed, link.goaway}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if link.closed.done():
            self.losses += 1
            return link.ending
        return Ending(GOAWAY, "asked to move", link.goaway.result())


async def open_all(clients: Sequence[Roamer], *, at_once: int = 50) -> None:
    """Open clients, so many at a time."""
    for start in range(0, len(clients), at_once):
        async with asyncio.timeout(60):
            await asyncio.gather(*(one.open() for one in clients[start : start + at_once]))


async def close_all(clients: Sequence[Roamer]) -> None:
    """Close clients."""
    await asyncio.gather(*(one.close() for one in clients))


async def until(holds: Callable[[], bool], *, within_s: float) -> bool:
    """Wait until something holds, or for so long; tell whether it does."""
    end = time.monotonic() + within_s
    while True:
        if holds():
            return True
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.005)
