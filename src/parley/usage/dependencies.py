"""What the routes of usage ask for."""

from typing import Annotated

from fastapi import Depends, Request

from parley.core.dependencies import RequestUnit
from parley.core.scope import CurrentScope
from parley.usage.budgets import BudgetService
from parley.usage.reports import UsageReports


async def _reports(unit: RequestUnit, scope: CurrentScope) -> UsageReports:
    return UsageReports(unit, scope)


async def _budgets(request: Request, unit: RequestUnit, scope: CurrentScope) -> BudgetService:
    return BudgetService(unit, scope, request.app.state.ceilings)


UsageReportsDep = Annotated[UsageReports, Depends(_reports)]
BudgetServiceDep = Annotated[BudgetService, Depends(_budgets)]
