"""Ends what lost processes left reserved, and brings counters in line with the ledger."""

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg

from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.ids import new_id
from parley.usage.accounts import Accounts
from parley.usage.bills import Bill, lost_record
from parley.usage.ceilings import NO_CEILINGS, Ceilings
from parley.usage.ledger import Purpose

logger = logging.getLogger(__name__)

_AT_ONCE = 500
_EXPIRED = """
    SELECT workspace_id, id FROM usage_reservations WHERE expires_at <= $1 ORDER BY workspace_id, id LIMIT $2
"""
# Whoever settles meanwhile has it, or waits for this.
_TAKE = """
    SELECT * FROM usage_reservations WHERE workspace_id = $1 AND id = $2 AND expires_at <= $3
    FOR UPDATE SKIP LOCKED
"""
# A call that was settled in the very moment in which a budget was made may not have seen it. No transaction lasts as
# long as the younger of these.
_FRESH = "SELECT workspace_id, array_agg(id) AS ids FROM budgets WHERE created_at BETWEEN $1 AND $2 GROUP BY 1"
_FRESH_FOR = (timedelta(seconds=30), timedelta(minutes=10))
_WITH_BUDGETS = """
    SELECT DISTINCT workspace_id FROM budgets WHERE $1::uuid IS NULL OR workspace_id = $1 ORDER BY workspace_id
"""
_RECONCILE = "SELECT * FROM usage_reconcile($1, $2)"


class UnscopedLedger:
    """The ledger and the budgets of all workspaces, for the installation's own work."""

    def __init__(self, database: Database, ceilings: Ceilings = NO_CEILINGS) -> None:
        self._database = database
        self._accounts = Accounts(database, ceilings)

    async def end_expired(self) -> int:
        """End reservations whose time is over: their processes are gone. Each is put into the ledger as lost.

        Returns how many were ended.
        """
        async with self._database.system_unit_of_work() as unit:
            due = await (await unit.driver()).fetch(_EXPIRED, clock.now(), _AT_ONCE)
        ended = 0
        for row in due:
            # One by one: each locks the counters of its own workspace, and only for a moment.
            async with self._database.system_unit_of_work() as unit:
                ended += await self._end(unit, row["workspace_id"], row["id"])
        if ended:
            logger.warning("model calls of lost processes were ended", extra={"count": ended})
        return ended

    async def _end(self, unit: UnitOfWork, workspace_id: UUID, id: UUID) -> bool:
        connection = await unit.driver()
        row = await connection.fetchrow(_TAKE, workspace_id, id, clock.now())
        if row is None:
            return False
        bill = Bill(
            id, workspace_id, row["user_id"], row["key_id"], Purpose(row["purpose"]), row["conversation_id"],
            row["message_id"],
        )  # fmt: skip
        await self._accounts.settle(unit, bill, [_lost(row)])
        return True

    async def reconcile(self, workspace_id: UUID | None = None) -> Sequence[dict[str, Any]]:
        """Set every counter to what the ledger and the reservations say. Returns those that said something else."""
        async with self._database.system_unit_of_work() as unit:
            rows = await (await unit.driver()).fetch(_WITH_BUDGETS, workspace_id)
        found: list[dict[str, Any]] = []
        for row in rows:
            found += await self._reconcile(row["workspace_id"], None)
        return found

    async def reconcile_fresh(self) -> Sequence[dict[str, Any]]:
        """Do the same for budgets that were made a moment ago."""
        least, most = _FRESH_FOR
        async with self._database.system_unit_of_work() as unit:
            rows = await (await unit.driver()).fetch(_FRESH, clock.now() - most, clock.now() - least)
        found: list[dict[str, Any]] = []
        for row in rows:
            found += await self._reconcile(row["workspace_id"], row["ids"])
        return found

    async def _reconcile(self, workspace_id: UUID, budgets: Sequence[UUID] | None) -> list[dict[str, Any]]:
        async with self._database.system_unit_of_work() as unit:
            rows = await (await unit.driver()).fetch(_RECONCILE, workspace_id, budgets)
        return [{"workspace_id": workspace_id, **dict(row)} for row in rows]


def _lost(row: asyncpg.Record) -> Any:
    return lost_record(
        new_id(),
        model=row["model"],
        provider=row["provider"],
        input_tokens=row["input_tokens"],
        cost=row["input_cost"],
        own_key=row["own_key"],
        started_at=row["reserved_at"],
    )
