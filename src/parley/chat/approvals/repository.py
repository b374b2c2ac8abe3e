"""SQL of approvals, on asyncpg inside the unit's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.llm.tool_values import fingerprint

# A process that takes a reply over asks again for what the one before it may have asked for already.
_ASK = """
    INSERT INTO tool_approvals (workspace_id, user_id, reply_id, id, tool, arguments, arguments_hash, expires_at)
    SELECT $1, $2, $3, c.id, c.tool, c.arguments::json, c.hash, now() + $8::interval
    FROM unnest($4::uuid[], $5::text[], $6::text[], $7::bytea[]) AS c (id, tool, arguments, hash)
    ON CONFLICT (workspace_id, id) DO NOTHING
"""
_FIND = """
    SELECT a.id, a.reply_id, a.tool, a.arguments::text AS arguments, a.arguments_hash, a.approved, a.decided_by,
           a.expires_at, a.expires_at <= now() AS is_over
    FROM tool_approvals a WHERE a.workspace_id = $1 AND a.user_id = $2 AND a.id = $3
"""
_DECIDE = """
    UPDATE tool_approvals a SET approved = $4, decided_by = $2, decided_at = now()
    WHERE a.workspace_id = $1 AND a.user_id = $2 AND a.id = $3 AND a.approved IS NULL AND a.expires_at > now()
    RETURNING a.id
"""
_EXPIRE = """
    UPDATE tool_approvals a SET approved = false, decided_at = now()
    WHERE a.workspace_id = $1 AND a.user_id = $2 AND a.id = $3 AND a.approved IS NULL AND a.expires_at <= now()
    RETURNING a.id
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that needs a yes."""

    id: UUID
    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call as it was asked for, and the answer so far. `is_over`: nobody may answer any more."""

    id: UUID
    reply_id: UUID
    tool: str
    arguments: dict[str, Any]
    approved: bool | None
    decided_by: UUID | None
    expires_at: datetime
    is_over: bool
    is_unchanged: bool
    """Whether the arguments are still the ones that were asked for."""


class ApprovalRepository:
    """Calls of replies that the scope's user asked for."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._who = (scope.workspace_id, scope.user_id)

    async def ask(self, reply_id: UUID, calls: Sequence[Asked], *, life: timedelta) -> None:
        """Store calls that wait; those that are there stay as they are."""
        connection = await self._unit.driver()
        await connection.execute(
            _ASK, *self._who, reply_id, [call.id for call in calls], [call.tool for call in calls],
            [orjson.dumps(call.arguments, option=orjson.OPT_SORT_KEYS).decode() for call in calls],
            [fingerprint(call.arguments) for call in calls], life,
        )  # fmt: skip

    async def find(self, id: UUID) -> Waiting | None:
        """Return a call, or None."""
        connection = await self._unit.driver()
        row: asyncpg.Record | None = await connection.fetchrow(_FIND, *self._who, id)
        if row is None:
            return None
        arguments = orjson.loads(row["arguments"])
        return Waiting(
            id=row["id"], reply_id=row["reply_id"], tool=row["tool"], arguments=arguments, approved=row["approved"],
            decided_by=row["decided_by"], expires_at=row["expires_at"], is_over=row["is_over"],
            is_unchanged=fingerprint(arguments) == row["arguments_hash"],
        )  # fmt: skip

    async def decide(self, id: UUID, *, approved: bool) -> bool:
        """Answer for a call; False when it was answered before or its time is over."""
        connection = await self._unit.driver()
        return await connection.fetchval(_DECIDE, *self._who, id, approved) is not None

    async def expire(self, id: UUID) -> bool:
        """Note that nobody answered in time; False when somebody did."""
        connection = await self._unit.driver()
        return await connection.fetchval(_EXPIRE, *self._who, id) is not None
