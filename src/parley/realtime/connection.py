"""One connection of `parley.v1`: what the client sends, and the times that a connection has.

One task reads frames, another is the only one to write (`outgoing.py`). Memory is bounded: reading pauses while the
client leaves its answers untaken.
"""

import asyncio
import logging
import random
import time
from typing import Any, Protocol

from starlette.types import Receive, Send

from parley.core import clock
from parley.core.error_handlers import category, translate
from parley.core.errors import AppError
from parley.core.scope import Credential, Scope
from parley.realtime import frames
from parley.realtime.admission import Turn
from parley.realtime.channels import ChannelNotFound
from parley.realtime.flow import Bucket, Closing, Subscription
from parley.realtime.frames import BadFrame, Close
from parley.realtime.outgoing import Outgoing
from parley.realtime.service import Realtime

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0
_CHECK_S = 5.0
_EXPIRING_S = 60.0


class Request(Protocol):
    """A frame that is answered."""

    @property
    def t(self) -> str:
        """Its type."""
        ...

    @property
    def id(self) -> int | str:
        """What the answer repeats."""
        ...


class Connection:
    """A client that has said `hello`. `turn` is its right to be let in, given back when it has what it asked for."""

    def __init__(
        self, realtime: Realtime, credential: Credential, receive: Receive, send: Send, *, id: str, turn: Turn
    ) -> None:
        self.id = id
        self.scope = credential.scope
        self._realtime = realtime
        self._settings = realtime.settings
        self._expires_at = credential.expires_at
        self._receive = receive
        self._send = send
        self._turn = turn
        self._bad_frames = 0
        self._requests = Bucket(self._settings.frames_per_s, self._settings.frames_burst)
        self._signals = Bucket(self._settings.frames_per_s * 10, self._settings.frames_burst * 10)
        self._dropped = 0
        self._heard = self._acked = time.monotonic()
        # Those who came together after a restart are not to beat together for ever.
        first = random.uniform(0, self._settings.heartbeat_s)
        self._heartbeat_at = self._heard + first
        self._told_expiring = False
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[Closing] = asyncio.get_running_loop().create_future()

    async def run(self, hello: frames.Hello) -> Closing:
        """Serve until either side is done. Returns how it ended."""
        self._out = Outgoing(
            self._realtime, self._send, scope=self._current_scope, end=self.end, full=self._turn.release,
            batches="batch" in hello.caps,
        )  # fmt: skip
        self._out.queue(self._welcome())
        reader = asyncio.create_task(self._read(hello), name=f"socket-in-{self.id}")
        writer = asyncio.create_task(self._out.write(), name=f"socket-out-{self.id}")
        self._tick()
        try:
            closing = await self._ended
        finally:
            if self._timer:
                self._timer.cancel()
            reader.cancel()
            await asyncio.wait({reader})
            self._out.close()
            await asyncio.wait({writer}, timeout=_LAST_WORDS_S)
            writer.cancel()
            await asyncio.wait({writer})
        return closing

    def end(self, code: int, reason: str = "") -> None:
        """End the connection; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(Closing(code, reason))

    def say_goaway(self, reason: str, *, reconnect_after_ms: int, deadline_ms: int) -> None:
        """Ask the client to open another connection and leave this one."""
        self._out.queue(
            frames.encode(t="goaway", reason=reason, reconnect_after_ms=reconnect_after_ms, deadline_ms=deadline_ms)
        )

    def _current_scope(self) -> Scope:
        return self.scope

    # -- reading -------------------------------------------------------------------------------------------------

    async def _read(self, hello: frames.Hello) -> None:
        try:
            for wanted in hello.subs:
                await self._answer_to(frames.Sub(t="sub", id="hello", ch=wanted.ch, since=wanted.since), greeting=True)
            self._turn.release()
            while True:
                await self._read_frame()
        except Closing as closing:
            self.end(closing.code, closing.reason)
        except Exception:
            logger.exception("socket reader failed")
            self.end(Close.SERVER_ERROR, "internal")

    async def _read_frame(self) -> None:
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            raise Closing(message.get("code") or Close.NORMAL, "client")
        text = message.get("text")
        if text is None:
            raise Closing(Close.BINARY, "binary frames are not taken")
        limit = self._settings.frame_bytes
        if len(text) > limit or len(text.encode("utf-8", "replace")) > limit:
            raise Closing(Close.TOO_BIG, "frame too large")
        self._heard = time.monotonic()
        try:
            frame = frames.parse(text)
        except BadFrame as bad:
            await self._reject(bad)
        else:
            await self._take(frame)

    async def _reject(self, bad: BadFrame) -> None:
        self._bad_frames += 1
        await self._out.say(frames.error("bad_frame", bad.reason, id=bad.id))
        if self._bad_frames >= 3:
            raise Closing(Close.BAD_FRAMES, "too many bad frames")

    async def _take(self, frame: frames.ClientFrame) -> None:
        match frame:
            case frames.Ack():
                self._limit(self._signals, None)
                self._acknowledge(frame.a)
            case frames.Heartbeat():
                self._limit(self._signals, None)
                self._acknowledge(frame.a or {})
            case frames.Hello():
                raise Closing(Close.SECOND_HELLO, "second hello")
            case _:
                if wait := self._limit(self._requests, frame.id):
                    await self._out.say(
                        frames.error(
                            "rate_limited",
                            "Too many frames.",
                            retry="backoff",
                            id=frame.id,
                            retry_after_ms=int(wait * 1000) + 1,
                        )
                    )
                else:
                    await self._answer_to(frame)

    def _limit(self, bucket: Bucket, id: int | str | None) -> float:
        wait = bucket.take()
        # Every frame that is taken makes good one that was not: who keeps sending too much is found out.
        self._dropped = self._dropped + 1 if wait else max(self._dropped - 1, 0)
        if self._dropped > self._settings.frames_burst or (wait and id is None):
            raise Closing(Close.TOO_MANY, "too many frames")
        return wait

    async def _answer_to(self, frame: Request, *, greeting: bool = False) -> None:
        """Do what a frame asks and say how it went; whatever fails is this frame's error and not the connection's."""
        id_ = None if greeting else frame.id
        channel = getattr(frame, "ch", None)
        try:
            match frame:
                case frames.Sub():
                    await self._subscribe(frame, id_)
                case frames.Unsub():
                    self._unsubscribe(frame)
                    await self._out.say(frames.encode(t="ok", id=frame.id))
                case frames.Renew():
                    await self._renew(frame)
                case _:
                    result = await self._realtime.handlers[frame.t](self.scope, frame)
                    await self._out.say(frames.encode(t="ok", id=frame.id, **result))
        except Closing:
            raise
        except Exception as error:
            known = translate(error)
            if known is None:
                logger.exception("unexpected error in a frame")
                known = AppError()
            _, code, retry = category(known)
            own = known.frame_code or code
            after = None if known.retry_after_s is None else known.retry_after_s * 1000
            if own == "unauthenticated":
                await self._out.say(frames.error(own, known.detail, retry="never", id=id_, ch=channel))
                raise Closing(Close.UNAUTHENTICATED, "unauthenticated") from None
            await self._out.say(frames.error(own, known.detail, retry=retry, id=id_, ch=channel, retry_after_ms=after))

    async def _subscribe(self, frame: frames.Sub, id: int | str | None) -> None:
        subscriptions = self._out.subscriptions
        held = subscriptions.get(frame.ch)
        if held is None and len(subscriptions) >= self._settings.subscriptions:
            await self._out.say(frames.error("limit_subs", "Too many subscriptions.", id=id, ch=frame.ch))
            return
        # The name is kept as the client wrote it; a channel that is subscribed again starts anew.
        if held is not None:
            self._out.drop(frame.ch)
        cursor = self._realtime.cursor(self.scope, self._out.wake)
        head, why, snapshot = await cursor.open(frame.ch, frame.since)
        subscription = Subscription(cursor, max_hz=frame.max_hz)
        try:
            answer: dict[str, Any] = {"t": "subbed"}
            if id is not None:
                answer["id"] = id
            await self._out.say(
                frames.encode(
                    **answer, ch=cursor.channel.name, ep=head.epoch, head=head.seq, floor=head.floor, mode=cursor.mode,
                    recovered=why == "ok", why=why,
                )
            )  # fmt: skip
            if snapshot is not None:
                await self._out.say_snapshot(subscription, snapshot)
        except BaseException:
            # The connection ends while its client does not read: nobody else knows of this cursor yet.
            cursor.close()
            raise
        self._out.add(frame.ch, subscription)

    def _unsubscribe(self, frame: frames.Unsub) -> None:
        if frame.ch not in self._out.subscriptions:
            raise ChannelNotFound
        self._out.drop(frame.ch)

    async def _renew(self, frame: frames.Renew) -> None:
        credential = await self._realtime.authenticate(frame.auth)
        if (credential.scope.user_id, credential.scope.workspace_id) != (self.scope.user_id, self.scope.workspace_id):
            raise Closing(Close.FORBIDDEN, "another user or workspace")
        if credential.scope.permissions != self.scope.permissions:
            # What is subscribed was judged by the old ones.
            raise Closing(Close.RETRY, "rights changed")
        self.scope = credential.scope
        self._expires_at = credential.expires_at
        self._told_expiring = False
        self._realtime.look_again_after_news(self)
        await self._out.say(frames.encode(t="ok", id=frame.id, expires_at=int(self._expires_at)))

    def _acknowledge(self, positions: dict[str, int]) -> None:
        for name, seq in positions.items():
            if self._out.acknowledge(name, seq):
                self._acked = time.monotonic()

    # -- time ----------------------------------------------------------------------------------------------------

    def _welcome(self) -> str:
        settings = self._settings
        limits = {"frame": settings.frame_bytes, "subs": settings.subscriptions, "rate": settings.frames_per_s}
        return frames.encode(
            t="welcome", v=frames.VERSION, conn=self.id, user=str(self.scope.user_id),
            workspace=str(self.scope.workspace_id), hb=int(settings.heartbeat_s) or 1,
            expires_at=int(self._expires_at), limits=limits, durable=True, now=int(clock.timestamp()),
        )  # fmt: skip

    def _tick(self) -> None:
        now = time.monotonic()
        left = self._expires_at - clock.timestamp()
        settings = self._settings
        # Seldom, since there may be ten thousand of these; often enough for the next thing that has a time.
        due = (
            _CHECK_S, self._heartbeat_at - now, left if self._told_expiring else left - _EXPIRING_S,
            settings.silence_timeout_s / 4, settings.ack_timeout_s / 4, settings.send_timeout_s / 4,
        )  # fmt: skip
        self._timer = asyncio.get_running_loop().call_later(max(min(due), 0.05), self._tick)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + settings.heartbeat_s
            heads = {s.cursor.channel.name: s.cursor.head for s in self._out.subscriptions.values()}
            self._out.remind(frames.encode(t="hb", ts=clock.milliseconds(), heads=heads))
        if now - self._heard > settings.silence_timeout_s:
            self.end(Close.HEARTBEAT_TIMEOUT, "no frame in time")
        if self._out.blocked_s(now) > settings.send_timeout_s:
            self.end(Close.SLOW_CONSUMER, "does not read")
        if not self._out.is_paused:
            self._acked = now
        elif now - self._acked > settings.ack_timeout_s:
            self.end(Close.SLOW_CONSUMER, "no acknowledgement in time")
        if left <= 0:
            self.end(Close.EXPIRED, "credential expired")
        elif left <= _EXPIRING_S and not self._told_expiring:
            self._told_expiring = True
            self._out.remind(frames.encode(t="auth.expiring", at=int(self._expires_at)))
