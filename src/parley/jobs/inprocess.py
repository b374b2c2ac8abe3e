"""The dispatcher inside the process: asyncio tasks, leases in PostgreSQL."""

import asyncio
import logging
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import AppError, Unavailable
from parley.core.ids import new_id
from parley.core.logging import log_context
from parley.core.scope import NO_WORKSPACE
from parley.core.settings import JobSettings
from parley.jobs.outbox import SIGNAL, Enqueued
from parley.jobs.queue import Claimed, Outcome, UnscopedQueue, to_json
from parley.jobs.registry import JobFailed, JobRegistry, JobRun, JobType
from parley.jobs.schedule import Schedule
from parley.jobs.schemas import JobRead
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import Publisher, append

logger = logging.getLogger(__name__)

FAILED = "The job failed."
TOO_LONG = "The job took too long."
UNKNOWN = "This version does not know this kind of job."
NO_SUCH_WORKSPACE = "The workspace no longer exists."

_ERROR_LENGTH = 500
_REQUEUED_AT_ONCE = 100
_PROGRESS_EVERY_S = 0.5
# Another process holds what this one wanted to take: its transaction is short.
_AGAIN_S = 0.01
# A handler that was cancelled may still have a transaction to take back.
_CANCELLED_S = 2.0

BACKOFF_S = 10.0
BACKOFF_FACTOR = 3.0
BACKOFF_MAX_S = 2 * 3600.0


def backoff(attempt: int, *, at_least_s: float = 0, jitter: float | None = None) -> timedelta:
    """Return how long to wait after the `attempt`-th attempt: 10 s, 30 s, 90 s … 2 h, each give or take a quarter."""
    spread = random.uniform(0.75, 1.25) if jitter is None else jitter
    seconds = min(BACKOFF_S * BACKOFF_FACTOR ** (attempt - 1), BACKOFF_MAX_S) * spread
    return timedelta(seconds=max(seconds, at_least_s))


def _text(message: str) -> str:
    """Return a message as the column takes it."""
    return message.replace("\0", "").encode(errors="replace").decode()[:_ERROR_LENGTH]


class LeaseLost(Exception):
    """Another process has the job by now: whatever this attempt still does is not wanted."""


@dataclass(eq=False)
class _Running:
    """An attempt under way in this process. Times are of the monotonic clock."""

    job: Claimed
    leased_until: float
    task: asyncio.Task[None] = field(init=False)
    lost: bool = False
    ending: bool = False
    """The handler is done: what is left is to write that down, which is never cut off."""
    progress: dict[str, Any] | None = None
    progress_at: float = -_PROGRESS_EVERY_S


class InProcessDispatcher:
    """Takes due jobs and runs them as tasks of this event loop.

    Delivery is at least once. At any time one process holds a job, by a lease that is renewed while it runs; leases
    are compared with the clocks of the processes, which may differ by less than a lease.
    """

    def __init__(
        self,
        database: Database,
        registry: JobRegistry,
        publisher: Publisher,
        settings: JobSettings,
        *,
        schedule: Schedule | None = None,
    ) -> None:
        self.owner = new_id()
        self._database = database
        self._registry = registry
        self._publisher = publisher
        self._settings = settings
        self._schedule = schedule
        self._lease = timedelta(seconds=settings.lease_s)
        self._running: dict[UUID, _Running] = {}
        self._wake = asyncio.Event()
        self._closing = False
        # Jobs whose users have not been told of them, in order; a claim tells in its own time.
        self._untold: dict[UUID, Enqueued] = {}
        self._untold_wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._unlisten = database.listen(SIGNAL, self._enqueued)

    async def start(self) -> None:
        """Begin to take jobs."""
        name = f"jobs-{self.owner}"
        self._tasks = [
            asyncio.create_task(self._take(), name=f"{name}-take"),
            asyncio.create_task(self._renew(), name=f"{name}-renew"),
            asyncio.create_task(self._tell(), name=f"{name}-tell"),
        ]

    async def close(self) -> None:
        """Take no more, let what runs end for `drain_s`, then cut it off and hand it back."""
        self._unlisten()
        self._closing = True
        self._wake.set()
        if not self._tasks:
            return
        taking, *others = self._tasks
        # Not cut off: a claim that has committed must be known here.
        await asyncio.wait({taking})
        running = list(self._running.values())
        if running:
            await asyncio.wait({run.task for run in running}, timeout=self._settings.drain_s)
            cut_off = [run for run in running if not run.task.done() and not run.ending]
            for run in cut_off:
                run.task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(_CANCELLED_S):
                    await asyncio.gather(*(run.task for run in running), return_exceptions=True)
            # One that does not let itself be cancelled keeps its lease: it may still do something.
            await self._release([run.job for run in cut_off if run.task.done() and not run.ending])
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _enqueued(self, job: object) -> None:
        if isinstance(job, Enqueued):
            self._untold[job.id] = job
        self._wake.set()

    # -- taking --------------------------------------------------------------------------------------------------------

    async def _take(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                if self._schedule is not None:
                    await self._schedule.enqueue_due()
                again = await self._claim()
            except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
                logger.warning("taking jobs failed", extra={"cause": type(error).__name__})
                again = False
            self._untold_wake.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S if again else self._settings.poll_s):
                    await self._wake.wait()

    async def _claim(self) -> bool:
        """Take as many due jobs as there is room for. Returns whether there may be more to take."""
        room = self._settings.concurrency - len(self._running)
        if room <= 0:
            return False
        now, leased_until = clock.now(), time.monotonic() + self._settings.lease_s
        async with self._database.system_unit_of_work() as unit:
            queue = UnscopedQueue(unit, self.owner)
            lost = await queue.requeue_lost(now, limit=_REQUEUED_AT_ONCE)
            claimed, missed = await queue.claim(
                now, lease=self._lease, limit=room, per_workspace=self._settings.per_workspace
            )
        for left in lost:
            logger.warning("job of a lost process", extra={"job_id": str(left.id), "kind": left.kind})
            self._untold[left.id] = left
        for job in claimed:
            self._untold.pop(job.id, None)
            run = _Running(job, leased_until)
            self._running[job.id] = run
            run.task = asyncio.create_task(self._run(run), name=f"jobs-{self.owner}-run")
            run.task.add_done_callback(partial(self._ended, run))
        return missed or len(lost) == _REQUEUED_AT_ONCE

    def _ended(self, run: _Running, task: asyncio.Task[None]) -> None:
        # By now another attempt at the same job may run here.
        if self._running.get(run.job.id) is run:
            del self._running[run.job.id]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease ends by itself, and the job is taken again.
            cause = {"job_id": str(run.job.id), "cause": type(error).__name__}
            logger.error("outcome of a job not stored", extra=cause)

    # -- running -------------------------------------------------------------------------------------------------------

    async def _run(self, run: _Running) -> None:
        job = run.job
        with log_context(job_id=str(job.id), workspace_id=str(job.workspace_id)):
            try:
                if job.has_workspace:
                    await self._announce(job.reference)
                outcome = await self._attempt(run)
            except asyncio.CancelledError:
                if run.lost:
                    logger.warning("job was taken over", extra={"kind": job.kind, "attempt": job.attempt})
                raise
            except LeaseLost:
                logger.warning("job was taken over", extra={"kind": job.kind, "attempt": job.attempt})
                return
            run.ending = True
            await self._end(run, outcome)

    async def _attempt(self, run: _Running) -> Outcome:
        job, type_ = run.job, self._registry.find(run.job.kind)
        if not job.has_workspace:
            return Outcome("cancelled", error=NO_SUCH_WORKSPACE, finished_at=clock.now())
        if type_ is None:
            # Perhaps a newer process of the same installation knows it.
            logger.warning("unknown kind of job", extra={"kind": job.kind})
            return self._failed(job, job.max_attempts, UNKNOWN)
        most = min(job.max_attempts, type_.max_attempts)
        limit = asyncio.timeout(type_.timeout_s)
        try:
            async with limit:
                result = to_json(await type_.handle(self._handed_over(run)))
            return Outcome("completed", result=result, finished_at=clock.now())
        except LeaseLost:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Something that the handler waited for was cancelled, not the handler.
            return self._refused(run, type_, most, FAILED, cause="CancelledError")
        except JobFailed as error:
            # What was asked for cannot be done: nobody who runs the server has to look.
            logger.info("job refused", extra={"kind": job.kind, "attempt": job.attempt, "cause": "JobFailed"})
            return Outcome("failed", error=_text(error.detail), finished_at=clock.now())
        except AppError as error:
            after_s = error.retry_after_s or 0
            return self._refused(run, type_, most, error.detail, cause=type(error).__name__, after_s=after_s)
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                return self._refused(run, type_, most, TOO_LONG, cause="TimeoutError")
            logger.exception("job failed", extra={"kind": job.kind, "attempt": job.attempt})
            return self._failed(job, most, FAILED)

    def _handed_over(self, run: _Running) -> JobRun:
        async def report(done: int, total: int | None, note: str | None) -> None:
            await self._progress(run, {"done": done, "total": total, "note": note})

        job = run.job
        return JobRun(
            id=job.id,
            workspace_id=job.workspace_id,
            user_id=job.user_id,
            payload=job.payload,
            attempt=job.attempt,
            database=self._database,
            report=report,
        )

    def _refused(
        self, run: _Running, type_: JobType, most: int, error: str, *, cause: str, after_s: float = 0
    ) -> Outcome:
        logger.warning("job failed", extra={"kind": type_.kind, "attempt": run.job.attempt, "cause": cause})
        return self._failed(run.job, most, error, after_s=after_s)

    def _failed(self, job: Claimed, most: int, error: str, *, after_s: float = 0) -> Outcome:
        """Return what follows an attempt that failed: another one later, or the end."""
        error = _text(error)
        if job.attempt >= most:
            return Outcome("failed", error=error, finished_at=clock.now())
        return Outcome("queued", error=error, run_at=clock.now() + backoff(job.attempt, at_least_s=after_s))

    async def _progress(self, run: _Running, progress: dict[str, Any]) -> None:
        now = time.monotonic()
        run.progress = progress
        if now - run.progress_at < _PROGRESS_EVERY_S:
            return
        run.progress_at = now
        # Nobody needs a step of progress enough to fail for it.
        with suppress(Unavailable):
            async with self._database.system_unit_of_work() as unit:
                row = await UnscopedQueue(unit, self.owner).progress(run.job, progress)
                if row is None:
                    raise LeaseLost
                await self._publish(unit, run.job.reference, row)
            if run.progress is progress:
                run.progress = None

    async def _end(self, run: _Running, outcome: Outcome) -> None:
        """Store how the attempt ended. While the database is away it is tried for as long as the lease holds."""
        told = run.job.has_workspace
        while True:
            try:
                async with self._database.system_unit_of_work() as unit:
                    row = await UnscopedQueue(unit, self.owner).end(run.job, outcome, run.progress)
                    if row is not None and told:
                        await self._publish(unit, run.job.reference, row)
            except Unavailable:
                # Also when the commit's outcome is unknown: a second one finds nothing to do.
                if time.monotonic() > run.leased_until:
                    raise
                await asyncio.sleep(self._settings.poll_s)
                continue
            except Exception as error:
                if not told:
                    raise
                # The outcome matters more than the word of it.
                logger.warning("job not announced", extra={"cause": type(error).__name__})
                told = False
                continue
            if row is None:
                logger.info("job is no longer this process's", extra={"kind": run.job.kind})
            return

    # -- telling users -------------------------------------------------------------------------------------------------

    def _is_told(self, job: Enqueued) -> bool:
        type_ = self._registry.find(job.kind)
        return job.user_id is not None and job.workspace_id != NO_WORKSPACE and type_ is not None and type_.shown

    async def _publish(self, unit: Any, job: Enqueued, row: Any) -> None:
        if self._is_told(job):
            assert job.user_id is not None
            channel = user_channel(job.workspace_id, job.user_id)
            data = JobRead.of_row(row).model_dump(mode="json")
            await append(unit, self._publisher, [NewEvent(channel, "job.updated", data)])

    async def _announce(self, job: Enqueued) -> None:
        """Tell a job's user how it stands. The row is locked, so that events come in the order of its states."""
        if not self._is_told(job):
            return
        try:
            async with self._database.system_unit_of_work() as unit:
                row = await UnscopedQueue(unit, self.owner).read(job.workspace_id, job.id)
                if row is not None:
                    await self._publish(unit, job, row)
        except Exception as error:  # noqa: BLE001 - the job matters more than the word of it
            logger.warning("job not announced", extra={"job_id": str(job.id), "cause": type(error).__name__})

    async def _tell(self) -> None:
        while True:
            await self._untold_wake.wait()
            self._untold_wake.clear()
            while self._untold:
                job = self._untold.pop(next(iter(self._untold)))
                await self._announce(job)

    # -- leases --------------------------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            await self.renew()

    async def renew(self) -> None:
        """Extend the leases of what runs here; what has been lost is cancelled."""
        held = [run for run in self._running.values() if not run.ending]
        if not held:
            return
        leased_until = time.monotonic() + self._settings.lease_s
        try:
            async with asyncio.timeout(self._settings.lease_s / 3):
                async with self._database.system_unit_of_work() as unit:
                    still = await UnscopedQueue(unit, self.owner).renew(
                        [run.job for run in held], clock.now() + self._lease
                    )
        except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
            logger.warning("renewing leases failed", extra={"cause": type(error).__name__})
            now = time.monotonic()
            lost = [run for run in held if run.leased_until < now]
        else:
            for run in held:
                run.leased_until = leased_until
            lost = [run for run in held if run.job.id not in still]
        for run in lost:
            if not run.ending and not run.task.done():
                run.lost = True
                run.task.cancel()

    async def _release(self, held: list[Claimed]) -> None:
        if not held:
            return
        try:
            async with self._database.system_unit_of_work() as unit:
                released = await UnscopedQueue(unit, self.owner).release(held)
        except Exception as error:  # noqa: BLE001 - the leases end by themselves
            logger.warning("releasing jobs failed", extra={"cause": type(error).__name__})
            return
        for job in released:
            await self._announce(job)
