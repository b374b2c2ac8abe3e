"""What usage has to have done in the background: telling people of budgets, and ending what was left reserved."""

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from parley.core.db import Database
from parley.core.scope import Role
from parley.jobs.registry import JobRun, JobType, Periodic
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import Publisher, append
from parley.tenancy.operators import members_with
from parley.usage.accounts import NOTICE
from parley.usage.ceilings import Ceilings
from parley.usage.periods import Period, resets_at
from parley.usage.sweeping import UnscopedLedger

_EVERY = timedelta(minutes=1)


class BudgetNotices:
    """Tells a workspace's admins, and a user of their own, that a budget is nearly or wholly used up."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    @property
    def type(self) -> JobType:
        """The job that does it."""
        return JobType(NOTICE, self.handle, shown=False)

    async def handle(self, run: JobRun) -> None:
        """Append a notice to each inbox. One that is told twice, after a crash, has the same `id`."""
        data = _notice(run)
        user = run.payload["user_id"]
        async with run.database.system_unit_of_work() as unit:
            told = set(await members_with(unit, run.workspace_id, Role.ADMIN))
            if user:
                told.add(UUID(user))
            await append(
                unit,
                self._publisher,
                [NewEvent(user_channel(run.workspace_id, one), "notice", data) for one in sorted(told)],
            )


def _notice(run: JobRun) -> dict[str, Any]:
    budget = run.payload
    period = Period(budget["period"])
    subject = "user" if budget["user_id"] else "api_key" if budget["key_id"] else "workspace"
    stopped = budget["level"] == "stop"
    whose = {"workspace": "the workspace's", "user": "a user's", "api_key": "an API key's"}[subject]
    what = "ceiling" if budget["operator"] else "budget"
    word = "daily" if period is Period.DAY else "monthly"
    spent, limit = Decimal(budget["spent"]), Decimal(budget["ceiling"])
    share = "used up" if stopped else f"used up to {spent / limit:.0%}"
    starts = datetime.combine(date.fromisoformat(budget["starts_on"]), datetime.min.time(), UTC)
    return {
        "id": str(run.id),
        "kind": "budget_used_up" if stopped else "budget_alert",
        "text": f"{whose.capitalize()} {word} {what} is {share}.",
        "budget": {
            "id": budget["budget_id"],
            "subject": subject,
            "subject_id": budget["user_id"] or budget["key_id"],
            "set_by": "operator" if budget["operator"] else "workspace",
            "period": period.value,
            "spent": f"{spent:.8f}",
            "limit": f"{limit:.8f}",
            "resets_at": resets_at(period, starts).isoformat().replace("+00:00", "Z"),
        },
    }


def sweep_of(database: Database, ceilings: Ceilings) -> Periodic:
    """Return the work that comes back each minute: ending what lost processes left reserved."""
    ledger = UnscopedLedger(database, ceilings)

    async def sweep(_: JobRun) -> dict[str, Any]:
        ended = await ledger.end_expired()
        return {"ended": ended, "corrected": len(await ledger.reconcile_fresh())}

    return Periodic("usage.sweep", _EVERY, sweep)
