"""Reserving and settling in the database: once each, in any order, across the ends of days, by many at once."""

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.scope import Role, Scope
from parley.usage.accounts import Accounts
from parley.usage.bills import Bill, Estimate
from parley.usage.budgets import BudgetService
from parley.usage.errors import OverBudget
from parley.usage.ledger import CallRecord, CallStatus, Purpose
from parley.usage.periods import Period, resets_at
from parley.usage.schemas import BudgetSet
from parley.usage.sweeping import UnscopedLedger
from tests.chat.conftest import until
from tests.conftest import Account

pytestmark = pytest.mark.usefixtures("swept_by_hand")

DAY_S = 86_400


class Till:
    """One person's calls, and the budgets of their workspace."""

    def __init__(self, app: FastAPI, owner: Account, admin: asyncpg.Connection) -> None:
        self.database: Database = app.state.database
        self.accounts: Accounts = app.state.usage.accounts
        self.admin = admin
        permissions = frozenset({"budgets:manage", "usage:read", "usage:read_all"})
        self.scope = Scope(owner.workspace_id, owner.user_id, Role.OWNER, permissions=permissions)

    def bill(self, id: UUID | None = None) -> Bill:
        return Bill.of(id or new_id(), self.scope, Purpose.STRUCTURED)

    async def budget(self, limit: str, period: Period = Period.DAY, **fields: Any) -> None:
        async with self.database.unit_of_work(self.scope) as unit:
            wanted = BudgetSet(subject="workspace", period=period, limit=Decimal(limit), **fields)
            await BudgetService(unit, self.scope).replace([wanted])

    async def reserve(self, bill: Bill, amount: str, *, expires_in: timedelta | None = None) -> None:
        estimate = Estimate("m", "p", Decimal(amount), input_tokens=7, input_cost=Decimal("0.5"))
        async with self.database.unit_of_work(self.scope) as unit:
            await self.accounts.reserve(unit, bill, estimate, expires_in=expires_in)

    async def settle(self, bill: Bill, *records: CallRecord) -> None:
        async with self.database.unit_of_work(self.scope) as unit:
            await self.accounts.settle(unit, bill, records)

    async def counters(self) -> list[tuple[Any, Any]]:
        """Return what each counter has spent and reserved, by its period."""
        rows = await self.admin.fetch("SELECT spent, reserved FROM budget_counters ORDER BY starts_on, budget_id")
        return [(row["spent"], row["reserved"]) for row in rows]

    async def entries(self) -> list[asyncpg.Record]:
        return list(await self.admin.fetch("SELECT * FROM usage_entries ORDER BY started_at, id"))

    async def notices(self) -> list[str]:
        rows = await self.admin.fetch("SELECT payload->>'level' AS level FROM jobs WHERE kind = 'usage.notice'")
        return [row["level"] for row in rows]


@pytest.fixture
def till(app: FastAPI, alice: Account, admin: asyncpg.Connection) -> Till:
    return Till(app, alice, admin)


def used(cost: str, *, id: UUID | None = None) -> CallRecord:
    now = clock.now()
    return CallRecord(
        id or new_id(), "m", "p", 1, CallStatus.COMPLETED, None, 10, 2, 5, 0, False, False, Decimal(cost), now, now
    )  # fmt: skip


async def test_settling_twice_has_one_effect(till: Till) -> None:
    await till.budget("10")
    bill, record = till.bill(), used("2")
    await till.reserve(bill, "4")
    assert await till.counters() == [(0, 4)]
    await till.settle(bill, record)
    await till.settle(bill, record)
    assert await till.counters() == [(2, 0)]
    assert len(await till.entries()) == 1


async def test_settling_twice_at_once_has_one_effect(till: Till) -> None:
    await till.budget("10")
    bill, record = till.bill(), used("2")
    await till.reserve(bill, "4")
    await asyncio.gather(*(till.settle(bill, record) for _ in range(8)))
    assert await till.counters() == [(2, 0)]
    assert len(await till.entries()) == 1


async def test_what_was_begun_is_counted_once_with_what_came_later(till: Till) -> None:
    await till.budget("10")
    bill, first, second = till.bill(), used("1"), used("2")
    await till.reserve(bill, "4")
    await till.settle(bill, first)
    await till.reserve(bill, "5")
    assert await till.counters() == [(1, 5)]
    await till.settle(bill, first, second)
    assert await till.counters() == [(3, 0)]


async def test_a_reservation_of_the_same_id_is_replaced(till: Till) -> None:
    await till.budget("10")
    bill = till.bill()
    await till.reserve(bill, "9")
    # Its own is not in its way.
    await till.reserve(bill, "6")
    assert await till.counters() == [(0, 6)]
    await till.settle(bill)
    assert await till.counters() == [(0, 0)]


async def test_nothing_is_admitted_once_nothing_is_left(till: Till) -> None:
    await till.budget("10")
    await till.reserve(till.bill(), "9.99999999")
    # Less than the limit is reserved: this is the one call that may pass it.
    await till.reserve(till.bill(), "5")
    with pytest.raises(OverBudget) as refused:
        await till.reserve(till.bill(), "0")
    left = resets_at(Period.DAY, clock.now()) - clock.now()
    assert refused.value.retry_after_s is not None
    assert abs(refused.value.retry_after_s - left.total_seconds()) <= 2
    assert refused.value.details == {"subject": "workspace", "period": "day"}
    assert await till.counters() == [(0, Decimal("14.99999999"))]


async def test_a_new_day_begins_with_nothing_spent(till: Till) -> None:
    await till.budget("10")
    await till.settle(till.bill(), used("10"))
    with pytest.raises(OverBudget):
        await till.reserve(till.bill(), "1")
    with clock.shifted(DAY_S):
        await till.reserve(till.bill(), "1")
    assert await till.counters() == [(10, 0), (0, 1)]


async def test_a_call_over_midnight_gives_back_to_the_day_that_it_reserved_from(till: Till) -> None:
    await till.budget("10")
    bill = till.bill()
    await till.reserve(bill, "4")
    begun = used("1")
    with clock.shifted(DAY_S):
        # Its second step is of the next day, and reserved there.
        await till.settle(bill, begun)
        await till.reserve(bill, "5")
        assert await till.counters() == [(1, 0), (0, 5)]
        await till.settle(bill, begun, used("2"))
    assert await till.counters() == [(1, 0), (2, 0)]


async def test_a_month_has_all_its_days(till: Till) -> None:
    first = datetime(2027, 1, 1, 12, tzinfo=UTC).timestamp() - clock.timestamp()
    with clock.shifted(first):
        await till.budget("10", Period.MONTH)
        await till.settle(till.bill(), used("3"))
    with clock.shifted(first + 30 * DAY_S):
        await till.settle(till.bill(), used("4"))
    with clock.shifted(first + 31 * DAY_S):
        await till.settle(till.bill(), used("5"))
    assert await till.counters() == [(7, 0), (5, 0)]


async def test_a_budget_that_is_made_later_begins_with_what_was_spent(till: Till) -> None:
    with clock.shifted(-40 * DAY_S):
        await till.settle(till.bill(), used("1"))
    await till.settle(till.bill(), used("2"))
    running = till.bill()
    await till.reserve(running, "5")
    await till.budget("10")
    # What began before has reserved nothing from it, and is counted all the same.
    await till.settle(running, used("3"))
    assert await till.counters() == [(5, 0)]


async def test_a_budget_that_goes_while_a_call_runs(till: Till) -> None:
    await till.budget("10")
    bill = till.bill()
    await till.reserve(bill, "5")
    async with till.database.unit_of_work(till.scope) as unit:
        await BudgetService(unit, till.scope).replace([])
    await till.settle(bill, used("3"))
    assert (await till.counters(), len(await till.entries())) == ([], 1)


# -- telling people ------------------------------------------------------------------------------------------------


async def test_people_are_told_once_at_the_alert_and_once_at_the_end(till: Till) -> None:
    await till.budget("10")
    told: list[list[str]] = []
    for cost in ("7.9", "0.1", "1.9", "0.1", "5"):
        await till.settle(till.bill(), used(cost))
        told.append(await till.notices())
    assert [len(seen) for seen in told] == [0, 1, 1, 2, 2]
    assert sorted(told[-1]) == ["alert", "stop"]
    # Each day has its own.
    with clock.shifted(DAY_S):
        await till.settle(till.bill(), used("8.5"))
    assert sorted(await till.notices()) == ["alert", "alert", "stop"]


async def test_a_call_that_passes_both_marks_says_the_one(till: Till) -> None:
    await till.budget("10", alert_at=Decimal("0.5"))
    await till.settle(till.bill(), used("11"))
    assert await till.notices() == ["stop"]


async def test_whoever_raises_a_budget_is_told_again(till: Till) -> None:
    await till.budget("10")
    await till.settle(till.bill(), used("10"))
    await till.budget("20")
    assert await till.notices() == ["stop"]
    await till.settle(till.bill(), used("7"))
    assert sorted(await till.notices()) == ["alert", "stop"]


async def test_admins_find_the_notice_in_their_inbox(till: Till, alice: Account) -> None:
    await till.budget("10")
    await till.settle(till.bill(), used("9"))
    found: list[asyncpg.Record] = []

    async def told() -> bool:
        found[:] = await till.admin.fetch(
            "SELECT d->>'kind' AS kind, d->>'text' AS text, d->'budget'->>'spent' AS spent FROM channel_events"
            " WHERE e = 'notice' AND channel = $1",
            f"user:{alice.user_id}",
        )
        return bool(found)

    await until(told)
    assert [tuple(row) for row in found] == [
        ("budget_alert", "The workspace's daily budget is used up to 90%.", "9.00000000")
    ]


# -- what is left behind -------------------------------------------------------------------------------------------


async def test_a_reservation_whose_process_is_gone_ends_as_a_lost_call(till: Till) -> None:
    await till.budget("10")
    ledger = UnscopedLedger(till.database)
    lost, running = till.bill(), till.bill()
    await till.reserve(lost, "4", expires_in=timedelta(seconds=60))
    await till.reserve(running, "3", expires_in=timedelta(seconds=600))
    assert await ledger.end_expired() == 0
    with clock.shifted(61):
        assert await ledger.end_expired() == 1
        assert await ledger.end_expired() == 0
    assert await till.counters() == [(Decimal("0.5"), 3)]
    (entry,) = await till.entries()
    assert (entry["status"], entry["estimated"], entry["input_tokens"], entry["cost"]) == (
        "lost", True, 7, Decimal("0.5"),
    )  # fmt: skip


async def test_a_lost_call_that_uses_a_budget_up_is_told_too(till: Till) -> None:
    await till.reserve(till.bill(), "4", expires_in=timedelta(seconds=60))
    await till.budget("0.5")
    with clock.shifted(61):
        assert await UnscopedLedger(till.database).end_expired() == 1
    assert await till.notices() == ["stop"]


async def test_a_lost_call_is_in_the_ledger_also_without_budgets(till: Till) -> None:
    await till.reserve(till.bill(), "4", expires_in=timedelta(seconds=60))
    with clock.shifted(61):
        assert await UnscopedLedger(till.database).end_expired() == 1
    assert [row["status"] for row in await till.entries()] == ["lost"]


async def test_counters_can_be_brought_in_line_with_the_ledger(till: Till) -> None:
    await till.budget("10")
    bill = till.bill()
    await till.reserve(bill, "4")
    await till.settle(till.bill(), used("2"))
    ledger = UnscopedLedger(till.database)
    assert await ledger.reconcile() == []
    await till.admin.execute("UPDATE budget_counters SET spent = 9, reserved = 1")
    (found,) = await ledger.reconcile(till.scope.workspace_id)
    assert (found["was_spent"], found["was_reserved"], found["spent"], found["reserved"]) == (9, 1, 2, 4)
    assert await till.counters() == [(2, 4)]
    assert await ledger.reconcile(new_id()) == []


async def test_a_budget_that_was_made_a_moment_ago_is_counted_once_more(till: Till) -> None:
    await till.budget("10")
    await till.settle(till.bill(), used("2"))
    await till.admin.execute("UPDATE budget_counters SET spent = 0")
    ledger = UnscopedLedger(till.database)
    assert await ledger.reconcile_fresh() == []
    with clock.shifted(60):
        assert len(await ledger.reconcile_fresh()) == 1
    assert await till.counters() == [(2, 0)]


async def test_the_app_can_add_to_the_ledger_and_change_nothing(till: Till) -> None:
    await till.settle(till.bill(), used("2"))
    for statement in ("UPDATE usage_entries SET cost = 0", "DELETE FROM usage_entries"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with till.database.unit_of_work(till.scope) as unit:
                await (await unit.driver()).execute(statement)


# -- all at once ---------------------------------------------------------------------------------------------------


async def _life(till: Till, choose: random.Random, kept: list[CallRecord]) -> None:
    """One call, as calls come: reserved, in one step or some, settled once or twice, or given up."""
    bill = till.bill()
    records: list[CallRecord] = []
    for _ in range(choose.randint(1, 3)):
        try:
            await till.reserve(bill, f"{choose.uniform(0, 3):.8f}")
        except OverBudget:
            break
        if choose.random() < 0.2:
            break
        records.append(used(f"{choose.uniform(0, 2):.8f}"))
        if choose.random() < 0.5:
            await till.settle(bill, *records)
    for _ in range(choose.randint(1, 2)):
        await till.settle(bill, *records)
    kept += records


@pytest.mark.parametrize("seed", range(4))
async def test_counters_are_the_sum_of_the_ledger_whatever_happens_at_once(till: Till, seed: int) -> None:
    choose = random.Random(seed)
    async with till.database.unit_of_work(till.scope) as unit:
        wanted = [
            BudgetSet(subject="workspace", period=Period.DAY, limit=Decimal(25)),
            BudgetSet(subject="workspace", period=Period.MONTH, limit=Decimal(30)),
            BudgetSet(subject="user", subject_id=till.scope.user_id, period=Period.DAY, limit=Decimal(20)),
        ]
        await BudgetService(unit, till.scope).replace(wanted)
    kept: list[CallRecord] = []
    lives: Sequence[Any] = [_life(till, random.Random(choose.random()), kept) for _ in range(60)]
    await asyncio.gather(*lives)
    total = sum((record.cost for record in kept), Decimal(0))
    assert await till.counters() == [(total, 0)] * 3
    assert {row["id"]: row["cost"] for row in await till.entries()} == {record.id: record.cost for record in kept}
    assert await till.admin.fetchval("SELECT count(*) FROM usage_reservations") == 0
    assert await UnscopedLedger(till.database).reconcile() == []
