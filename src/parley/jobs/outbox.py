"""Adding work to the outbox, in the transaction of its cause."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import NO_WORKSPACE

_ENQUEUE = """
    INSERT INTO jobs (workspace_id, id, user_id, kind, payload, dedupe_key, max_attempts, run_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
    ON CONFLICT (workspace_id, kind, dedupe_key) WHERE dedupe_key IS NOT NULL DO NOTHING
"""
_ATTEMPTS = 8


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
    `dedupe_key` is not added while the first is kept. The payload is plain JSON and holds no secret: whoever needs
    one makes it when the job runs.
    """
    id_ = new_id()
    due: datetime = clock.now() + delay
    connection = await unit.driver()
    await connection.execute(
        _ENQUEUE,
        workspace_id,
        id_,
        user_id,
        kind,
        orjson.dumps(payload, default=str).decode(),
        dedupe_key,
        max_attempts,
        due,
    )
    return id_
