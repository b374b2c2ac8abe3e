"""From a commit to the subscribers of this process. Gaps are found by density and healed from PostgreSQL."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.settings import RealtimeSettings
from parley.realtime.events import Channel, LoggedEvent
from parley.realtime.log import read_range
from parley.realtime.ring import Ring, Subscriber

logger = logging.getLogger(__name__)

Address = tuple[UUID, str]

_IDLE_S = 60.0
_ANNOUNCED_S = 0.05
_HEADS = """
    SELECT h.workspace_id, h.channel, h.seq, h.epoch FROM channel_heads h
    JOIN unnest($1::uuid[], $2::text[]) AS w (workspace_id, channel)
      ON w.workspace_id = h.workspace_id AND w.channel = h.channel
"""


class Bus:
    """The rings of this process."""

    def __init__(self, database: Database, settings: RealtimeSettings) -> None:
        self._database = database
        self._settings = settings
        self._rings: dict[Address, Ring] = {}
        self._poller: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def start(self) -> None:
        """Begin to look for what was committed and not heard of."""
        self._poller = asyncio.create_task(self._poll(), name="bus-poll")

    async def close(self) -> None:
        """Stop."""
        if self._poller:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller

    def publish(self, address: Address, events: Sequence[LoggedEvent]) -> None:
        """Hand committed events to the local subscribers. Only ever called after the commit."""
        ring = self._rings.get(address)
        if ring is not None:
            ring.append(events)
            if ring.has_gap and ring.ready.is_set():
                self._hurry.set()

    def attach(self, channel: Channel, subscriber: Subscriber) -> tuple[Ring, bool]:
        """Subscribe. Returns the ring and whether it is new: the caller then reads the head and calls `open`.

        From this call on nothing that is published is missed: a ring that is not open yet keeps it.
        """
        ring = self._rings.get(channel.address)
        new = ring is None
        if ring is None:
            ring = Ring(channel, max_events=self._settings.ring_events, max_bytes=self._settings.ring_bytes)
            self._rings[channel.address] = ring
        ring.subscribers.add(subscriber)
        return ring, new

    def detach(self, ring: Ring, subscriber: Subscriber) -> None:
        """Unsubscribe; the ring stays a while for whoever comes back."""
        ring.subscribers.discard(subscriber)
        if not ring.subscribers:
            ring.idle_since = time.monotonic()
            if not ring.ready.is_set():
                self._rings.pop(ring.channel.address, None)

    def close_channel(self, address: Address) -> None:
        """The channel is gone: tell its subscribers."""
        ring = self._rings.pop(address, None)
        for subscriber in list(ring.subscribers) if ring else ():
            subscriber.reset()

    async def _poll(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self.heal()
            except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
                logger.warning("poll of heads failed", extra={"cause": type(error).__name__})
                await asyncio.sleep(self._settings.poll_s)

    async def heal(self) -> None:
        """Compare every watched ring with its head and read what it lacks."""
        now = time.monotonic()
        for address, ring in list(self._rings.items()):
            if not ring.subscribers and now - ring.idle_since > _IDLE_S:
                del self._rings[address]
        watched = [ring for ring in self._rings.values() if ring.subscribers and ring.ready.is_set()]
        if not watched:
            return
        # What a ring holds was committed before the question. While it is answered the rings move on.
        known = [(ring, ring.head) for ring in watched]
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            rows = await connection.fetch(
                _HEADS, [r.channel.workspace_id for r in watched], [r.channel.key for r in watched]
            )
        heads = {(row["workspace_id"], row["channel"]): row for row in rows}
        behind = []
        for ring, head in known:
            row = heads.get(ring.channel.address)
            if row is None or row["epoch"] != ring.epoch or row["seq"] < head:
                self.close_channel(ring.channel.address)
            elif row["seq"] > ring.head:
                behind.append((ring, int(row["seq"])))
        if behind:
            # A commit of our own is in the database a moment before it is announced here.
            await asyncio.sleep(_ANNOUNCED_S)
            await self._catch_up_all([(ring, seq) for ring, seq in behind if ring.head < seq])

    async def _catch_up_all(self, behind: list[tuple[Ring, int]]) -> None:
        if behind:
            async with self._database.system_unit_of_work() as unit:
                for ring, seq in behind:
                    await self.catch_up(unit, ring, until=seq)

    async def catch_up(self, unit: UnitOfWork, ring: Ring, *, until: int) -> None:
        """Read what the ring lacks up to a head; one that lies too far back starts anew from there."""
        if until - ring.head > max(self._settings.ring_events, 1):
            ring.open(head=until, epoch=ring.epoch)
            for subscriber in ring.subscribers:
                subscriber.wake()
            return
        ring.append(await read_range(unit, ring.channel, after=ring.head, limit=until - ring.head))
