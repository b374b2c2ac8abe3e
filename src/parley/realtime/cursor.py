"""A reader's place in a channel. No queue per client: a number, and the ring or PostgreSQL behind it."""

from collections.abc import Callable
from typing import Literal

from parley.core.scope import Scope
from parley.core.settings import RealtimeSettings
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels, Mode, Snapshot
from parley.realtime.events import Channel, LoggedEvent, merged
from parley.realtime.frames import Since
from parley.realtime.log import Head, LogReader

Why = Literal["ok", "initial", "epoch", "trimmed", "too_far"]
_PAGE = 500


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
        scope: Scope,
        wake: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._log = log
        self._channels = channels
        self._settings = settings
        self._scope = scope
        self._wake = wake
        self.channel: Channel
        self.mode: Mode = "log"
        self.seq = 0
        self.live_after = 0
        self.lost = False

    def wake(self) -> None:
        """The channel has moved."""
        self._wake()

    def reset(self) -> None:
        """The channel was deleted, or its positions no longer hold."""
        self.lost = True
        self._wake()

    async def open(self, name: str, since: Since | None) -> tuple[Head, Why, Snapshot | None]:
        """Subscribe. Returns where the channel stands, why there is a snapshot, and the snapshot if there is one."""
        self.channel, head, self.mode = await self._channels.authorise(self._scope, name)
        self._ring, new = self._bus.attach(self.channel, self)
        try:
            if new:
                # What was published since the read above waits in the ring and follows; a head read before the
                # ring existed is a safe place to start from.
                self._ring.open(head=head.seq, epoch=head.epoch)
            else:
                await self._ring.ready.wait()
            why = await self._judge(head, since)
            if why == "ok":
                assert since is not None
                self.seq = since.seq
                self.live_after = head.seq
                return head, why, None
            if since is not None and since.seq == -1:
                self.seq = self.live_after = head.seq
                return head, "initial", None
            snapshot = await self._channels.snapshot(self._scope, self.channel)
        except BaseException:
            self.close()
            raise
        self.seq = self.live_after = snapshot.head.seq
        return snapshot.head, why, snapshot

    async def renew(self) -> Snapshot:
        """Forget the place and start again from a snapshot: the reader is too far behind."""
        snapshot = await self._channels.snapshot(self._scope, self.channel)
        self.seq = self.live_after = snapshot.head.seq
        return snapshot

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

    async def read(self, *, limit: int = _PAGE) -> list[LoggedEvent]:
        """Return the next events, deltas merged, and move past them."""
        events = self._ring.after(self.seq, limit=limit)
        if events is None:
            events = await self._log.read(self._scope, self.channel, after=self.seq, limit=limit)
            # A hole here means that events were trimmed while this reader was away: not a replay any more.
            if not events or events[0].seq != self.seq + 1:
                self.lost = True
                return []
        if not events:
            return []
        self.seq = events[-1].seq
        return events if len(events) == 1 else list(merged(events))

    def close(self) -> None:
        """Unsubscribe."""
        self._bus.detach(self._ring, self)
