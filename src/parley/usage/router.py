"""Usage and budgets over HTTP."""

import re
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.tenancy.permissions import Permission, needs
from parley.usage.dependencies import BudgetServiceDep, UsageReportsDep
from parley.usage.ledger import Purpose
from parley.usage.reports import UsageQuery, as_csv
from parley.usage.schemas import BudgetRead, BudgetsSet, Day, GroupBy, UsageByDay, UsageByModel, UsageByUser

router = APIRouter(tags=["usage"])

_CSV = "text/csv"
_REFUSED = re.compile(r"(^|;)q=0(\.0*)?(;|$)")


def _takes_csv(accept: str) -> bool:
    """Return whether an `Accept` header names CSV, and not to refuse it with `q=0`."""
    ranges = (item.replace(" ", "").lower().partition(";") for item in accept.split(","))
    return any(name == _CSV and not _REFUSED.search(parameters) for name, _, parameters in ranges)


@router.get(
    "/usage",
    response_model=Envelope[list[UsageByDay] | list[UsageByModel] | list[UsageByUser]],
    responses={
        200: {
            "content": {_CSV: {"schema": {"type": "string"}}},
            "description": "The sums; as CSV with `format=csv` or `Accept: text/csv`",
        }
    },
    openapi_extra=needs(Permission.USAGE_READ),
)
async def read_usage(
    request: Request,
    reports: UsageReportsDep,
    group_by: Annotated[GroupBy, Query(description="What a row is about")] = GroupBy.DAY,
    first: Annotated[Day | None, Query(alias="from", description="The first day, of UTC")] = None,
    last: Annotated[Day | None, Query(alias="to", description="The last day, which belongs to it")] = None,
    model: Annotated[str | None, Query(max_length=100, description="Only this model")] = None,
    user_id: Annotated[UUID | None, Query(description="Only this user; members may ask for themselves")] = None,
    key_id: Annotated[UUID | None, Query(description="Only what this API key asked for")] = None,
    purpose: Annotated[Purpose | None, Query(description="Only calls for this")] = None,
    format: Annotated[Literal["json", "csv"] | None, Query(description="`csv` for a table")] = None,
) -> Response:
    """Sum up what was used, by day, model or user.

    Members see their own, admins everybody's. `calls` counts attempts at providers; `cost` is in dollars.
    """
    query = UsageQuery(group_by, first, last, model=model, user_id=user_id, key_id=key_id, purpose=purpose)
    rows = await reports.read(query)
    if format == "csv" or (format is None and _takes_csv(request.headers.get("accept", ""))):
        return Response(
            as_csv(rows, group_by),
            media_type=f"{_CSV}; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="usage-by-{group_by.value}.csv"', "Vary": "Accept"},
        )
    return respond(rows, headers={"Vary": "Accept"})


@router.get("/budgets", response_model=Envelope[list[BudgetRead]], openapi_extra=needs(Permission.USAGE_READ))
async def list_budgets(budgets: BudgetServiceDep) -> Response:
    """List the workspace's budgets and how they stand; members see those that bind them."""
    return respond(await budgets.list_budgets())


@router.put(
    "/budgets",
    response_model=Envelope[list[BudgetRead]],
    responses={
        404: {"model": ErrorEnvelope, "description": "No such user or API key in this workspace"},
        409: {"model": ErrorEnvelope, "description": "`budget_twice`: two for the same subject and period"},
    },
    openapi_extra=needs(Permission.BUDGETS_MANAGE),
)
async def set_budgets(body: BudgetsSet, budgets: BudgetServiceDep) -> Response:
    """Set all budgets of the workspace at once; those that are left out are removed."""
    return respond(await budgets.replace(body.budgets))
