"""What operators do with the ceilings of single workspaces. Every change is in the workspace's audit log."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.ids import new_id
from parley.tenancy.audit import Action, record
from parley.tenancy.operators import UnscopedWorkspaceOperators
from parley.usage.ceilings import Ceilings
from parley.usage.periods import Period

_SHOW = """
    SELECT p.period, usage_ceiling(b.ceiling, p.period, $2, $3) AS ceiling, b.ceiling IS NOT NULL AS own,
           coalesce(c.spent, usage_spent($1, NULL, NULL, true, p.period, s.starts_on)) AS spent,
           coalesce(c.reserved, 0) AS reserved
    FROM (VALUES ('day'), ('month')) AS p (period)
    CROSS JOIN LATERAL (SELECT usage_starts_on(p.period, now()) AS starts_on) s
    LEFT JOIN budgets b ON b.workspace_id = $1 AND b.operator AND b.period = p.period
    LEFT JOIN budget_counters c ON c.workspace_id = $1 AND c.budget_id = b.id AND c.starts_on = s.starts_on
    ORDER BY p.period
"""
_SET = """
    INSERT INTO budgets (workspace_id, id, period, ceiling, alert_at, operator) VALUES ($1, $2, $3, $4, 0.8, true)
    ON CONFLICT (workspace_id, operator, user_id, key_id, period)
    DO UPDATE SET ceiling = excluded.ceiling, updated_at = now()
"""


class UnscopedCeilings:
    """The ceilings of single workspaces."""

    def __init__(self, database: Database, workspaces: UnscopedWorkspaceOperators, ceilings: Ceilings) -> None:
        self._database = database
        self._workspaces = workspaces
        self._ceilings = ceilings

    async def show(self, workspace_id: UUID) -> Sequence[dict[str, Any]]:
        """Return the ceiling of a day and of a month, whether it is the workspace's own, and how it stands.

        Raises `NoSuchWorkspace`.
        """
        await self._workspaces.show(workspace_id)
        async with self._database.system_unit_of_work() as unit:
            return await self._rows(unit, workspace_id)

    async def set(self, workspace_id: UUID, wanted: dict[Period, Decimal | None]) -> Sequence[dict[str, Any]]:
        """Give a workspace ceilings of its own, None for those of the settings; return what holds then.

        Raises `NoSuchWorkspace`.
        """
        await self._workspaces.show(workspace_id)
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            for period, ceiling in wanted.items():
                await connection.execute(_SET, workspace_id, new_id(), period.value, ceiling)
            await record(
                unit,
                Action.CEILINGS_CHANGED,
                workspace_id=workspace_id,
                actor="operator",
                target=str(workspace_id),
                details={period.value: None if amount is None else str(amount) for period, amount in wanted.items()},
            )
            return await self._rows(unit, workspace_id)

    async def _rows(self, unit: UnitOfWork, workspace_id: UUID) -> Sequence[dict[str, Any]]:
        connection = await unit.driver()
        rows = await connection.fetch(_SHOW, workspace_id, self._ceilings.day, self._ceilings.month)
        return [dict(row) for row in rows]
