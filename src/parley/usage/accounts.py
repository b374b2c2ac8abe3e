"""Reserving and settling: what a call may cost is set aside before it is made, and what it did cost put in its place.

The counters of budgets are the last locks of a transaction, taken in one order by the database's functions. A workspace
that never had a budget or a ceiling locks nothing.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.error_handlers import translate
from parley.core.scope import Scope
from parley.jobs.outbox import enqueue
from parley.usage.bills import Bill, Estimate
from parley.usage.ceilings import NO_CEILINGS, Ceilings
from parley.usage.errors import OverBudget
from parley.usage.ledger import CallRecord, Totals
from parley.usage.periods import Period, seconds_left
from parley.usage.repository import LedgerRepository

logger = logging.getLogger(__name__)

# Long enough for a process to notice that its reply is gone, and to settle it.
_ABANDONED = timedelta(minutes=2)

NOTICE = "usage.notice"
"""The kind of the job that tells people of a budget that is nearly or wholly used up."""

_PAUSES_S = (0.2, 1.0, 3.0, 10.0)
_CLOSING_S = 10.0

_OPERATORS = "The {word} ceiling that this installation has for this workspace is reached."
_WHOSE = {"workspace": "this workspace", "user": "you in this workspace", "api_key": "this API key"}


class Accounts:
    """Reserves and settles calls, in the transactions of their causes.

    `ceilings` are the operator's, for each workspace.
    """

    def __init__(self, database: Database, ceilings: Ceilings = NO_CEILINGS) -> None:
        self.database = database
        self.ceilings = ceilings
        self._settling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for what is being settled."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=_CLOSING_S)

    def settle_later(self, scope: Scope, bill: Bill, records: Sequence[CallRecord]) -> asyncio.Task[None]:
        """Settle in a transaction of its own, again while the database is away; return the task that does it.

        What cannot be settled is ended by the sweep when its time is over, with an estimate.
        """
        task = asyncio.create_task(self._settle_alone(scope, bill, records), name=f"settle-{bill.id}")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _settle_alone(self, scope: Scope, bill: Bill, records: Sequence[CallRecord]) -> None:
        for pause_s in (*_PAUSES_S, None):
            try:
                async with self.database.unit_of_work(scope) as unit:
                    await self.settle(unit, bill, records)
            except Exception as error:
                if pause_s is None or translate(error) is None:
                    logger.exception("a model call could not be settled", extra={"call_id": str(bill.id)})
                    return
                await asyncio.sleep(pause_s)
            else:
                return

    async def reserve(
        self, unit: UnitOfWork, bill: Bill, estimate: Estimate, *, expires_in: timedelta | None = None
    ) -> None:
        """Set aside what a call costs at most; nothing may be locked after this but by the commit.

        A reservation of the same id is replaced. It stands until it is settled; with `expires_in`, at most so long.
        Raises `OverBudget` when a budget of the workspace, the user or the key has nothing left.
        """
        now = clock.now()
        until = now + expires_in if expires_in else None
        over = await LedgerRepository(unit).reserve(bill, estimate, self.ceilings, at=now, expires_at=until)
        if over is not None:
            raise _over(over)

    async def settle(self, unit: UnitOfWork, bill: Bill, records: Sequence[CallRecord]) -> None:
        """Store records, count what they cost, and give back what was reserved. Doing it twice has one effect.

        Nothing may be locked after this but by the commit.
        """
        for crossed in await LedgerRepository(unit).settle(bill, records, self.ceilings):
            if crossed["operator"]:
                said = "has reached its ceiling" if crossed["level"] == "stop" else "nears its ceiling"
                logger.warning("a workspace %s", said, extra={"workspace": str(bill.workspace_id)})
            await enqueue(unit, NOTICE, dict(crossed), workspace_id=bill.workspace_id)

    async def totals(
        self, unit: UnitOfWork, message_id: UUID, records: Sequence[CallRecord], *, stored: bool
    ) -> Totals:
        """Return what a message used: these records, and with `stored` also the rows that the ledger has besides."""
        totals = Totals.of(records)
        if stored:
            besides = [record.id for record in records]
            totals += await LedgerRepository(unit).totals(unit.scope.workspace_id, message_id, besides=besides)
        return totals


async def abandon_reservations(
    unit: UnitOfWork, workspace_id: UUID, conversation_id: UUID, waiting: Sequence[UUID]
) -> None:
    """Give back what `waiting` calls of a conversation reserved, and let the others' reservations end soon.

    Nothing may be locked after this but by the commit.
    """
    until = clock.now() + _ABANDONED
    await LedgerRepository(unit).abandon(workspace_id, conversation_id, waiting, until=until)


def _over(budget: Any) -> OverBudget:
    period = Period(budget["period"])
    word = "daily" if period is Period.DAY else "monthly"
    details = {"subject": budget["subject"], "period": period.value}
    said = "The {word} budget for {whose} is used up."
    if budget["operator"]:
        said, details["set_by"] = _OPERATORS, "operator"
    return OverBudget(
        said.format(word=word, whose=_WHOSE[budget["subject"]]),
        details=details,
        retry_after_s=seconds_left(period),
    )
