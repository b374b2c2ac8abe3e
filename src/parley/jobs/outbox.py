"""Adding work to the outbox, in the transaction of its cause."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson

from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import NO_WORKSPACE

SIGNAL = "jobs"
"""What a unit signals when it has committed a job: an `Enqueued`."""

_ENQUEUE = """
    INSERT INTO jobs (workspace_id, id, user_id, kind, payload, dedupe_key, max_attempts, created_at, run_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ON CONFLICT (workspace_id, kind, dedupe_key) WHERE dedupe_key IS NOT NULL DO NOTHING
    RETURNING id
"""
_FIRST = "SELECT id FROM jobs WHERE workspace_id = $1 AND kind = $2 AND dedupe_key = $3"
_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Enqueued:
    """A job that is now in the outbox."""

    workspace_id: UUID
    id: UUID
    user_id: UUID | None
    kind: str


async def enqueue(
    unit: UnitOfWork,
    kind: str,
    payload: dict[str, Any],
    *,
    workspace_id: UUID = NO_WORKSPACE,
    user_id: UUID | None = None,
    dedupe_key: str | None = None,
    max_attempts: int = _ATTEMPTS,
    delay: timedelta = timedelta(0),
) -> UUID:
    """Add a job, which exists if the unit's transaction commits. Returns its id.

    `user_id` is whose inbox hears of it; a job without one is nobody's. A second job of the same workspace, kind and
    `dedupe_key` is not added while the first is kept: the first one's id is returned, where the unit may see it. The
    payload is plain JSON and holds no secret: whoever needs one makes it when the job runs.
    """
    id_ = new_id()
    now = clock.now()
    connection = await unit.driver()
    added = await connection.fetchval(
        _ENQUEUE,
        workspace_id,
        id_,
        user_id,
        kind,
        orjson.dumps(payload, default=str).decode(),
        dedupe_key,
        max_attempts,
        now,
        now + delay,
    )
    if added is None:
        first: UUID | None = await connection.fetchval(_FIRST, workspace_id, kind, dedupe_key)
        return first or id_
    unit.signal(SIGNAL, Enqueued(workspace_id, id_, user_id, kind))
    return id_
