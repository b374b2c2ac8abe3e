"""One connection of `parley.v1`: a task that reads frames and a task that is the only one to write.

Memory is bounded: there is no queue of events, only a cursor per channel; answers wait in a short queue, and reading
pauses while it is full.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any

from starlette.types import Receive, Send

from parley.core import clock
from parley.core.error_handlers import category, translate
from parley.core.errors import AppError
from parley.core.scope import Credential
from parley.realtime import frames
from parley.realtime.channels import ChannelNotFound, Snapshot
from parley.realtime.cursor import Cursor
from parley.realtime.events import LoggedEvent
from parley.realtime.flow import Bucket, Closing, Subscription
from parley.realtime.frames import BadFrame, Close
from parley.realtime.log import Head
from parley.realtime.service import Realtime

logger = logging.getLogger(__name__)

_QUEUED_ANSWERS = 256
_QUEUED_BYTES = 256 * 1024
_LAST_WORDS_S = 1.0
_TURN_BYTES = 32 * 1024
_CHECK_S = 5.0


class Connection:
    """A client that has said `hello`."""

    def __init__(self, realtime: Realtime, credential: Credential, receive: Receive, send: Send, *, id: str) -> None:
        self.id = id
        self.scope = credential.scope
        self._realtime = realtime
        self._settings = realtime.settings
        self._expires_at = credential.expires_at
        self._receive = receive
        self._send = send
        self._answers: deque[str] = deque()
        self._answer_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._wake = asyncio.Event()
        self._subscriptions: dict[str, Subscription] = {}
        self._bad_frames = 0
        self._requests = Bucket(self._settings.frames_per_s, self._settings.frames_burst)
        self._signals = Bucket(self._settings.frames_per_s * 10, self._settings.frames_burst * 10)
        self._dropped = 0
        self._heard = self._acked = time.monotonic()
        self._heartbeat_at = self._heard + self._settings.heartbeat_s
        self._told_expiring = False
        self._batches = False
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[Closing] = asyncio.get_running_loop().create_future()

    async def run(self, hello: frames.Hello) -> Closing:
        """Serve until either side is done. Returns how it ended."""
        self._batches = "batch" in hello.caps
        self._queue(self._welcome())
        reader = asyncio.create_task(self._read(hello), name=f"socket-in-{self.id}")
        writer = asyncio.create_task(self._write(), name=f"socket-out-{self.id}")
        self._tick()
        try:
            closing = await self._ended
        finally:
            if self._timer:
                self._timer.cancel()
            reader.cancel()
            await asyncio.wait({reader})
            for subscription in self._subscriptions.values():
                subscription.cursor.close()
            self._subscriptions.clear()
            # What was answered before the end is still sent, if the client takes it.
            self._wake.set()
            await asyncio.wait({writer}, timeout=_LAST_WORDS_S)
            writer.cancel()
            await asyncio.wait({writer})
        return closing

    def wake(self) -> None:
        """Something is to be written."""
        self._wake.set()

    def end(self, code: int, reason: str = "") -> None:
        """End the connection; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(Closing(code, reason))

    # -- reading -------------------------------------------------------------------------------------------------

    async def _read(self, hello: frames.Hello) -> None:
        try:
            for wanted in hello.subs:
                await self._answer_to(frames.Sub(t="sub", id="hello", ch=wanted.ch, since=wanted.since), greeting=True)
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
        await self._say(frames.error("bad_frame", bad.reason, id=bad.id))
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
                    await self._say(
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

    async def _answer_to(
        self,
        frame: frames.Sub | frames.Unsub | frames.Renew | frames.ChatSend | frames.ReplyCancel,
        *,
        greeting: bool = False,
    ) -> None:
        """Do what a frame asks and say how it went; whatever fails is this frame's error and not the connection's."""
        id_ = None if greeting else frame.id
        channel = getattr(frame, "ch", None)
        try:
            match frame:
                case frames.Sub():
                    await self._subscribe(frame, id_)
                case frames.Unsub():
                    self._unsubscribe(frame)
                    await self._say(frames.encode(t="ok", id=frame.id))
                case frames.Renew():
                    await self._renew(frame)
                case _:
                    result = await self._realtime.handlers[frame.t](self.scope, frame)
                    await self._say(frames.encode(t="ok", id=frame.id, **result))
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
                await self._say(frames.error(own, known.detail, retry="never", id=id_, ch=channel))
                raise Closing(Close.UNAUTHENTICATED, "unauthenticated") from None
            await self._say(frames.error(own, known.detail, retry=retry, id=id_, ch=channel, retry_after_ms=after))

    async def _subscribe(self, frame: frames.Sub, id: int | str | None) -> None:
        held = self._subscriptions.get(frame.ch)
        if held is None and len(self._subscriptions) >= self._settings.subscriptions:
            await self._say(frames.error("limit_subs", "Too many subscriptions.", id=id, ch=frame.ch))
            return
        # The name is kept as the client wrote it; a channel that is subscribed again starts anew.
        if held is not None:
            self._drop(frame.ch)
        cursor = self._realtime.cursor(self.scope, self.wake)
        head, why, snapshot = await cursor.open(frame.ch, frame.since)
        answer: dict[str, Any] = {"t": "subbed"}
        if id is not None:
            answer["id"] = id
        await self._say(
            frames.encode(
                **answer, ch=cursor.channel.name, ep=head.epoch, head=head.seq, floor=head.floor, mode=cursor.mode,
                recovered=why == "ok", why=why,
            )
        )  # fmt: skip
        subscription = Subscription(cursor)
        if snapshot is not None:
            await self._say_snapshot(subscription, snapshot)
        self._subscriptions[frame.ch] = subscription
        self.wake()

    async def _say_snapshot(self, subscription: Subscription, snapshot: Snapshot) -> None:
        size = 0
        for text in snapshot.frames(subscription.cursor.channel):
            size += len(text)
            await self._say(text)
        subscription.sent(snapshot.head.seq, size)

    def _unsubscribe(self, frame: frames.Unsub) -> None:
        if frame.ch not in self._subscriptions:
            raise ChannelNotFound
        self._drop(frame.ch)

    def _drop(self, name: str) -> None:
        self._subscriptions.pop(name).cursor.close()

    async def _renew(self, frame: frames.Renew) -> None:
        credential = await self._realtime.authenticate(frame.auth)
        if (credential.scope.user_id, credential.scope.workspace_id) != (self.scope.user_id, self.scope.workspace_id):
            raise Closing(Close.FORBIDDEN, "another user or workspace")
        self.scope = credential.scope
        self._expires_at = credential.expires_at
        self._told_expiring = False
        await self._say(frames.encode(t="ok", id=frame.id, expires_at=int(self._expires_at)))

    def _acknowledge(self, positions: dict[str, int]) -> None:
        for name, seq in positions.items():
            subscription = self._subscriptions.get(name)
            if subscription is not None and subscription.acked(seq):
                self._acked = time.monotonic()
        self.wake()

    # -- writing -------------------------------------------------------------------------------------------------

    def _welcome(self) -> str:
        settings = self._settings
        limits = {"frame": settings.frame_bytes, "subs": settings.subscriptions, "rate": settings.frames_per_s}
        return frames.encode(
            t="welcome", v=frames.VERSION, conn=self.id, user=str(self.scope.user_id),
            workspace=str(self.scope.workspace_id), hb=int(settings.heartbeat_s) or 1,
            expires_at=int(self._expires_at), limits=limits, durable=True, now=int(clock.timestamp()),
        )  # fmt: skip

    async def _say(self, text: str) -> None:
        while len(self._answers) >= _QUEUED_ANSWERS or self._answer_bytes > _QUEUED_BYTES:
            self._room.clear()
            await self._room.wait()
        self._queue(text)

    async def _put(self, text: str) -> None:
        await self._send({"type": "websocket.send", "text": text})

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._write_answers()
                if self._ended.done():
                    return
                for name, subscription in list(self._subscriptions.items()):
                    await self._write_events(name, subscription)
        except (OSError, RuntimeError) as error:
            # The peer is gone: the reader hears of it as a disconnect.
            logger.debug("socket write failed", extra={"cause": type(error).__name__})
        except AppError as error:
            self.end(Close.RETRY, error.code)
        except Exception:
            logger.exception("socket writer failed")
            self.end(Close.SERVER_ERROR, "internal")

    async def _write_answers(self) -> None:
        while self._answers:
            text = self._answers.popleft()
            self._answer_bytes -= len(text)
            await self._put(text)
            self._room.set()

    async def _write_events(self, name: str, subscription: Subscription) -> None:
        cursor = subscription.cursor
        if self._subscriptions.get(name) is not subscription:
            return
        if cursor.lost:
            await self._recover(name)
            return
        budget = _TURN_BYTES
        while cursor.is_behind and budget > 0:
            if self._unacked() > self._settings.ack_window_bytes:
                return
            if cursor.head - cursor.seq > self._settings.lag_events:
                # Straight to the socket: the queue of answers is emptied by this very task.
                snapshot = await cursor.renew()
                for text in snapshot.frames(cursor.channel):
                    subscription.sent(snapshot.head.seq, len(text))
                    await self._put(text)
                subscription.live_sent = False
                break
            budget -= await self._write_some(subscription, await cursor.read())
            if cursor.lost:
                break
        if not subscription.live_sent and cursor.seq >= cursor.live_after and not cursor.lost:
            subscription.live_sent = True
            await self._put(frames.encode(t="live", ch=cursor.channel.name, seq=cursor.seq))
        if cursor.is_behind or cursor.lost:
            self._wake.set()

    async def _write_some(self, subscription: Subscription, events: list[LoggedEvent]) -> int:
        """Send events; return how many bytes that was."""
        texts: list[str] = []
        size = total = 0
        for event in events:
            text = event.frame(subscription.cursor.channel)
            subscription.sent(event.seq, len(text))
            if not self._batches:
                await self._put(text)
            else:
                texts.append(text)
                size += len(text)
                if size > _TURN_BYTES:
                    await self._put(frames.batch(texts))
                    texts, size = [], 0
            total += len(text)
        if texts:
            await self._put(frames.batch(texts))
        return total

    async def _recover(self, name: str) -> None:
        """The channel's positions no longer hold: give its state anew, or say that it is gone."""
        self._drop(name)
        cursor = self._realtime.cursor(self.scope, self.wake)
        try:
            head, _, snapshot = await cursor.open(name, None)
        except ChannelNotFound:
            await self._put(frames.encode(t="unsubbed", ch=name, code="not_found", retry="never"))
            return
        anew = Subscription(cursor)
        await self._put(_subbed_again(cursor, head))
        assert snapshot is not None
        for text in snapshot.frames(cursor.channel):
            await self._put(text)
        self._subscriptions[name] = anew
        self._wake.set()

    def _unacked(self) -> int:
        return sum(subscription.unacked for subscription in self._subscriptions.values())

    # -- time ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        left = self._expires_at - clock.timestamp()
        # Seldom, since there may be ten thousand of these; often enough for the next thing that has a time.
        settings = self._settings
        due = (_CHECK_S, self._heartbeat_at - now, left, settings.silence_timeout_s / 4, settings.ack_timeout_s / 4)
        pause = max(min(due), 0.05)
        self._timer = asyncio.get_running_loop().call_later(pause, self._tick)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self._settings.heartbeat_s
            heads = {s.cursor.channel.name: s.cursor.head for s in self._subscriptions.values()}
            self._remind(frames.encode(t="hb", ts=clock.milliseconds(), heads=heads))
        if now - self._heard > self._settings.silence_timeout_s:
            self.end(Close.HEARTBEAT_TIMEOUT, "no frame in time")
        unacked = self._unacked()
        if unacked <= self._settings.ack_window_bytes:
            self._acked = now
        elif now - self._acked > self._settings.ack_timeout_s:
            self.end(Close.SLOW_CONSUMER, "no acknowledgement in time")
        if left <= 0:
            self.end(Close.EXPIRED, "credential expired")
        elif left <= 60 and not self._told_expiring:
            self._told_expiring = True
            self._remind(frames.encode(t="auth.expiring", at=int(self._expires_at)))

    def _queue(self, text: str) -> None:
        self._answers.append(text)
        self._answer_bytes += len(text)
        self._wake.set()

    def _remind(self, text: str) -> None:
        """Queue a frame that may be left out: whoever does not read needs no heartbeat."""
        if len(self._answers) < _QUEUED_ANSWERS:
            self._queue(text)


def _subbed_again(cursor: Cursor, head: Head) -> str:
    return frames.encode(
        t="subbed", ch=cursor.channel.name, ep=head.epoch, head=head.seq, floor=head.floor, mode=cursor.mode,
        recovered=False, why="epoch",
    )  # fmt: skip
