"""All that goes to one client, written by one task: answers first, then a turn for each channel that has moved.

There is no queue of events, only a cursor per channel. Answers wait in a short queue, and whoever would add to a full
one waits too.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from starlette.types import Send

from parley.core.errors import AppError
from parley.core.scope import Scope
from parley.realtime.channels import ChannelNotFound, Snapshot
from parley.realtime.cursor import Cursor
from parley.realtime.events import LoggedEvent, byte_length
from parley.realtime.flow import TURN_BYTES, Subscription
from parley.realtime.frames import Close, batch, encode
from parley.realtime.log import Head
from parley.realtime.service import Realtime

logger = logging.getLogger(__name__)

_QUEUED_ANSWERS = 256
_QUEUED_BYTES = 256 * 1024


class Outgoing:
    """The writing half of a connection. `full` is called when an answer has to wait for the client."""

    def __init__(
        self,
        realtime: Realtime,
        send: Send,
        *,
        scope: Callable[[], Scope],
        end: Callable[[int, str], None],
        full: Callable[[], None],
        batches: bool,
    ) -> None:
        self._realtime = realtime
        self._send = send
        self._scope = scope
        self._end = end
        self._full = full
        self._batches = batches
        self._answers: deque[str] = deque()
        self._answer_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._wake = asyncio.Event()
        self._sending_since: float | None = None
        self._closed = False
        self.subscriptions: dict[str, Subscription] = {}
        self.unacked = 0

    @property
    def buffered(self) -> int:
        """How many bytes wait here for the client."""
        return self._answer_bytes

    @property
    def is_paused(self) -> bool:
        """Whether events wait for the client to acknowledge those it was sent."""
        return self.unacked > self._realtime.settings.ack_window_bytes

    def blocked_s(self, now: float) -> float:
        """Return for how long the client has not taken what is being sent."""
        return 0.0 if self._sending_since is None else now - self._sending_since

    def wake(self) -> None:
        """Something is to be written."""
        self._wake.set()

    def close(self) -> None:
        """Write no more events; what was answered before is still sent, if the client takes it."""
        self._closed = True
        for name in list(self.subscriptions):
            self.drop(name)
        self._wake.set()

    # -- answers -------------------------------------------------------------------------------------------------

    async def say(self, text: str) -> None:
        """Queue an answer, once there is room for it."""
        while len(self._answers) >= _QUEUED_ANSWERS or self._answer_bytes > _QUEUED_BYTES:
            self._full()
            self._room.clear()
            await self._room.wait()
        self.queue(text)

    async def say_snapshot(self, subscription: Subscription, snapshot: Snapshot) -> None:
        """Queue a state, part by part."""
        for text in snapshot.frames(subscription.cursor.channel):
            self._count(subscription, snapshot.head.seq, byte_length(text))
            await self.say(text)

    def queue(self, text: str) -> None:
        """Queue a frame that must not wait."""
        self._answers.append(text)
        self._answer_bytes += len(text)
        self._wake.set()

    def remind(self, text: str) -> None:
        """Queue a frame that may be left out: whoever does not read needs no heartbeat."""
        if len(self._answers) < _QUEUED_ANSWERS:
            self.queue(text)

    # -- subscriptions -------------------------------------------------------------------------------------------

    def add(self, name: str, subscription: Subscription) -> None:
        """Begin to send a channel's events."""
        if name in self.subscriptions:
            # Its positions were lost and it was given anew while the client subscribed again.
            self.drop(name)
        self.subscriptions[name] = subscription
        subscription.held = True
        self.unacked += subscription.unacked
        self._wake.set()

    def drop(self, name: str) -> None:
        """Send no more of a channel."""
        subscription = self.subscriptions.pop(name)
        subscription.held = False
        self.unacked -= subscription.unacked
        subscription.cursor.close()

    def acknowledge(self, name: str, seq: int) -> bool:
        """Note what the client has processed; returns whether that was progress."""
        subscription = self.subscriptions.get(name)
        freed = subscription.acked(seq) if subscription is not None else 0
        self.unacked -= freed
        if freed:
            self._wake.set()
        return freed > 0

    # -- writing -------------------------------------------------------------------------------------------------

    async def write(self) -> None:
        """Send until the connection ends."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._write_answers()
                if self._closed:
                    return
                for name, subscription in list(self.subscriptions.items()):
                    await self._turn(name, subscription)
                    await self._write_answers()
        except (OSError, RuntimeError) as error:
            # The peer is gone. The reader hears of it too, unless it waits for room that this task would make.
            logger.debug("socket write failed", extra={"cause": type(error).__name__})
            self._end(Close.NORMAL, "client")
        except AppError as error:
            self._end(Close.RETRY, error.code)
        except Exception:
            logger.exception("socket writer failed")
            self._end(Close.SERVER_ERROR, "internal")

    async def _put(self, text: str) -> None:
        # A time and not a timeout: the connection's own timer looks at it, and each frame costs nothing.
        self._sending_since = time.monotonic()
        try:
            await self._send({"type": "websocket.send", "text": text})
        finally:
            self._sending_since = None

    async def _write_answers(self) -> None:
        while self._answers:
            text = self._answers.popleft()
            await self._put(text)
            self._answer_bytes -= len(text)
            self._room.set()

    async def _turn(self, name: str, subscription: Subscription) -> None:
        cursor = subscription.cursor
        if self.subscriptions.get(name) is not subscription:
            return
        if cursor.lost:
            await self._recover(name)
            return
        if not cursor.is_behind and subscription.live_sent:
            return
        if subscription.rests:
            return
        head = cursor.head
        # What comes while this is sent is for the next time, where the client asked for a pace.
        while subscription.turn_left > 0 and cursor.can_read and not (subscription.pause_s and cursor.seq >= head):
            if self.is_paused:
                # It goes on with what is left of its turn, and the others after it.
                return
            if cursor.lags:
                # By now the client acknowledges again, or it would be paused.
                if not await self._renew(name, subscription):
                    return
                break
            events = await cursor.read(max_bytes=subscription.turn_left)
            subscription.turn_left -= await self._write_some(subscription, events)
        subscription.turn_left = TURN_BYTES
        if not subscription.live_sent and cursor.is_live:
            subscription.live_sent = True
            await self._put(encode(t="live", ch=cursor.channel.name, seq=cursor.seq))
        if subscription.pause_s and cursor.seq >= head and not cursor.lost:
            subscription.rests = True
            asyncio.get_running_loop().call_later(subscription.pause_s, self._rested, subscription)
        elif cursor.is_behind or cursor.lost:
            self._wake.set()
            if self.subscriptions.get(name) is subscription:
                # To the end of the line, so that a busy channel does not use up every window.
                self.subscriptions[name] = self.subscriptions.pop(name)

    def _rested(self, subscription: Subscription) -> None:
        subscription.rests = False
        self._wake.set()

    async def _write_some(self, subscription: Subscription, events: list[LoggedEvent]) -> int:
        """Send events; return how many bytes that was."""
        texts = [event.frame(subscription.cursor.channel) for event in events]
        size = 0
        for event, text in zip(events, texts, strict=True):
            length = byte_length(text)
            self._count(subscription, event.seq, length)
            size += length
        if self._batches and texts:
            texts = [batch(texts)]
        for text in texts:
            await self._put(text)
        return size

    def _count(self, subscription: Subscription, seq: int, size: int) -> None:
        subscription.sent(seq, size)
        if subscription.held:
            self.unacked += size

    async def _renew(self, name: str, subscription: Subscription) -> bool:
        """Go on from a new state; returns whether the channel is still the client's to see."""
        try:
            snapshot = await subscription.cursor.renew()
        except ChannelNotFound:
            await self._say_gone(name)
            return False
        await self._put_snapshot(subscription, snapshot)
        subscription.live_sent = False
        return True

    async def _recover(self, name: str) -> None:
        """The channel's positions no longer hold: give its state anew, or say that it is gone."""
        self.drop(name)
        cursor = self._realtime.cursor(self._scope(), self.wake)
        try:
            head, _, snapshot = await cursor.open(name, None)
        except ChannelNotFound:
            await self._say_gone(name)
            return
        if self._closed or name in self.subscriptions:
            # Ended, or subscribed again by the client meanwhile.
            cursor.close()
            return
        subscription = Subscription(cursor)
        self.add(name, subscription)
        await self._put(_subbed_again(cursor, head))
        assert snapshot is not None
        await self._put_snapshot(subscription, snapshot)

    async def _put_snapshot(self, subscription: Subscription, snapshot: Snapshot) -> None:
        # Straight to the socket: the queue of answers is emptied by this very task.
        for text in snapshot.frames(subscription.cursor.channel):
            self._count(subscription, snapshot.head.seq, byte_length(text))
            await self._put(text)

    async def _say_gone(self, name: str) -> None:
        if name in self.subscriptions:
            self.drop(name)
        await self._put(encode(t="unsubbed", ch=name, code="not_found", retry="never"))


def _subbed_again(cursor: Cursor, head: Head) -> str:
    return encode(
        t="subbed", ch=cursor.channel.name, ep=head.epoch, head=head.seq, floor=head.floor, mode=cursor.mode,
        recovered=False, why="epoch",
    )  # fmt: skip
