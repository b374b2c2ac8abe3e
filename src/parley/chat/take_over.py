"""Replies whose process is gone: another one goes on with them, or ends them with what they have.

A process that was killed has lost its lock within milliseconds; one that is frozen, or whose host is gone, stops
renewing its leases. Whoever finds such a reply first raises its fence, and from then on the former owner appends
nothing, whether it is dead or only slow.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from uuid import UUID

from parley.chat.turns import Turns
from parley.core.db import Database
from parley.realtime import runs
from parley.realtime.bus import Bus
from parley.realtime.runs import Orphan
from parley.realtime.tick import TickWriter

logger = logging.getLogger(__name__)

EVERY_S = 0.5

# After the database was away everybody's lock is gone until they have connected again.
_GRACE_S = 3.0
# A process that has lost the connection with its lock, and only that, has another one within a few milliseconds.
_BACK_S = 0.1
# Of processes that hear of the same work, the least busy is the first to reach for it.
_PER_RUN_S = 0.0001
_AT_ONCE = 16


class TakeOver:
    """Looks for replies that nobody writes: at start, twice a second, and when another process says so."""

    def __init__(
        self, database: Database, turns: Turns, writer: TickWriter, bus: Bus, *, counted: Callable[[int], None]
    ) -> None:
        self._database = database
        self._turns = turns
        self._writer = writer
        self._bus = bus
        self._counted = counted
        self._task: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._hurry = asyncio.Event()
        self._failed = False
        self._connects: int | None = None
        self._patient_until = 0.0
        self._expired: set[tuple[UUID, int]] = set()
        self._closing = False

    def start(self) -> None:
        """Begin."""
        self._bus.on_call["work"] = self._called_to_work
        self._bus.on_call["sweep"] = lambda _: self._hurry.set()
        self._task = asyncio.create_task(self._loop(), name="take-over")

    async def close(self) -> None:
        """Stop: what is found from now on is left to others."""
        self._closing = True
        for task in (self._task, *self._calls):
            if task:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def sweep(self) -> int:
        """Look once; return how many replies were found."""
        async with self._database.system_unit_of_work() as unit:
            alive = await runs.living(unit)
            found = await runs.orphans(unit, owner=self._writer.owner, alive=alive)
        self._counted(len(alive))
        before, self._connects = self._connects, self._writer.connects
        if self._failed or before not in {None, self._connects}:
            self._failed = False
            self._patient_until = time.monotonic() + _GRACE_S
        due = self._due(found)
        if any(not orphan.released and orphan.status == "streaming" for orphan in due):
            due = await self._look_once_more(due)
        for start in range(0, len(due), _AT_ONCE):
            await asyncio.gather(*(self._see_to(orphan) for orphan in due[start : start + _AT_ONCE]))
        return len(due)

    async def _look_once_more(self, due: list[Orphan]) -> list[Orphan]:
        """Leave out those whose process is back a moment later: it had lost its connection and nothing else."""
        await asyncio.sleep(_BACK_S)
        async with self._database.system_unit_of_work() as unit:
            still = await runs.orphans(unit, owner=self._writer.owner)
        seen = {(orphan.reply_id, orphan.fence) for orphan in still}
        return [orphan for orphan in due if (orphan.reply_id, orphan.fence) in seen]

    def _due(self, found: Sequence[Orphan]) -> list[Orphan]:
        """Leave out what may be a moment's appearance: a lease that its owner is about to renew, a lock to come."""
        expired = {(orphan.reply_id, orphan.fence) for orphan in found if orphan.alive}
        twice, self._expired = self._expired & expired, expired
        patient = time.monotonic() < self._patient_until
        return [
            orphan
            for orphan in found
            if orphan.status == "queued"
            or orphan.released
            or (not patient and (not orphan.alive or (orphan.reply_id, orphan.fence) in twice))
        ]

    async def _see_to(self, orphan: Orphan) -> None:
        try:
            if orphan.status == "streaming":
                if await self._turns.take_over(orphan):
                    logger.warning("reply of a lost process taken over", extra={"reply_id": str(orphan.reply_id)})
            else:
                await self._turns.start_next(orphan.scope, orphan.channel)
        except Exception:
            # One that cannot be taken over must not keep the others waiting.
            logger.exception("a reply could not be taken over", extra={"reply_id": str(orphan.reply_id)})

    def _called_to_work(self, reply_id: UUID) -> None:
        self._spawn(lambda: self._work(reply_id))

    def _spawn(self, do: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await do()
            except Exception as error:  # noqa: BLE001 - the next look finds it
                logger.warning("a queued reply was not begun", extra={"cause": type(error).__name__})

        task = asyncio.create_task(run())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _work(self, reply_id: UUID) -> None:
        await asyncio.sleep(len(self._writer.tracked()) * _PER_RUN_S)
        if self._closing:
            return
        async with self._database.system_unit_of_work() as unit:
            orphan = await runs.reserve(unit, reply_id, owner=self._writer.owner)
        if orphan is not None:
            await self._turns.start_next(orphan.scope, orphan.channel)

    async def _loop(self) -> None:
        while True:
            try:
                await self._writer.ensure_connected()
                await self.sweep()
            except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
                logger.warning("sweep of open replies failed", extra={"cause": type(error).__name__})
                self._failed = True
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._hurry.wait()
            self._hurry.clear()
