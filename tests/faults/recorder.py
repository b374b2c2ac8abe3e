"""Clients that write down every frame, follow the client rule, and do not give up.

They share no code with the server or with the shipped client: what they conclude is a second opinion.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID, uuid4

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidHandshake, InvalidMessage
from websockets.typing import Subprotocol

from tests.faults.shown import TERMINAL, Frame, Shown

_STOP_CODES = range(4400, 4500)
_WELCOME_S = 5.0


@dataclass(slots=True)
class Received:
    """A frame, on which connection of the device it came, and when (`time.monotonic()`)."""

    frame: Frame
    connection: int
    at: float


@dataclass(slots=True)
class Step:
    """Something that changed what the device holds of its channel: a snapshot, or an event of the range `lo..seq`."""

    kind: Literal["snap", "ev"]
    ep: str
    lo: int
    seq: int
    e: str = ""
    d: Frame = field(default_factory=dict)
    state: Frame = field(default_factory=dict)
    connection: int = 0
    at: float = 0.0


class Refused(Exception):
    """The server said no, and asking again would not help."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Stopped(Exception):
    """The device was told not to come back."""


class Device:
    """One device on one channel of any of several servers."""

    def __init__(
        self,
        servers: Callable[[], Sequence[str]],
        token: str,
        channel: str,
        *,
        name: str = "device",
        seed: int = 0,
        acks: bool = True,
        retry_s: float = 0.05,
        stall_s: float = 2.0,
    ) -> None:
        self.name = name
        self.channel = channel
        self.received: list[Received] = []
        self.steps: list[Step] = []
        self.connections = 0
        self.dials = 0
        self.gaps = 0
        self.integrity_failures = 0
        self.epoch: str | None = None
        self.last: int | None = None
        self.codes: list[int] = []
        self.resumed_s: list[float] = []
        self.stopped: Exception | None = None
        self.unsubbed: Frame | None = None
        self.on_frame: Callable[[Frame], None] = _nothing
        self._servers = servers
        self._token = token
        self._choose = random.Random(f"{seed}-{name}")
        self._acks = acks
        self._retry_s = retry_s
        self._stall_s = stall_s
        self._socket: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._asked: int | str | None = None
        self._parts: dict[str, Frame] = {}
        self._open_snapshot: Frame | None = None
        self._heads: int | None = None
        self._acked = (0, 0.0)
        self.shown = Shown()

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=self.name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self._socket is not None:
            self._socket.transport.abort()
        # Whoever dropped it for ever is not to be asked for its answers.
        self._fail_answers()

    def drop(self) -> None:
        """Lose the connection without a word."""
        if self._socket is not None:
            self._socket.transport.abort()

    async def until(self, holds: Callable[[], object], *, timeout_s: float = 20) -> None:
        """Wait until something holds; looked at whenever a frame came."""
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    if self.stopped is not None:
                        raise self.stopped
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            tail = [f"{r.connection}:{str(r.frame)[:200]}" for r in self.received[-6:]]
            raise AssertionError(
                f"{self.name} waited in vain at {self.last} (codes {self.codes[-5:]}): {tail}"
            ) from None

    async def live(self, *, timeout_s: float = 20) -> None:
        """Wait until the channel is current for the first time."""
        await self.until(lambda: any(r.frame["t"] == "live" for r in self.received), timeout_s=timeout_s)

    async def gone(self) -> None:
        """Wait until the server has said that the channel is gone."""
        await self.until(lambda: self.unsubbed is not None)

    def ended(self, reply: str) -> Frame | None:
        """Return the terminal event of a reply: from the log, or None."""
        for step in reversed(self.steps):
            if step.kind == "ev" and step.e in TERMINAL and step.d["reply"] == reply:
                return {"e": step.e, **step.d}
        return None

    def status(self, reply: str) -> str | None:
        """Return the status that the device shows for a reply, from snapshot or events."""
        for step in reversed(self.steps):
            if step.kind == "ev" and step.e in TERMINAL and step.d["reply"] == reply:
                return step.e.removeprefix("reply.")
            if step.kind == "snap":
                found = [m for m in step.state.get("messages", []) if m["id"] == reply]
                if found and found[0]["status"] in {"completed", "failed", "cancelled"}:
                    return str(found[0]["status"])
        return None

    async def until_ended(self, reply: str, *, timeout_s: float = 30) -> str:
        """Wait for a reply's end; return its status."""
        await self.until(lambda: self.status(reply) is not None, timeout_s=timeout_s)
        status = self.status(reply)
        assert status is not None
        return status

    def visible(self, reply: str) -> str:
        """Return the visible text that the device shows of a reply."""
        return self.shown.visible(reply)

    # -- asking --------------------------------------------------------------------------------------------------

    async def ask(self, *, timeout_s: float = 30, **frame: Any) -> Frame:
        """Send a request and repeat it on each new connection until it is answered. Raises `Refused`."""
        async with asyncio.timeout(timeout_s):
            while True:
                if self.stopped is not None:
                    raise self.stopped
                socket = self._socket
                if socket is None:
                    await self._next_change()
                    continue
                id_ = next(self._ids)
                answer = self._answers[id_] = asyncio.get_running_loop().create_future()
                try:
                    await socket.send(orjson.dumps({**frame, "id": id_}).decode())
                    done = await answer
                except (ConnectionClosed, ConnectionError):
                    # The reader of this connection has yet to hear of it.
                    await asyncio.sleep(0.005)
                    continue
                finally:
                    self._answers.pop(id_, None)
                if done["t"] == "ok":
                    return dict(done)
                if done["retry"] == "never":
                    raise Refused(done["code"], done["msg"])
                await asyncio.sleep(min(done.get("retry_after_ms", 100), 500) / 1000)

    async def send(self, text: str, *, cid: UUID | None = None, timeout_s: float = 30, **fields: Any) -> Frame:
        """Send a message; the same `cid` goes out again until the server has acknowledged it."""
        return await self.ask(
            t="chat.send", ch=self.channel, cid=str(cid or uuid4()), parts=[{"type": "text", "text": text}],
            timeout_s=timeout_s, **fields,
        )  # fmt: skip

    async def cancel(self, reply: str) -> Frame:
        """Stop a reply."""
        return await self.ask(t="reply.cancel", reply=reply)

    async def _next_change(self) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self._changed.wait()

    # -- the connection ------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        failures = 0
        lost_at: float | None = None
        while True:
            servers = self._servers()
            if servers:
                url = servers[self._choose.randrange(len(servers))]
                welcomed = False
                try:
                    welcomed = await self._follow(url, lost_at)
                except (OSError, InvalidHandshake, InvalidMessage, ConnectionClosed, TimeoutError, EOFError):
                    pass
                except Stopped as stop:
                    self.stopped = stop
                    self._changed.set()
                    return
                finally:
                    self._socket = None
                    self._fail_answers()
                if welcomed:
                    failures, lost_at = 0, time.monotonic()
            failures += 1
            # Full jitter, as the protocol has it, on a smaller scale.
            await asyncio.sleep(self._choose.random() * self._retry_s * min(2**failures, 8))

    async def _follow(self, url: str, lost_at: float | None) -> bool:
        """Serve one connection to its end. Returns whether it got as far as being welcomed."""
        self.dials += 1
        async with asyncio.timeout(_WELCOME_S):
            socket = await connect(
                url, subprotocols=[Subprotocol("parley.v1")], compression=None, max_size=None, max_queue=None,
                ping_interval=None, close_timeout=0.5, open_timeout=_WELCOME_S,
            )  # fmt: skip
        number = self.connections = self.connections + 1
        self._parts, self._heads = {}, None
        self._open_snapshot = None
        sub: Frame = {"ch": self.channel}
        if self.last is not None:
            sub["since"] = {"ep": self.epoch, "seq": self.last}
        self._asked = "hello"
        try:
            await socket.send(
                orjson.dumps({"t": "hello", "v": 1, "auth": {"token": self._token}, "subs": [sub]}).decode()
            )
            async with asyncio.timeout(_WELCOME_S):
                first = orjson.loads(await socket.recv())
            self._note(first, number)
            if first["t"] != "welcome":
                await self._closing(socket)
                return False
            self._socket = socket
            self._changed.set()
            while True:
                frame = orjson.loads(await self._next(socket))
                for one in frame["f"] if frame["t"] == "batch" else [frame]:
                    self._note(one, number)
                    await self._take(one, number, socket)
                    if one["t"] == "live" and lost_at is not None:
                        self.resumed_s.append(time.monotonic() - lost_at)
                        lost_at = None
        except ConnectionClosed:
            self.codes.append(socket.close_code or 1006)
            if socket.close_code in _STOP_CODES and socket.close_code not in {4401, 4408, 4429}:
                raise Stopped(f"closed with {socket.close_code} {socket.close_reason}") from None
            return self._socket is not None
        finally:
            socket.transport.abort()

    async def _next(self, socket: ClientConnection) -> str | bytes:
        """Return the next frame. When nothing comes, look whether the far end lives and whether something was lost."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._stall_s):
                    return await socket.recv()
            try:
                async with asyncio.timeout(self._stall_s):
                    await (await socket.ping())
            except TimeoutError:
                raise ConnectionClosedError(None, None) from None
            if self._heads is not None and self.last is not None and self._heads > self.last:
                self._heads = None
                await self._subscribe(socket)

    async def _closing(self, socket: ClientConnection) -> None:
        """Read to the end of a connection that was refused."""
        with suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(2):
                while True:
                    await socket.recv()
        self.codes.append(socket.close_code or 1006)
        if socket.close_code in {4400, 4403, 4406, 4409}:
            raise Stopped(f"refused with {socket.close_code}")

    def _note(self, frame: Frame, number: int) -> None:
        self.received.append(Received(frame, number, time.monotonic()))
        self.on_frame(frame)

    def _fail_answers(self) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the connection is gone"))
                answer.exception()
        self._changed.set()

    async def _subscribe(self, socket: ClientConnection, *, anew: bool = False) -> None:
        """Ask again; not while an answer is on its way."""
        if self._asked is not None and not anew:
            return
        self._asked = next(self._ids)
        frame: Frame = {"t": "sub", "id": self._asked, "ch": self.channel}
        if self.last is not None and not anew:
            frame["since"] = {"ep": self.epoch, "seq": self.last}
        await socket.send(orjson.dumps(frame).decode())

    # -- the client rule -----------------------------------------------------------------------------------------

    async def _take(self, frame: Frame, number: int, socket: ClientConnection) -> None:
        match frame["t"]:
            case "ok" | "err":
                await self._answered(frame, socket)
            case "subbed" if frame["ch"] == self.channel:
                self._asked = None
                self._open_snapshot = None
                if frame["recovered"]:
                    self.epoch = frame["ep"]
            case "snap" if frame["ch"] == self.channel:
                self._snapshot(frame, number)
            case "ev" if frame["ch"] == self.channel:
                await self._event(frame, number, socket)
            case "hb":
                head = frame["heads"].get(self.channel)
                if head is not None:
                    self._heads = head
                await socket.send(orjson.dumps({"t": "hb", "a": self._positions()}).decode())
            case "unsubbed" if frame["ch"] == self.channel:
                self.unsubbed = frame
        now = time.monotonic()
        if self._acks and self.last is not None and (self.last - self._acked[0] > 200 or now - self._acked[1] > 0.5):
            self._acked = (self.last, now)
            await socket.send(orjson.dumps({"t": "ack", "a": self._positions()}).decode())
        self._changed.set()

    def _positions(self) -> dict[str, int]:
        return {} if self.last is None else {self.channel: self.last}

    async def _answered(self, frame: Frame, socket: ClientConnection) -> None:
        answer = self._answers.get(frame.get("id", -1))
        if answer is not None:
            if not answer.done():
                answer.set_result(frame)
        elif frame["t"] == "err" and frame.get("ch") == self.channel and frame.get("id", "hello") == self._asked:
            self._asked = None
            if frame["retry"] == "never":
                raise Stopped(f"subscription refused: {frame['code']}")
            await asyncio.sleep(0.1)
            await self._subscribe(socket)

    def _snapshot(self, frame: Frame, number: int) -> None:
        if frame["part"] == 0:
            self._open_snapshot = {key: list(v) if isinstance(v, list) else v for key, v in frame["state"].items()}
        elif self._open_snapshot is not None:
            for key, value in frame["state"].items():
                if isinstance(value, list):
                    self._open_snapshot[key] += value
        if frame["more"] or self._open_snapshot is None:
            return
        state, self._open_snapshot = self._open_snapshot, None
        self.epoch, self.last = frame["ep"], frame["seq"]
        self.steps.append(
            Step("snap", frame["ep"], frame["seq"], frame["seq"], state=state, connection=number, at=time.monotonic())
        )
        self.shown = Shown()
        for message in state.get("messages", []):
            self.shown.adopt(message)

    async def _event(self, frame: Frame, number: int, socket: ClientConnection) -> None:
        seq: int = frame["seq"]
        lo: int = frame.get("from", seq)
        if self.last is None or self.epoch is None:
            return
        if seq <= self.last:
            return
        if lo > self.last + 1:
            self.gaps += 1
            await self._subscribe(socket)
            return
        self.steps.append(
            Step("ev", self.epoch, lo, seq, frame["e"], frame["d"], connection=number, at=time.monotonic())
        )
        self.last = seq
        if not self.shown.fold(frame["e"], frame["d"]):
            self.integrity_failures += 1
            self.last = None
            await self._subscribe(socket, anew=True)


def _nothing(frame: Frame) -> None:
    pass
