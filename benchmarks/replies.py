"""A reply as a measuring client follows it: every position, every character, the checks of the terminal event."""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from benchmarks.sockets import Socket, hello

_TERMINAL = {"reply.completed", "reply.failed", "reply.cancelled"}
_ACK_S = 1.0


@dataclass
class Faults:
    """What must stay at zero."""

    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    mismatched: int = 0
    failed: int = 0
    started_anew: int = 0
    """The server gave a snapshot in the middle of a reply: allowed, and not what a reader who keeps up should see."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in asdict(self).items())

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Follower:
    """One socket that follows one conversation, with one running reply at a time.

    `on_deltas` gets the provider's stamps that a frame brought and when it was read. Texts are made of stamps only.
    """

    def __init__(
        self, conversation: str, faults: Faults, on_deltas: Callable[[list[int], int], None] | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.channel = f"conversation:{conversation}"
        self.faults = faults
        self.deltas = 0
        self.frames = 0
        self.sent_at = 0
        self._new_future = loop.create_future
        self.ok: asyncio.Future[int] = self._new_future()
        self.first: asyncio.Future[tuple[int, int]] = self._new_future()
        self.ended: asyncio.Future[None] = self._new_future()
        self._on_deltas = on_deltas
        self._last: int | None = None
        self._acked = 0
        self._pieces: list[str] = []
        self._length = 0
        self._expected = 0
        self._whole = True
        self._subscribed: asyncio.Future[None] = self._new_future()
        self._timer: asyncio.TimerHandle | None = None
        self.socket: Socket

    async def open(self, port: int, token: str) -> Self:
        """Connect and subscribe."""
        self.socket = await Socket.open(port, hello(token, self.channel), self._frame)
        async with asyncio.timeout(30):
            await self.socket.welcome
            await self._subscribed
        self.socket.closed.add_done_callback(lambda closed: self._fail(f"closed: {closed.result()}"))
        self._ack()
        return self

    def _ack(self) -> None:
        """Acknowledge each second, as the protocol asks of a client that receives."""
        if self._last is not None and self._last != self._acked:
            self._acked = self._last
            self.socket.send({"t": "ack", "a": {self.channel: self._last}})
        self._timer = asyncio.get_running_loop().call_later(_ACK_S, self._ack)

    def send(self, plan: str, *, deltas: int) -> None:
        """Ask for a reply of so many stamped deltas. `ok`, `first` and `ended` tell what becomes of it."""
        self.ok, self.first, self.ended = self._new_future(), self._new_future(), self._new_future()
        self._pieces, self._length, self._expected, self._whole = [], 0, deltas, True
        parts = [{"type": "text", "text": f"{plan} deltas={deltas} stamp=1"}]
        frame = {"t": "chat.send", "id": 1, "ch": self.channel, "cid": str(uuid.uuid4()), "parts": parts}
        self.sent_at = time.monotonic_ns()
        self.socket.send(frame)

    def close(self) -> None:
        """Drop the connection."""
        if self._timer is not None:
            self._timer.cancel()
        self.socket.drop()

    def _frame(self, frame: dict[str, Any], now: int) -> None:
        match frame["t"]:
            case "ev":
                self._event(frame, now)
            case "ok":
                self.ok.set_result(now - self.sent_at)
            case "subbed":
                if self._last is not None:
                    self.faults.started_anew += 1
                    self._whole = False
                self._last = frame["head"]
            case "live":
                if not self._subscribed.done():
                    self._subscribed.set_result(None)
            case "err":
                self._fail(f"{frame['code']}: {frame['msg']}")

    def _fail(self, why: str) -> None:
        """Tell all who wait for something that it will not come."""
        waited = [one for one in (self._subscribed, self.ok, self.first, self.ended) if not one.done()]
        if self.sent_at and waited:
            self.faults.failed += 1
        for one in waited:
            one.set_exception(RuntimeError(why))
            one.exception()

    def _event(self, frame: dict[str, Any], now: int) -> None:
        seq = frame["seq"]
        assert self._last is not None
        if seq <= self._last:
            self.faults.doubled += 1
            return
        if frame.get("from", seq) != self._last + 1:
            self.faults.lost += 1
        self._last = seq
        event = frame["e"]
        if event == "reply.delta":
            self._delta(frame["d"], now)
        elif event in _TERMINAL:
            self._check(event, frame["d"])

    def _delta(self, d: dict[str, Any], now: int) -> None:
        text = d["x"]
        if d["off"] != self._length and self._whole:
            self.faults.lost += 1
        self._length = d["off"] + len(text)
        self._pieces.append(text)
        stamps = [int(stamp) for stamp in text.split("|")[:-1]]
        self.frames += 1
        self.deltas += len(stamps)
        if not self.first.done():
            self.first.set_result((now, stamps[0]))
        if self._on_deltas is not None:
            self._on_deltas(stamps, now)

    def _check(self, event: str, d: dict[str, Any]) -> None:
        self.ended.set_result(None)
        if not self._whole:
            return
        text = "".join(self._pieces)
        stamps = [int(stamp) for stamp in text.split("|")[:-1]]
        if event != "reply.completed" or len(stamps) != self._expected:
            self.faults.failed += 1
        if stamps != sorted(stamps):
            self.faults.reordered += 1
        if len(text) != d["len"] or hashlib.sha256(text.encode()).hexdigest() != d["sha256"]:
            self.faults.mismatched += 1


async def open_followers(
    port: int,
    conversations: list[tuple[str, str]],
    faults: Faults,
    on_deltas: Callable[[list[int], int], None] | None = None,
) -> list[Follower]:
    """Follow conversations, given with their users' tokens; 50 connections are made at a time."""
    followers = [Follower(id, faults, on_deltas) for _, id in conversations]
    for start in range(0, len(followers), 50):
        pairs = zip(followers[start : start + 50], conversations[start : start + 50], strict=True)
        await asyncio.gather(*(follower.open(port, token) for follower, (token, _) in pairs))
    return followers
