"""SQL of budgets as people set and see them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from parley.core.db import UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.usage.ceilings import Ceilings
from parley.usage.errors import UnknownSubject
from parley.usage.schemas import BudgetSet

# Of the period of $2. A budget that nobody has called a model under yet has no counter.
_LIST = """
    SELECT b.id, b.user_id, b.key_id, b.operator, b.period, usage_ceiling(b.ceiling, b.period, $4, $5) AS ceiling,
           b.alert_at,
           coalesce(c.spent, usage_spent($1, b.user_id, b.key_id, b.operator, b.period, s.starts_on)) AS spent,
           coalesce(c.reserved, 0) AS reserved
    FROM budgets b
    CROSS JOIN LATERAL (SELECT usage_starts_on(b.period, $2) AS starts_on) s
    LEFT JOIN budget_counters c
      ON c.workspace_id = b.workspace_id AND c.budget_id = b.id AND c.starts_on = s.starts_on
    WHERE b.workspace_id = $1 AND usage_ceiling(b.ceiling, b.period, $4, $5) IS NOT NULL
      AND ($3::uuid IS NULL OR b.user_id = $3 OR b.user_id IS NULL AND b.key_id IS NULL
           OR b.key_id IN (SELECT k.id FROM api_keys k WHERE k.workspace_id = $1 AND k.user_id = $3))
    ORDER BY b.operator, b.user_id IS NOT NULL, b.key_id IS NOT NULL, b.user_id, b.key_id, b.period
"""
_OPEN_CEILINGS = "SELECT usage_open_ceilings($1, $2, $3)"
_LOCK = """
    SELECT id, user_id, key_id, period FROM budgets WHERE workspace_id = $1 AND NOT operator
    ORDER BY id FOR NO KEY UPDATE
"""
_DELETE = "DELETE FROM budgets WHERE workspace_id = $1 AND id = ANY($2::uuid[])"
_SET = """
    INSERT INTO budgets (workspace_id, id, user_id, key_id, period, ceiling, alert_at, created_at, updated_at)
    SELECT $1, b.id, b.user_id, b.key_id, b.period, b.ceiling, b.alert_at, $8, $8
    FROM unnest($2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::numeric[], $7::numeric[])
         AS b (id, user_id, key_id, period, ceiling, alert_at)
    ON CONFLICT (workspace_id, operator, user_id, key_id, period)
    DO UPDATE SET ceiling = excluded.ceiling, alert_at = excluded.alert_at, updated_at = excluded.updated_at
    WHERE (budgets.ceiling, budgets.alert_at) IS DISTINCT FROM (excluded.ceiling, excluded.alert_at)
"""


class BudgetRepository:
    """The budgets of the scope's workspace."""

    def __init__(self, unit: UnitOfWork, scope: Scope, ceilings: Ceilings) -> None:
        self._unit = unit
        self._scope = scope
        self._ceilings = ceilings

    async def list_all(self, at: datetime, *, of: UUID | None) -> Sequence[asyncpg.Record]:
        """Return budgets and how they stand in the period of a moment: all, or those that bind one user.

        The operator's are among them, also before anything was spent.
        """
        connection = await self._unit.driver()
        workspace, day, month = self._scope.workspace_id, self._ceilings.day, self._ceilings.month
        await self._open_ceilings()
        rows: Sequence[asyncpg.Record] = await connection.fetch(_LIST, workspace, at, of, day, month)
        return rows

    async def replace(self, wanted: Sequence[BudgetSet], at: datetime) -> None:
        """Make these the workspace's budgets; those that were there keep what they have counted.

        Raises `UnknownSubject`.
        """
        connection = await self._unit.driver()
        workspace = self._scope.workspace_id
        # Before anything is locked: whoever makes these rows goes on to the counters.
        await self._open_ceilings()
        keys = {budget.key for budget in wanted}
        there = await connection.fetch(_LOCK, workspace)
        gone = [row["id"] for row in there if (row["user_id"], row["key_id"], row["period"]) not in keys]
        if gone:
            await connection.execute(_DELETE, workspace, gone)
        columns: Any = zip(*((new_id(), *budget.key, budget.limit, budget.alert_at) for budget in wanted), strict=True)
        if wanted:
            try:
                await connection.execute(_SET, workspace, *map(list, columns), at)
            except asyncpg.ForeignKeyViolationError:
                raise UnknownSubject from None

    async def _open_ceilings(self) -> None:
        ceilings = self._ceilings
        if not ceilings:
            return
        connection = await self._unit.driver()
        await connection.execute(_OPEN_CEILINGS, self._scope.workspace_id, ceilings.day, ceilings.month)
