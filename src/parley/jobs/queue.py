"""The SQL that works the outbox off: as the system role, over all workspaces.

A claim raises `attempts` and sets `owner`; every later write of that attempt names both, so whoever has lost the job
meanwhile writes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from parley.core.db import UnitOfWork
from parley.core.scope import NO_WORKSPACE
from parley.jobs.outbox import Enqueued

LOST = "The process that ran the job was lost."

# What a process left running when it died. Whoever has used up its attempts is not tried again: it may be what kills
# the processes.
_REQUEUE = """
    WITH lost AS (
        SELECT workspace_id, id FROM jobs WHERE status = 'running' AND lease_until <= $1
        ORDER BY lease_until LIMIT $2 FOR UPDATE SKIP LOCKED
    )
    UPDATE jobs j
    SET status = CASE WHEN j.attempts < j.max_attempts THEN 'queued' ELSE 'failed' END,
        error = CASE WHEN j.attempts < j.max_attempts THEN j.error ELSE $3 END,
        finished_at = CASE WHEN j.attempts < j.max_attempts THEN NULL ELSE $1 END,
        owner = NULL, lease_until = NULL
    FROM lost WHERE j.workspace_id = lost.workspace_id AND j.id = lost.id
    RETURNING j.workspace_id, j.id, j.user_id, j.kind
"""

# Left free, the planner reads and sorts the whole queue of a workspace as long as it has no statistics of it.
PIN = "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off"

# The workspaces that have something queued are found by one index probe each, and of each at most as many rows are
# read as it may run: ten thousand jobs of one workspace cost no more than a few. `turn` counts a workspace's running
# jobs and its candidates, so that the first job of one comes before the second of another. `status || ''` keeps the
# index of what is queued out of the second look: there it is the key that counts.
CLAIM = """
    WITH RECURSIVE spaces AS (
        (SELECT workspace_id FROM jobs WHERE status = 'queued' ORDER BY workspace_id LIMIT 1)
        UNION ALL
        SELECT (SELECT j.workspace_id FROM jobs j WHERE j.status = 'queued' AND j.workspace_id > s.workspace_id
                ORDER BY j.workspace_id LIMIT 1)
        FROM spaces s WHERE s.workspace_id IS NOT NULL
    ), due AS (
        SELECT s.workspace_id, q.id, q.run_at,
               busy.n + row_number() OVER (PARTITION BY s.workspace_id ORDER BY q.run_at, q.id) AS turn
        FROM spaces s
        CROSS JOIN LATERAL (
            SELECT count(*) AS n FROM jobs r WHERE r.status = 'running' AND r.workspace_id = s.workspace_id
        ) busy
        CROSS JOIN LATERAL (
            SELECT j.id, j.run_at FROM jobs j
            WHERE j.status = 'queued' AND j.workspace_id = s.workspace_id AND j.run_at <= $2
            ORDER BY j.run_at LIMIT greatest($5 - busy.n, 0)
        ) q
        WHERE s.workspace_id IS NOT NULL
    ), chosen AS (
        SELECT workspace_id, id FROM due ORDER BY turn, run_at, id LIMIT $4
    ), locked AS (
        SELECT c.workspace_id, c.id FROM chosen c
        CROSS JOIN LATERAL (
            SELECT 1 FROM jobs j WHERE j.workspace_id = c.workspace_id AND j.id = c.id AND j.status || '' = 'queued'
            FOR UPDATE SKIP LOCKED
        ) free
    ), claimed AS (
        UPDATE jobs j
        SET status = 'running', owner = $1, lease_until = $3, attempts = j.attempts + 1,
            started_at = coalesce(j.started_at, $2)
        FROM locked l WHERE j.workspace_id = l.workspace_id AND j.id = l.id
        RETURNING j.workspace_id, j.id, j.user_id, j.kind, j.payload::text AS payload, j.attempts, j.max_attempts
    )
    SELECT (SELECT count(*) FROM chosen) AS wanted, c.*,
           c.workspace_id = $6 OR EXISTS (SELECT 1 FROM workspaces w WHERE w.id = c.workspace_id) AS has_workspace
    FROM (SELECT) one LEFT JOIN claimed c ON true
"""

_SHOWN = "id, kind, status, progress, result, error, attempts, created_at, started_at, finished_at"

_READ = f"SELECT {_SHOWN} FROM jobs WHERE workspace_id = $1 AND id = $2 FOR SHARE"  # noqa: S608 - the names stand above

_RENEW = """
    UPDATE jobs j SET lease_until = $2
    FROM unnest($3::uuid[], $4::uuid[], $5::integer[]) AS h (workspace_id, id, attempt)
    WHERE j.workspace_id = h.workspace_id AND j.id = h.id AND j.attempts = h.attempt
      AND j.owner = $1 AND j.status = 'running'
    RETURNING j.id
"""

# The attempt was not the job's fault, so it does not count.
_RELEASE = """
    UPDATE jobs j
    SET status = 'queued', owner = NULL, lease_until = NULL, attempts = j.attempts - 1
    FROM unnest($2::uuid[], $3::uuid[], $4::integer[]) AS h (workspace_id, id, attempt)
    WHERE j.workspace_id = h.workspace_id AND j.id = h.id AND j.attempts = h.attempt
      AND j.owner = $1 AND j.status = 'running'
    RETURNING j.workspace_id, j.id, j.user_id, j.kind
"""

_PROGRESS = f"""
    UPDATE jobs SET progress = $5
    WHERE workspace_id = $1 AND id = $2 AND owner = $3 AND attempts = $4 AND status = 'running'
    RETURNING {_SHOWN}
"""  # noqa: S608 - the names stand above

_END = f"""
    UPDATE jobs
    SET status = $5, result = $6, error = $7, run_at = coalesce($8, run_at), finished_at = $9,
        progress = coalesce($10, progress), owner = NULL, lease_until = NULL
    WHERE workspace_id = $1 AND id = $2 AND owner = $3 AND attempts = $4 AND status = 'running'
    RETURNING {_SHOWN}
"""  # noqa: S608 - the names stand above

_FORGET = """
    DELETE FROM jobs WHERE (workspace_id, id) IN (
        SELECT workspace_id, id FROM jobs
        WHERE status IN ('completed', 'failed', 'cancelled') AND finished_at < $1 LIMIT $2
        FOR UPDATE SKIP LOCKED
    )
"""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that this process holds, in its `attempt`-th attempt."""

    workspace_id: UUID
    id: UUID
    user_id: UUID | None
    kind: str
    payload: dict[str, Any]
    attempt: int
    max_attempts: int
    has_workspace: bool

    @property
    def reference(self) -> Enqueued:
        """Which job it is."""
        return Enqueued(self.workspace_id, self.id, self.user_id, self.kind)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. `queued` with `run_at` is tried again then; `result` is JSON."""

    status: str
    result: str | None = None
    error: str | None = None
    run_at: datetime | None = None
    finished_at: datetime | None = None


def to_json(value: dict[str, Any] | None) -> str | None:
    """Return what a JSON column takes."""
    return None if value is None else orjson.dumps(value, default=str).decode()


def _columns(held: Iterable[Claimed]) -> tuple[list[UUID], list[UUID], list[int]]:
    jobs = list(held)
    return [job.workspace_id for job in jobs], [job.id for job in jobs], [job.attempt for job in jobs]


class UnscopedQueue:
    """The outbox inside one transaction of the system role, for one owner."""

    def __init__(self, unit: UnitOfWork, owner: UUID) -> None:
        self._unit = unit
        self._owner = owner

    async def requeue_lost(self, now: datetime, *, limit: int) -> list[Enqueued]:
        """Put jobs whose lease has ended back into the queue, or end them. Returns them."""
        connection = await self._unit.driver()
        return [Enqueued(*row) for row in await connection.fetch(_REQUEUE, now, limit, LOST)]

    async def claim(
        self, now: datetime, *, lease: timedelta, limit: int, per_workspace: int
    ) -> tuple[list[Claimed], bool]:
        """Take due jobs, the workspaces in turn. Returns them, and whether another process was faster at some."""
        connection = await self._unit.driver()
        await connection.execute(PIN)
        rows = await connection.fetch(CLAIM, self._owner, now, now + lease, limit, per_workspace, NO_WORKSPACE)
        claimed = [
            Claimed(
                workspace_id=row["workspace_id"],
                id=row["id"],
                user_id=row["user_id"],
                kind=row["kind"],
                payload=orjson.loads(row["payload"]),
                attempt=row["attempts"],
                max_attempts=row["max_attempts"],
                has_workspace=row["has_workspace"],
            )
            for row in rows
            if row["id"] is not None
        ]
        return claimed, rows[0]["wanted"] > len(claimed)

    async def read(self, workspace_id: UUID, id: UUID) -> asyncpg.Record | None:
        """Return a job, which nobody changes until the transaction ends."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_READ, workspace_id, id)

    async def renew(self, held: Sequence[Claimed], until: datetime) -> set[UUID]:
        """Extend the leases of jobs that are still held. Returns which those are."""
        connection = await self._unit.driver()
        return {row["id"] for row in await connection.fetch(_RENEW, self._owner, until, *_columns(held))}

    async def release(self, held: Sequence[Claimed]) -> list[Enqueued]:
        """Hand jobs back, as if they had not been taken. Returns those that were still held."""
        connection = await self._unit.driver()
        return [Enqueued(*row) for row in await connection.fetch(_RELEASE, self._owner, *_columns(held))]

    async def progress(self, job: Claimed, progress: dict[str, Any]) -> asyncpg.Record | None:
        """Store how far an attempt is. Returns the row, or None when the job is no longer held."""
        connection = await self._unit.driver()
        values = (job.workspace_id, job.id, self._owner, job.attempt, to_json(progress))
        return await connection.fetchrow(_PROGRESS, *values)

    async def end(self, job: Claimed, outcome: Outcome, progress: dict[str, Any] | None) -> asyncpg.Record | None:
        """Store how an attempt ended. Returns the row, or None when the job is no longer held."""
        connection = await self._unit.driver()
        return await connection.fetchrow(
            _END,
            job.workspace_id,
            job.id,
            self._owner,
            job.attempt,
            outcome.status,
            outcome.result,
            outcome.error,
            outcome.run_at,
            outcome.finished_at,
            to_json(progress),
        )


async def forget_finished(unit: UnitOfWork, before: datetime, *, limit: int) -> int:
    """Remove jobs that ended before then, at most `limit`; their dedupe keys are free again. Returns how many."""
    connection = await unit.driver()
    status: str = await connection.execute(_FORGET, before, limit)
    return int(status.rpartition(" ")[2])
