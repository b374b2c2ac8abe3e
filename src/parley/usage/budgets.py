"""Budgets: what a workspace, a user or an API key may spend in a day or a month."""

from collections.abc import Sequence
from decimal import Decimal

import asyncpg

from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.tenancy.audit import Action, record
from parley.tenancy.permissions import Permission
from parley.usage.budget_repository import BudgetRepository
from parley.usage.ceilings import NO_CEILINGS, Ceilings
from parley.usage.errors import BudgetTwice
from parley.usage.periods import Period, resets_at
from parley.usage.schemas import BudgetRead, BudgetSet, Subject


class BudgetService:
    """What people do with budgets, inside one unit of work."""

    def __init__(self, unit: UnitOfWork, scope: Scope, ceilings: Ceilings = NO_CEILINGS) -> None:
        self._unit = unit
        self._scope = scope
        self._budgets = BudgetRepository(unit, scope, ceilings)

    async def list_budgets(self) -> list[BudgetRead]:
        """Return all budgets to whoever may set them, to others those that bind them."""
        everything = Permission.BUDGETS_MANAGE in self._scope.permissions
        rows = await self._budgets.list_all(clock.now(), of=None if everything else self._scope.user_id)
        return [_read(row) for row in rows]

    async def replace(self, wanted: Sequence[BudgetSet]) -> list[BudgetRead]:
        """Make these the workspace's budgets, and no others. The operator's ceilings stay as they are.

        A budget for a subject and a period that had one keeps what that has counted; a new one begins with what the
        ledger says was spent in the period. Raises `BudgetTwice` and `UnknownSubject`.
        """
        if len({budget.key for budget in wanted}) < len(wanted):
            raise BudgetTwice
        await self._budgets.replace(wanted, clock.now())
        details = [budget.model_dump(mode="json", exclude_none=True) for budget in wanted]
        await record(self._unit, Action.BUDGETS_CHANGED, scope=self._scope, details={"budgets": details})
        return await self.list_budgets()


def _read(row: asyncpg.Record) -> BudgetRead:
    period = Period(row["period"])
    subject: Subject = "user" if row["user_id"] else "api_key" if row["key_id"] else "workspace"
    return BudgetRead(
        id=row["id"],
        subject=subject,
        subject_id=row["user_id"] or row["key_id"],
        period=period,
        limit=row["ceiling"],
        set_by="operator" if row["operator"] else "workspace",
        alert_at=row["alert_at"].normalize(),
        spent=row["spent"],
        reserved=row["reserved"],
        remaining=max(row["ceiling"] - row["spent"] - row["reserved"], Decimal(0)),
        resets_at=resets_at(period, clock.now()),
    )
