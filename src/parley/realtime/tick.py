"""The tick writer: one transaction each 40 ms for all replies that this process generates.

Commit first, deliver second. The first visible event of a reply is written at once. A tick is one round trip to one
SQL function (`realtime_tick`), which locks the heads in order, checks every fence, allocates `seq`, inserts and renews
the leases. A reply that does not come back was fenced: it is given up. When the outcome of a tick is lost with the
connection, each reply's count of events in the database says whether it was written, so nothing is written twice.
"""

import asyncio
import logging
import time
from contextlib import suppress
from datetime import timedelta

import asyncpg

from parley.core.db import Database, UnitOfWork
from parley.core.settings import RealtimeSettings
from parley.realtime.bus import Bus
from parley.realtime.events import LoggedEvent, timestamp_ms
from parley.realtime.runs import Run, hold_process_lock, new_owner

logger = logging.getLogger(__name__)

_TICK = """
    SELECT ix, base, epoch, cancel_requested, at
    FROM realtime_tick($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
"""
_RECOUNT = "SELECT id, appended, fence, owner, status FROM replies WHERE id = ANY($1::uuid[])"

# The driver has an error of its own kind for a connection that ends at a bad moment.
_NOT_WRITTEN = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresError)

# A reply that has this much unwritten text waits for the database before it reads on from its provider.
_BUFFERED_CHARACTERS = 256 * 1024


class _Batch:
    """The arguments of one tick."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs: list[Run] = []
        self.events: list[list[tuple[str, str]]] = []
        self.cursors: list[str | None] = []
        for run in runs:
            try:
                events, cursor = run.take()
            except TypeError:
                # Text that no JSON can hold: adapters let none through. This reply ends, the others go on.
                logger.exception("a reply's text cannot be written")
                run.buffer = []
                run.signal(stopped=True)
                continue
            self.runs.append(run)
            self.events.append(events)
            self.cursors.append(cursor)

    def arguments(self, owner: int, lease: timedelta, status: str | None) -> tuple[object, ...]:
        return (
            owner,
            lease,
            status,
            [run.scope.workspace_id for run in self.runs],
            [run.reply_id for run in self.runs],
            [run.fence for run in self.runs],
            [run.appended for run in self.runs],
            [len(events) for events in self.events],
            [e for events in self.events for e, _ in events],
            [d for events in self.events for _, d in events],
            self.cursors,
        )

    def settle(self, rows: list[asyncpg.Record]) -> list[tuple[Run, list[LoggedEvent]]]:
        """Note what was written and return it for publication; a run that is not among the rows is lost."""
        committed = []
        held = set()
        moment = time.monotonic()
        for row in rows:
            run, events = self.runs[row["ix"] - 1], self.events[row["ix"] - 1]
            held.add(row["ix"] - 1)
            run.appended += len(events)
            run.renewed = moment
            if row["cancel_requested"]:
                run.signal(cancelled=True)
            if events:
                ts, base = timestamp_ms(row["at"]), row["base"]
                committed.append((run, [LoggedEvent(base + n, e, d, ts) for n, (e, d) in enumerate(events, 1)]))
        for index, run in enumerate(self.runs):
            if index not in held:
                run.signal(lost=True)
        return committed


class TickWriter:
    """Writes the deltas of all runs of this process."""

    def __init__(self, database: Database, bus: Bus, settings: RealtimeSettings) -> None:
        self.owner = new_owner()
        self.connects = 0
        """How often the process's lock was taken: it goes with the connection, and so does everybody else's."""
        self._database = database
        self._bus = bus
        self._tick_s = settings.tick_ms / 1000
        self._lease = timedelta(seconds=settings.lease_s)
        self._runs: dict[object, Run] = {}
        self._dirty: dict[object, Run] = {}
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._in_flight: frozenset[object] = frozenset()
        self._connection: asyncpg.Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed: dict[object, asyncio.Event] = {}

    async def start(self) -> None:
        """Connect, take the process's lock, and begin."""
        await self._connect()
        self._task = asyncio.create_task(self._loop(), name="tick-writer")

    async def close(self) -> None:
        """Stop. Runs that are still open are orphans from now on."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._connection and not self._connection.is_closed():
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                await self._connection.close(timeout=2)

    async def ensure_connected(self) -> None:
        """Reconnect if the connection is gone: the process's lock went with it."""
        async with self._flushing:
            await self._connect()

    async def _connect(self) -> asyncpg.Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._database.connect_system()
            await hold_process_lock(self._connection, self.owner)
            self.connects += 1
        return self._connection

    def tracked(self) -> list[Run]:
        """Return the runs of this process."""
        return list(self._runs.values())

    def track(self, run: Run) -> None:
        """Begin to write a run and to renew its lease."""
        run.renewed = time.monotonic()
        if (before := self._runs.get(run.reply_id)) is not None:
            # It was lost, and is ours again before that was noticed.
            before.signal(lost=True)
        self._runs[run.reply_id] = run
        # The loop may be waiting for text without an end, and this one's lease has to be renewed before it has any.
        self._wake.set()
        self._changed[run.reply_id] = asyncio.Event()

    def untrack(self, run: Run) -> None:
        """Forget a run."""
        if self._runs.get(run.reply_id) is not run:
            # The reply was lost and is this process's again, as another run.
            return
        self._runs.pop(run.reply_id, None)
        self._dirty.pop(run.reply_id, None)
        self._changed.pop(run.reply_id, None)

    def find(self, reply_id: object) -> Run | None:
        """Return the run of a reply that is generated here."""
        return self._runs.get(reply_id)

    def written(self, run: Run, *, urgent: bool = False) -> None:
        """Note that a run has something to write; `urgent`: at once and not at the next tick."""
        if run.reply_id not in self._dirty:
            self._dirty[run.reply_id] = run
            self._wake.set()
        if urgent:
            self._urgent.set()

    async def room(self, run: Run) -> None:
        """Wait while a run has too much that is not written: the provider is read no faster than the log takes."""
        while run.buffered > _BUFFERED_CHARACTERS and not run.lost:
            changed = self._changed[run.reply_id]
            changed.clear()
            await changed.wait()

    async def flush(self, run: Run) -> None:
        """Return when all that the run has emitted so far is committed, or the run is lost."""
        while (run.buffer or run.reply_id in self._in_flight) and not run.lost:
            self._dirty[run.reply_id] = run
            await self._flush()

    async def settle(self, run: Run) -> None:
        """Take a run out of the ticks; return when none is under way with it. `finish` writes the rest."""
        run.finishing = True
        self._dirty.pop(run.reply_id, None)
        if run.reply_id in self._in_flight:
            async with self._flushing:
                pass

    async def finish(self, unit: UnitOfWork, run: Run, *, status: str) -> bool:
        """Write a run's last events with its final status, inside the caller's transaction.

        After `settle`: no tick may be under way with this run. Returns whether the run was still
        ours; when not, the caller rolls back and gives up.
        """
        connection = await unit.driver()
        before, cursor = list(run.buffer), run.cursor
        batch = _Batch([run])
        run.buffer, run.cursor = before, cursor  # the transaction may roll back: what was taken is still to be written
        appended = run.appended
        rows = await connection.fetch(_TICK, *batch.arguments(self.owner, self._lease, status))
        committed = batch.settle(rows)
        run.appended = appended

        def publish() -> None:
            run.buffer = []
            for done, events in committed:
                self._bus.publish(done.channel.address, events)

        unit.after_commit(publish)
        return bool(rows)

    async def _loop(self) -> None:
        last = 0.0
        clock = asyncio.get_running_loop().time
        renew_s = self._lease.total_seconds() / 3
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(renew_s if self._runs else None):
                    await self._wake.wait()
            wait = last + self._tick_s - clock()
            if wait > 0 and not self._urgent.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._urgent.wait()
            last = clock()
            self._wake.clear()
            self._urgent.clear()
            stale = time.monotonic() - renew_s
            for run in self._runs.values():
                if run.renewed < stale and not run.finishing:
                    self._dirty[run.reply_id] = run
            try:
                await self._flush()
            except Exception:
                logger.exception("tick failed")
                await asyncio.sleep(0.2)

    async def _flush(self) -> None:
        async with self._flushing:
            runs = [run for run in self._dirty.values() if not run.lost]
            self._dirty.clear()
            if not runs:
                return
            batch = _Batch(runs)
            self._in_flight = frozenset(run.reply_id for run in runs)
            try:
                rows = await self._write(batch)
            except BaseException:
                # Whatever it is, no text is lost by it: the next tick has it, or the end of its reply.
                self._take_back(batch)
                raise
            finally:
                self._in_flight = frozenset()
            for run, events in batch.settle(rows):
                self._bus.publish(run.channel.address, events)
            for run in runs:
                if changed := self._changed.get(run.reply_id):
                    changed.set()

    def _take_back(self, batch: _Batch) -> None:
        for run, events, cursor in zip(batch.runs, batch.events, batch.cursors, strict=True):
            run.give_back(events, cursor)
            if self._runs.get(run.reply_id) is run and not run.finishing:
                self._dirty[run.reply_id] = run
                self._wake.set()

    async def _write(self, batch: _Batch) -> list[asyncpg.Record]:
        delay = 0.05
        retried = False
        while True:
            try:
                connection = await self._connect()
                if retried:
                    await self._recount(connection, batch)
                arguments = batch.arguments(self.owner, self._lease, None)
                return list(await connection.fetch(_TICK, *arguments, timeout=10))
            except _NOT_WRITTEN as error:
                logger.warning("tick not written, trying again", extra={"cause": type(error).__name__})
                retried = True
                if self._connection is not None and not isinstance(error, asyncpg.PostgresError):
                    self._connection.terminate()
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)

    async def _recount(self, connection: asyncpg.Connection, batch: _Batch) -> None:
        """After a lost answer: drop from the batch what was written all the same; the poll announces it."""
        rows = {row["id"]: row for row in await connection.fetch(_RECOUNT, [run.reply_id for run in batch.runs])}
        for index, run in enumerate(batch.runs):
            row = rows.get(run.reply_id)
            if (
                row is not None
                and row["fence"] == run.fence
                and row["appended"] == run.appended + len(batch.events[index])
            ):
                run.appended = row["appended"]
                batch.events[index] = []
