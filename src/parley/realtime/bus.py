"""From a commit to the subscribers of this process, whichever process it was made in.

What others tell arrives by the wire, in any order and not always. Gaps are found by density and healed from PostgreSQL,
and once a second every watched channel is compared with its head, so what was not told is late and never lost.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from uuid import UUID

import asyncpg

from parley.core.db import Database, UnitOfWork
from parley.core.settings import RealtimeSettings
from parley.realtime.events import Channel, LoggedEvent, timestamp_ms
from parley.realtime.log import read_range
from parley.realtime.ring import Ring, Subscriber
from parley.realtime.wire import Mark, Wire, mark_of

logger = logging.getLogger(__name__)

Address = tuple[UUID, str]

_IDLE_S = 60.0
_ANNOUNCED_S = 0.05
_BEHIND = """
    SELECT w.ix, e.seq, e.e, e.d::text AS d, e.at
    FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[])
         WITH ORDINALITY AS w (workspace_id, channel, after, until, ix)
    JOIN channel_events e ON e.workspace_id = w.workspace_id AND e.channel = w.channel
     AND e.seq > w.after AND e.seq <= w.until
    ORDER BY w.ix, e.seq
"""
# More than this is read page by page, each bounded in bytes.
_TOGETHER = 64
_HEADS = """
    SELECT h.workspace_id, h.channel, h.seq, h.epoch FROM channel_heads h
    JOIN unnest($1::uuid[], $2::text[]) AS w (workspace_id, channel)
      ON w.workspace_id = h.workspace_id AND w.channel = h.channel
"""


class Bus:
    """The rings of this process."""

    def __init__(self, database: Database, settings: RealtimeSettings, wire: Wire | None = None) -> None:
        self._database = database
        self._settings = settings
        self._wire = wire
        self._rings: dict[Address, Ring] = {}
        self._by_mark: dict[Mark, Ring] = {}
        self._told: dict[Ring, int] = {}
        self._fresh: set[Ring] = set()
        self._poller: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._behind = asyncio.Event()
        self.withdrawals = 0
        """How often access to a channel was taken from someone: who looked it up before looks again."""
        self.on_call: dict[str, Callable[[UUID], object]] = {}
        """What is done with a word about a reply that another process says, by the word."""

    async def start(self) -> None:
        """Begin to hear the other processes, and to look for what was committed and not heard of."""
        self._poller = asyncio.create_task(self._poll(), name="bus-poll")
        self._reader = asyncio.create_task(self._read(), name="bus-read")
        if self._wire is not None:
            await self._wire.start(self)

    async def close(self) -> None:
        """Stop."""
        if self._wire is not None:
            await self._wire.close()
        for task in (self._poller, self._reader):
            if task:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def call(self, word: str, reply_id: UUID) -> None:
        """Say a word about a reply to every other process."""
        if self._wire is not None:
            self._wire.call(word, reply_id)

    # -- what other processes tell ---------------------------------------------------------------------------------

    def moved(self, mark: Mark, seq: int) -> None:
        """Hear that a channel has come to `seq`; -1: its positions no longer hold."""
        ring = self._by_mark.get(mark)
        if ring is None or (0 <= seq <= ring.head and ring.ready.is_set()):
            return
        if seq < 0:
            self._hurry.set()
            return
        self._told[ring] = max(seq, self._told.get(ring, 0))
        self._behind.set()

    def arrived(self, mark: Mark, events: Sequence[LoggedEvent]) -> None:
        """Take committed events of a channel."""
        ring = self._by_mark.get(mark)
        if ring is not None and events:
            ring.append(events)
            if ring.has_gap and ring.ready.is_set():
                self.moved(mark, events[-1].seq)

    def missed(self) -> None:
        """Note that something may not have been heard."""
        self._hurry.set()

    def called(self, word: str, id: UUID) -> None:
        """Hear a word about a reply."""
        if (handle := self.on_call.get(word)) is not None:
            handle(id)

    # -- the rings -------------------------------------------------------------------------------------------------

    def publish(self, address: Address, events: Sequence[LoggedEvent]) -> None:
        """Hand committed events to the subscribers, here and elsewhere. Only ever called after the commit."""
        if self._wire is not None:
            self._wire.announce(address, events)
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
            self._by_mark[mark_of(channel.address)] = ring
        if not ring.subscribers and self._wire is not None and not self._wire.alone:
            # What others told between the caller's look at the head and now was told to nobody.
            self._fresh.add(ring)
            self._behind.set()
        ring.subscribers.add(subscriber)
        return ring, new

    def readers(self, address: Address) -> list[Subscriber]:
        """Return who reads a channel here."""
        ring = self._rings.get(address)
        return list(ring.subscribers) if ring else []

    def watched(self, prefix: str) -> list[Subscriber]:
        """Return who reads the channels here whose names begin like this."""
        rings = (ring for ring in self._rings.values() if ring.channel.name.startswith(prefix))
        return [subscriber for ring in rings for subscriber in ring.subscribers]

    def detach(self, ring: Ring, subscriber: Subscriber) -> None:
        """Unsubscribe; the ring stays a while for whoever comes back."""
        ring.subscribers.discard(subscriber)
        if not ring.subscribers:
            ring.idle_since = time.monotonic()
            if not ring.ready.is_set():
                self._forget(ring.channel.address)

    def _forget(self, address: Address) -> Ring | None:
        ring = self._rings.pop(address, None)
        if ring is not None:
            # Another channel may have the same mark by now.
            if self._by_mark.get(mark := mark_of(address)) is ring:
                del self._by_mark[mark]
            self._told.pop(ring, None)
        return ring

    def close_channel(self, address: Address) -> None:
        """The channel is gone: tell its subscribers, here and elsewhere."""
        if self._wire is not None:
            self._wire.void(address)
        self._reset(address)

    def outdated(self, ring: Ring) -> None:
        """The epoch of a ring is over: tell its subscribers."""
        if self._rings.get(ring.channel.address) is ring:
            self._reset(ring.channel.address)

    def _reset(self, address: Address) -> None:
        ring = self._forget(address)
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

    async def _read(self) -> None:
        """Read what other processes told of: all channels that have moved since the last time in one statement."""
        while True:
            await self._behind.wait()
            self._behind.clear()
            told, self._told = self._told, {}
            fresh, self._fresh = self._fresh, set()
            try:
                if fresh:
                    await self._look_at(fresh, told)
                await self._read_told(told)
            except Exception as error:  # noqa: BLE001 - the database may be away; the poll reads it later
                logger.warning("events of other processes not read", extra={"cause": type(error).__name__})
                self._hurry.set()
                await asyncio.sleep(0.1)

    async def _read_told(self, told: dict[Ring, int]) -> None:
        behind = [(ring, seq) for ring, seq in told.items() if seq > ring.head and self._is_watched(ring)]
        near = [(ring, seq) for ring, seq in behind if seq - ring.head <= _TOGETHER]
        if near:
            async with self._database.system_unit_of_work() as unit:
                connection = await unit.driver()
                rows = await connection.fetch(
                    _BEHIND,
                    [ring.channel.workspace_id for ring, _ in near],
                    [ring.channel.key for ring, _ in near],
                    [ring.head for ring, _ in near],
                    [seq for _, seq in near],
                )
            for ix, found in groupby(rows, key=itemgetter("ix")):
                near[ix - 1][0].append(
                    [LoggedEvent(row["seq"], row["e"], row["d"], timestamp_ms(row["at"])) for row in found]
                )
        await self._catch_up_all([(ring, seq) for ring, seq in behind if ring.head < seq])

    async def _look_at(self, fresh: set[Ring], told: dict[Ring, int]) -> None:
        for ring, row in await self._heads([ring for ring in fresh if self._is_watched(ring)]):
            if row is not None and row["epoch"] == ring.epoch:
                told[ring] = max(int(row["seq"]), told.get(ring, 0))

    def _is_watched(self, ring: Ring) -> bool:
        return bool(ring.subscribers) and ring.ready.is_set() and self._rings.get(ring.channel.address) is ring

    async def _heads(self, rings: Sequence[Ring]) -> list[tuple[Ring, asyncpg.Record | None]]:
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            rows = await connection.fetch(
                _HEADS, [ring.channel.workspace_id for ring in rings], [ring.channel.key for ring in rings]
            )
        heads = {(row["workspace_id"], row["channel"]): row for row in rows}
        return [(ring, heads.get(ring.channel.address)) for ring in rings]

    async def heal(self) -> None:
        """Compare every watched ring with its head and read what it lacks."""
        now = time.monotonic()
        for address, ring in list(self._rings.items()):
            if not ring.subscribers and now - ring.idle_since > _IDLE_S:
                self._forget(address)
        watched = [ring for ring in self._rings.values() if ring.subscribers and ring.ready.is_set()]
        if not watched:
            return
        # What a ring holds was committed before the question. While it is answered the rings move on.
        known = {ring: ring.head for ring in watched}
        behind = []
        for ring, row in await self._heads(watched):
            head = known[ring]
            if row is None or row["epoch"] != ring.epoch or row["seq"] < head:
                self._reset(ring.channel.address)
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
            self._start_anew(ring, until)
            return
        events = await read_range(unit, ring.channel, after=ring.head, limit=until - ring.head)
        if ring.head < until and (not events or events[0].seq > ring.head + 1):
            # This process slept for so long that what it lacks was trimmed: its readers get a state.
            self._start_anew(ring, until)
            return
        ring.append(events)

    @staticmethod
    def _start_anew(ring: Ring, head: int) -> None:
        ring.open(head=head, epoch=ring.epoch)
        for subscriber in ring.subscribers:
            subscriber.wake()
