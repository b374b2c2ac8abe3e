"""SQL of the ledger and of budgets. Reserving and settling are functions of the database: one round trip each."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from parley.core.db import UnitOfWork
from parley.usage.bills import Bill, Estimate
from parley.usage.ceilings import Ceilings
from parley.usage.ledger import CallRecord, Totals

_RESERVE = """
    SELECT subject, period, operator
    FROM usage_reserve($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
"""
_SETTLE = """
    SELECT budget_id, user_id, key_id, operator, period, starts_on, ceiling, spent, level
    FROM usage_settle($1, $2, $3, $4, $5, $6, $7, $8::json, $9, $10)
"""
_EXPIRE = """
    UPDATE usage_reservations SET expires_at = $3
    WHERE workspace_id = $1 AND conversation_id = $2 AND expires_at IS NULL
"""
_RELEASE = """
    SELECT count(*) FROM unnest($2::uuid[]) AS w (id),
        LATERAL usage_settle($1, NULL, NULL, w.id, NULL, NULL, 'reply', '[]'::json, NULL, NULL)
"""
_TOTALS = """
    SELECT coalesce(sum(input_tokens), 0)::bigint, coalesce(sum(cached_tokens), 0)::bigint,
           coalesce(sum(output_tokens), 0)::bigint, coalesce(sum(cost), 0)
    FROM usage_entries WHERE workspace_id = $1 AND message_id = $2 AND id <> ALL($3::uuid[])
"""


class LedgerRepository:
    """The ledger and what is reserved, in one unit's transaction."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    async def reserve(
        self, bill: Bill, estimate: Estimate, ceilings: Ceilings, *, at: datetime, expires_at: datetime | None
    ) -> asyncpg.Record | None:
        """Reserve; return the budget that has nothing left, in which case nothing was done."""
        connection = await self._unit.driver()
        return await connection.fetchrow(
            _RESERVE, bill.workspace_id, bill.user_id, bill.key_id, bill.id, bill.conversation_id, bill.message_id,
            bill.purpose, estimate.provider, estimate.model, estimate.amount, estimate.input_tokens,
            estimate.input_cost, estimate.own_key, estimate.by_operator, at, expires_at, ceilings.day, ceilings.month,
        )  # fmt: skip

    async def settle(self, bill: Bill, records: Sequence[CallRecord], ceilings: Ceilings) -> list[asyncpg.Record]:
        """Store records and give back what was reserved; return the budgets that have passed a mark by it."""
        connection = await self._unit.driver()
        return list(
            await connection.fetch(
                _SETTLE, bill.workspace_id, bill.user_id, bill.key_id, bill.id, bill.conversation_id, bill.message_id,
                bill.purpose, _as_json(records), ceilings.day, ceilings.month,
            )
        )  # fmt: skip

    async def abandon(
        self, workspace_id: UUID, conversation_id: UUID, waiting: Sequence[UUID], *, until: datetime
    ) -> None:
        """Release some reservations of a conversation; the others have an end from now on."""
        connection = await self._unit.driver()
        await connection.execute(_EXPIRE, workspace_id, conversation_id, until)
        await connection.execute(_RELEASE, workspace_id, list(waiting))

    async def totals(self, workspace_id: UUID, message_id: UUID, *, besides: Sequence[UUID]) -> Totals:
        """Return the sum of a message's rows, but for some of them."""
        connection = await self._unit.driver()
        return Totals(*await connection.fetchrow(_TOTALS, workspace_id, message_id, list(besides)))


def _as_json(records: Sequence[CallRecord]) -> str:
    rows: list[dict[str, Any]] = [
        {
            "id": record.id,
            "model": record.model,
            "provider": record.provider,
            "attempt": record.attempt,
            "status": record.status,
            "error": record.error,
            "input_tokens": record.input_tokens,
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
            "images": record.images,
            "estimated": record.estimated,
            "own_key": record.own_key,
            # As text: no float ever stands between.
            "cost": str(record.cost),
            "started_at": record.started_at,
            "ended_at": record.ended_at,
        }
        for record in records
    ]
    return orjson.dumps(rows).decode()
