"""One connection, bare: it sends what it is told to and keeps every frame. It hides nothing and mends nothing."""

import asyncio
import time
from collections import deque
from itertools import count
from typing import Any

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Subprotocol

from parley.conformance.errors import Failed, Skipped, require
from parley.conformance.transcript import Frame, Transcript

SUBPROTOCOL = "parley.v1"
_LONGEST_WAIT_MS = 5_000


def not_now(answer: Frame) -> None:
    """Raise `Skipped` where the server says that it is too much just now: that says nothing about the rest."""
    if answer.get("code") == "rate_limited":
        wait_s = answer.get("retry_after_ms", 0) / 1000
        raise Skipped(f"the server takes no more of this account for {wait_s:.0f} s: wait, or raise its limits")


class Closed(Failed):
    """The server closed the connection while something was to come."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Peer:
    """A connection. Frames that were set aside while an answer was awaited are read next."""

    def __init__(self, socket: ClientConnection, transcript: Transcript, *, name: str, patience_s: float) -> None:
        self.socket = socket
        self.name = name
        self.welcome: Frame = {}
        self._transcript = transcript
        self._patience_s = patience_s
        self._aside: deque[Frame] = deque()
        self._ids = count(1)

    @classmethod
    async def open(
        cls,
        url: str,
        transcript: Transcript,
        *,
        name: str,
        patience_s: float,
        subprotocols: list[str] | None = None,
    ) -> "Peer":
        """Open a connection; nothing is said yet. `subprotocols` of `[]` offers none."""
        offered = [SUBPROTOCOL] if subprotocols is None else subprotocols
        transcript.sent(name, f"GET {url.partition('?')[0]} Sec-WebSocket-Protocol: {', '.join(offered) or '(none)'}")
        try:
            socket = await connect(
                url,
                subprotocols=[Subprotocol(one) for one in offered] or None,
                compression=None,
                max_size=None,
                max_queue=None,
                ping_interval=None,
                close_timeout=1,
                open_timeout=patience_s,
                user_agent_header="parley-conformance",
            )
        except (InvalidHandshake, OSError, TimeoutError) as error:
            raise Failed(f"no socket could be opened: {error}") from None
        return cls(socket, transcript, name=name, patience_s=patience_s)

    # -- saying --------------------------------------------------------------------------------------------------

    async def send(self, t: str, **fields: Any) -> None:
        """Send a frame."""
        await self._put({"t": t, **fields}, orjson.dumps({"t": t, **fields}).decode())

    async def send_text(self, text: str) -> None:
        """Send text as it is."""
        await self._put(text, text)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame."""
        await self._put(data, data)

    async def _put(self, shown: str | bytes | Frame, data: str | bytes) -> None:
        self._transcript.sent(self.name, shown)
        try:
            await self.socket.send(data)
        except ConnectionClosed as error:
            raise self._closed(error, "a frame was being sent") from None

    def next_id(self) -> int:
        """Return an id for a request."""
        return next(self._ids)

    # -- hearing -------------------------------------------------------------------------------------------------

    async def receive(self, what: str, *, within_s: float | None = None) -> Frame:
        """Return the next frame; `what` says what is awaited."""
        if self._aside:
            return self._aside.popleft()
        return await self._next(what, within_s=within_s)

    async def _next(self, what: str, *, within_s: float | None) -> Frame:
        patience_s = self._patience_s if within_s is None else within_s
        try:
            async with asyncio.timeout(patience_s):
                data = await self.socket.recv()
        except TimeoutError:
            raise Failed(f"{what} did not come within {patience_s:g} s") from None
        except ConnectionClosed as error:
            raise self._closed(error, f"{what} was to come") from None
        self._transcript.received(self.name, data)
        require(isinstance(data, str), "the server sent a binary frame", data)
        try:
            frame = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise Failed("the server sent a frame that is not JSON", data) from None
        require(isinstance(frame, dict) and isinstance(frame.get("t"), str), "a frame is an object with `t`", frame)
        if frame["t"] == "batch":
            raise Failed("the server sent a `batch` to a client that did not say that it takes them", frame)
        return dict(frame)

    async def until(self, t: str, what: str | None = None, *, within_s: float | None = None) -> Frame:
        """Return the next frame of a type; those before it are dropped."""
        what = what or f"`{t}`"
        ends = time.monotonic() + (self._patience_s if within_s is None else within_s)
        while True:
            frame = await self.receive(what, within_s=max(ends - time.monotonic(), 0.001))
            if frame["t"] == t:
                return frame

    async def request(self, t: str, **fields: Any) -> Frame:
        """Send a request and return its `ok`, `err` or `subbed`; what else comes meanwhile is set aside."""
        id_ = fields.pop("id", None) or self.next_id()
        await self.send(t, id=id_, **fields)
        return await self.answer(id_)

    async def answer(self, id: int | str) -> Frame:
        """Return the answer to a request that was sent."""
        passed: list[Frame] = []
        try:
            while True:
                frame = await self.receive(f"the answer to request {id!r}")
                if frame["t"] in {"ok", "err", "subbed"} and frame.get("id") == id:
                    return frame
                passed.append(frame)
        finally:
            self._aside.extendleft(reversed(passed))

    async def ask(self, t: str, **fields: Any) -> Frame:
        """Send a request that must succeed, and return its answer. One that is asked to wait a little is repeated."""
        answer = await self.request(t, **fields)
        if answer.get("code") == "rate_limited" and (wait_ms := answer.get("retry_after_ms", 0)) <= _LONGEST_WAIT_MS:
            await asyncio.sleep(wait_ms / 1000)
            answer = await self.request(t, **fields)
        not_now(answer)
        require(answer["t"] != "err", f"`{t}` was answered with `{answer.get('code')}`: {answer.get('msg')}", answer)
        return answer

    async def refused(self, code: str, t: str, **fields: Any) -> Frame:
        """Send a request that must be refused with a code, and return the `err`."""
        answer = await self.request(t, **fields)
        require(answer["t"] == "err", f"`{t}` must be refused with `{code}` and was taken", answer)
        not_now(answer)
        given = answer.get("code")
        require(given == code, f"`{t}` must be refused with `{code}` and was with `{given}`", answer)
        return answer

    async def hears(self, *, for_s: float) -> list[Frame]:
        """Return what comes within a time."""
        heard = list(self._aside)
        self._aside.clear()
        ends = time.monotonic() + for_s
        while (left := ends - time.monotonic()) > 0:
            try:
                heard.append(await self._next("", within_s=left))
            except Closed:
                raise
            except Failed as nothing:
                if nothing.frames:
                    raise
        return heard

    async def alive(self) -> None:
        """See that the connection still answers."""
        answer = await self.request("unsub", ch="conversation:00000000-0000-4000-8000-000000000000")
        require(answer["t"] == "err", "an `unsub` of a channel that is not subscribed is answered with `err`", answer)

    # -- the end -------------------------------------------------------------------------------------------------

    async def ends_with(self, code: int, what: str, *, within_s: float | None = None) -> list[Frame]:
        """Wait for the server to close with a code, and return what it said before."""
        said: list[Frame] = []
        ends = time.monotonic() + (self._patience_s if within_s is None else within_s)
        try:
            while True:
                said.append(await self.receive(f"the close with {code}", within_s=max(ends - time.monotonic(), 0.001)))
        except Closed as closed:
            require(closed.code == code, f"{what} must close with {code}; it closed with {closed.code}", *said[-3:])
            return said
        except Failed as failed:
            raise Failed(f"{what} must close with {code}; {failed.reason}", *said[-3:]) from None

    def _closed(self, error: ConnectionClosed, what: str) -> Closed:
        code = error.rcvd.code if error.rcvd else 1006
        reason = error.rcvd.reason if error.rcvd else "no close frame"
        self._transcript.received(self.name, f"close {code} {reason}")
        return Closed(code, f"the server closed with {code} ({reason}) while {what}")

    def cut(self) -> None:
        """Cut the connection without a word."""
        self._transcript.sent(self.name, "(cut)")
        self.socket.transport.abort()

    async def close(self) -> None:
        """Leave."""
        await self.socket.close()
