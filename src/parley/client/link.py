"""One socket: frames in and out, acknowledgements, and the watch for silence. It is not reused after it ended."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, NegotiationError
from websockets.typing import Subprotocol

from parley.client.policy import ABNORMAL, GOAWAY, OVERLOADED, PROTOCOL_ERROR, TOO_MANY, UNAUTHENTICATED, Ending

logger = logging.getLogger(__name__)

Frame = dict[str, Any]

SUBPROTOCOL = Subprotocol("parley.v1")
_WRONG_SUBPROTOCOL = 4406
_FRAME_LIMIT = 64 * 1024 * 1024
_ACK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Timing:
    """The protocol's times, in seconds."""

    open_s: float = 10
    ack_s: float = 1
    silence_s: float = 45
    stall_s: float = 2


class LinkFailed(Exception):
    """The connection could not be made, or was refused before `welcome`."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason)
        self.ending = ending


class Link:
    """A connection that has been welcomed.

    `ended` resolves once, with how it ended; `goaway` when the server asks us to move, with the seconds to wait before
    (None: it did not say). Only its first `goaway` counts.
    """

    def __init__(self, socket: ClientConnection, welcome: Frame, timing: Timing) -> None:
        self.welcome = welcome
        self.asked_s: dict[int, float] = {}
        self._socket = socket
        self._timing = timing
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Ending] = self._loop.create_future()
        self.goaway: asyncio.Future[float | None] = self._loop.create_future()
        self._outbox: asyncio.Queue[str] = asyncio.Queue()
        self._positions: dict[str, int] = {}
        self._unacked_bytes = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._heard = self._loop.time()
        self._silent = False
        self._handle: Callable[[Frame], None] = _ignore
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str, hello: Frame, timing: Timing) -> "Link":
        """Connect, say `hello` and wait for `welcome`. Raises `LinkFailed`."""
        try:
            socket = await connect(
                url, subprotocols=[SUBPROTOCOL], compression=None, ping_interval=None, open_timeout=timing.open_s,
                close_timeout=1, max_size=_FRAME_LIMIT, logger=logger,
            )  # fmt: skip
        except InvalidStatus as error:
            after = error.response.headers.get("Retry-After") or ""
            seconds = float(after) if after.isdigit() else None
            raise LinkFailed(Ending(error.response.status_code, "the server refused the upgrade", seconds)) from error
        except NegotiationError as error:
            raise LinkFailed(Ending(_WRONG_SUBPROTOCOL, "the server does not speak parley.v1")) from error
        except InvalidURI as error:
            raise LinkFailed(Ending(400, str(error))) from error
        except (OSError, TimeoutError, EOFError, InvalidHandshake) as error:
            raise LinkFailed(Ending(ABNORMAL, f"no connection: {str(error) or type(error).__name__}")) from error
        try:
            return await cls._greet(socket, hello, timing)
        except BaseException:
            await socket.close()
            raise

    @classmethod
    async def _greet(cls, socket: ClientConnection, hello: Frame, timing: Timing) -> "Link":
        asked_s: dict[int, float] = {}
        try:
            async with asyncio.timeout(timing.open_s):
                await socket.send(encode(hello))
                while True:
                    frame = orjson.loads(await socket.recv(decode=False))
                    if frame["t"] == "welcome":
                        break
                    if frame.get("code") == "unauthenticated":
                        raise LinkFailed(Ending(UNAUTHENTICATED, frame.get("msg", "")))
                    _note(frame, asked_s)
        except ConnectionClosed:
            raise LinkFailed(_ending(socket, asked_s)) from None
        except TimeoutError:
            raise LinkFailed(Ending(ABNORMAL, "no welcome in time")) from None
        except (ValueError, KeyError, TypeError) as error:
            raise LinkFailed(Ending(PROTOCOL_ERROR, "the server's answer could not be read")) from error
        if socket.subprotocol != SUBPROTOCOL:
            raise LinkFailed(Ending(_WRONG_SUBPROTOCOL, "the server does not speak parley.v1"))
        return cls(socket, frame, timing)

    def start(self, handle: Callable[[Frame], None]) -> None:
        """Begin to read; `handle` is called with each frame, those of a `batch` one by one."""
        self._handle = handle
        self._reader = asyncio.create_task(self._read(), name="parley-reader")
        self._writer = asyncio.create_task(self._write(), name="parley-writer")
        self._heard = self._loop.time()
        self._silence_timer = self._loop.call_later(self._timing.silence_s, self._check_silence)

    def mute(self) -> None:
        """Hear nothing more: another connection has taken over."""
        self._handle = _ignore

    def send(self, frame: Frame) -> None:
        """Send a frame after those before it. After the end it goes nowhere."""
        if not self.ended.done():
            self._outbox.put_nowait(encode(frame))

    def abort(self) -> None:
        """Cut the TCP connection, as a network would."""
        self._socket.transport.abort()

    async def close(self) -> None:
        """Close with 1000 and wait until nothing of it is left. What still comes is not heard."""
        self.mute()
        self._cancel_timers()
        await _gone(self._writer)
        # The reader goes on: while nobody takes what a busy server sends, its answer to the close would not be seen.
        await self._socket.close()
        await _gone(self._reader)
        self._end(Ending(1000, "closed here"))

    # -- acknowledgements ----------------------------------------------------------------------------------------

    def processed(self, ch: str, seq: int) -> None:
        """Note how far a channel is processed: told within a second, and earlier when much was received."""
        self._positions[ch] = seq
        if self._unacked_bytes >= _ACK_BYTES:
            self.acknowledge()
        elif self._ack_timer is None:
            self._ack_timer = self._loop.call_later(self._timing.ack_s, self.acknowledge)

    def acknowledge(self) -> None:
        """Tell the positions now."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        positions, self._positions, self._unacked_bytes = self._positions, {}, 0
        if positions:
            self.send({"t": "ack", "a": positions})

    def answer_heartbeat(self, frame: Frame, positions: dict[str, int]) -> None:
        """Answer the server's heartbeat; the positions in it acknowledge everything."""
        self._positions = {}
        self.acknowledge()
        self.send({"t": "hb", "ts": frame.get("ts"), "a": positions})

    # -- tasks ---------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while True:
                raw = await self._socket.recv(decode=False)
                self._heard = self._loop.time()
                self._unacked_bytes += len(raw)
                self._take(orjson.loads(raw))
        except ConnectionClosed:
            self._end(_ending(self._socket, self.asked_s, silent=self._silent))
        except Exception:  # what the server sent, or what we did with it: the same again would end the same
            logger.exception("a frame of the server could not be read")
            self._end(Ending(PROTOCOL_ERROR, "a frame of the server could not be read"))
        finally:
            self._cancel_timers()
            if self._writer is not None:
                self._writer.cancel()

    def _take(self, frame: Frame) -> None:
        if frame["t"] == "batch":
            for inner in frame["f"]:
                self._take(inner)
            return
        _note(frame, self.asked_s)
        if frame["t"] == "goaway" and not self.goaway.done():
            self.goaway.set_result(self.asked_s.get(GOAWAY))
        self._handle(frame)

    async def _write(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                await self._socket.send(await self._outbox.get())

    def _check_silence(self) -> None:
        left = self._heard + self._timing.silence_s - self._loop.time()
        if left > 0:
            self._silence_timer = self._loop.call_later(left, self._check_silence)
            return
        self._silent = True
        self.abort()

    def _cancel_timers(self) -> None:
        for timer in (self._ack_timer, self._silence_timer):
            if timer is not None:
                timer.cancel()
        self._ack_timer = self._silence_timer = None

    def _end(self, ending: Ending) -> None:
        if not self.ended.done():
            self.ended.set_result(ending)


def encode(frame: Frame) -> str:
    """Return a frame as text; binary frames are not taken."""
    return orjson.dumps(frame).decode()


def _ignore(frame: Frame) -> None:
    pass


async def _gone(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _note(frame: Frame, asked_s: dict[int, float]) -> None:
    """Note how long the server asks us to stay away, by the close code that it goes with."""
    if frame["t"] == "goaway" and frame.get("reconnect_after_ms") is not None:
        asked_s.setdefault(GOAWAY, frame["reconnect_after_ms"] / 1000)
    elif frame["t"] == "err" and "ch" not in frame and frame.get("retry_after_ms") is not None:
        # Too many frames are told with the id of one of them; what is about a channel is about no connection.
        if frame.get("code") == "rate_limited":
            asked_s[TOO_MANY] = frame["retry_after_ms"] / 1000
        if frame.get("id") is None:
            asked_s[TOO_MANY] = asked_s[OVERLOADED] = frame["retry_after_ms"] / 1000


def _ending(socket: ClientConnection, asked_s: dict[int, float], *, silent: bool = False) -> Ending:
    code = socket.close_code or ABNORMAL
    reason = "nothing was heard" if silent else (socket.close_reason or "")
    return Ending(code, reason, asked_s.get(code))
