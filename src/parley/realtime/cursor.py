"""A reader's place in a channel. No queue per client: a number, and the ring or PostgreSQL behind it."""

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

from parley.core.scope import Scope
from parley.core.settings import RealtimeSettings
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels, Mode, Snapshot
from parley.realtime.conflation import outgoing
from parley.realtime.events import Channel, LoggedEvent
from parley.realtime.frames import Since
from parley.realtime.log import Head, LogReader

logger = logging.getLogger(__name__)

Why = Literal["ok", "initial", "epoch", "trimmed", "too_far"]
_PAGE = 500
_PAGE_BYTES = 64 * 1024


class Cursor:
    """Reads one channel for one client, from where it left off.

    `open` attaches to the ring first and reads PostgreSQL second, so nothing that commits in between is missed.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        log: LogReader,
        channels: Channels,
        settings: RealtimeSettings,
        lookups: asyncio.Semaphore,
        scope: Scope,
        wake: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._log = log
        self._channels = channels
        self._settings = settings
        self._lookups = lookups
        self._scope = scope
        self._wake = wake
        self.channel: Channel
        self.mode: Mode = "log"
        self.seq = 0
        self.live_after = 0
        self.lost = False
        self._taken = 0

    def wake(self) -> None:
        """The channel has moved."""
        self._wake()

    def reset(self) -> None:
        """The channel was deleted, or its positions no longer hold."""
        self.lost = True
        self._wake()

    async def look_again(self) -> None:
        """Look whether the channel is still the reader's to see; one that is not ends as if it were gone."""
        try:
            async with self._lookups:
                await self._channels.authorise(self._scope, self.channel.name)
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever opens the channel anew is looked at
            logger.debug("a subscription has ended", extra={"cause": type(error).__name__})
            self.reset()

    async def open(self, name: str, since: Since | None) -> tuple[Head, Why, Snapshot | None]:
        """Subscribe. Returns where the channel stands, why there is a snapshot, and the snapshot if there is one."""
        head = await self._attach(name)
        try:
            why = await self._judge(head, since)
            self._taken = self._ring.taken
            if why == "ok":
                assert since is not None
                self.seq = since.seq
                self.live_after = head.seq
                return head, why, None
            if since is not None and since.seq == -1:
                self.seq = self.live_after = head.seq
                return head, "initial", None
            async with self._lookups:
                snapshot = await self._channels.snapshot(self._scope, self.channel)
        except BaseException:
            self.close()
            raise
        if snapshot.head.epoch != self._ring.epoch:
            self._leave_stale_ring()
            snapshot_head, _, anew = await self.open(name, None)
            return snapshot_head, "epoch", anew
        self._start_from(snapshot)
        return snapshot.head, why, snapshot

    async def _attach(self, name: str) -> Head:
        """Subscribe to the channel's ring; return the head, which is of the same epoch."""
        while True:
            withdrawals = self._bus.withdrawals
            async with self._lookups:
                self.channel, head, self.mode = await self._channels.authorise(self._scope, name)
            self._ring, new = self._bus.attach(self.channel, self)
            if withdrawals != self._bus.withdrawals:
                # What was looked up may be older than that, and this cursor was not among those that look again.
                if new:
                    self._ring.open(head=head.seq, epoch=head.epoch)
                self.close()
                continue
            if new:
                # What was published since the read above waits in the ring and follows; a head read before the
                # ring existed is a safe place to start from.
                self._ring.open(head=head.seq, epoch=head.epoch)
                return head
            try:
                await self._ring.ready.wait()
            except BaseException:
                self.close()
                raise
            if self._ring.epoch == head.epoch:
                return head
            self._leave_stale_ring()

    def _leave_stale_ring(self) -> None:
        # The count has begun anew and the poll has not come yet: what the ring holds is of the old one.
        self.close()
        self._bus.outdated(self._ring)

    async def renew(self) -> Snapshot:
        """Forget the place and start again from a snapshot: the reader is too far behind."""
        async with self._lookups:
            snapshot = await self._channels.snapshot(self._scope, self.channel)
        self._start_from(snapshot)
        self.lost |= snapshot.head.epoch != self._ring.epoch
        return snapshot

    def _start_from(self, snapshot: Snapshot) -> None:
        self.seq = self.live_after = snapshot.head.seq
        self._taken = self._ring.taken

    async def _judge(self, head: Head, since: Since | None) -> Why:
        if since is None or since.seq == -1:
            return "initial"
        if (since.ep or head.epoch) != head.epoch or since.seq > head.seq:
            return "epoch"
        if since.seq < head.floor:
            return "trimmed"
        if head.seq - since.seq > self._settings.replay_events:
            # Deltas merge: a thousand events that a client receives may stand for many more in the log.
            return "too_far"
        # What the ring still holds is small. Below it the log may hold a thousand long messages.
        if since.seq < self._ring.base:
            async with self._lookups:
                size = await self._log.size(self._scope, self.channel, after=since.seq)
            if size > self._settings.replay_bytes:
                return "too_far"
        return "ok"

    @property
    def head(self) -> int:
        """The last event that this process knows of."""
        return self._ring.head

    @property
    def is_behind(self) -> bool:
        """Whether there is something to read."""
        return self._ring.head > self.seq

    @property
    def can_read(self) -> bool:
        """Whether there is something to read, from positions that hold."""
        return self.is_behind and not self.lost

    @property
    def is_live(self) -> bool:
        """Whether all has been read that was there when the reader came."""
        return self.seq >= self.live_after and not self.lost

    @property
    def lags(self) -> bool:
        """Whether so much has come since the last reading that a state says it better than the events."""
        return (
            self._ring.head - self.seq > self._settings.lag_events
            or self._ring.taken - self._taken > self._settings.lag_bytes
        )

    async def read(self, *, limit: int = _PAGE, max_bytes: int | None = None) -> list[LoggedEvent]:
        """Return the next events as a reader gets them, and move past them.

        With `max_bytes` no more than so many, but at least one.
        """
        events = self._ring.after(self.seq, limit=limit)
        if events is None:
            async with self._lookups:
                events = await self._log.read(
                    self._scope, self.channel, after=self.seq, limit=limit, max_bytes=_PAGE_BYTES
                )
            # A hole here means that events were trimmed while this reader was away: not a replay any more.
            if not events or events[0].seq != self.seq + 1:
                self.lost = True
                return []
        if not events:
            return []
        found = events if len(events) == 1 else self._bounded(events, max_bytes)
        self._move(events, found[-1].seq)
        return found

    def _bounded(self, events: list[LoggedEvent], max_bytes: int | None) -> list[LoggedEvent]:
        found: list[LoggedEvent] = []
        size = 0
        for event in outgoing(self.mode, events):
            size += event.size
            if max_bytes is not None and found and size > max_bytes:
                break
            found.append(event)
        return found

    def _move(self, events: list[LoggedEvent], seq: int) -> None:
        # What was there when the reader came is a replay, which has bounds of its own.
        self._taken += sum(event.size for event in events if self.live_after < event.seq <= seq)
        self.seq = seq
        if seq >= self._ring.head:
            self._taken = self._ring.taken

    def close(self) -> None:
        """Unsubscribe."""
        self._bus.detach(self._ring, self)
