"""Operator ceilings: over every workspace, above its budgets, about the installation's keys, and past nobody's rights."""

import asyncio
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider
from parley.core import clock
from parley.core.db import DatabaseUrls
from parley.core.ids import new_id
from parley.core.revocations import Revocations
from parley.core.scope import Role, Scope
from parley.core.settings import LimitSettings, LlmSettings, Settings, SettingsInvalid, load_settings
from parley.tenancy.operators import NoSuchWorkspace, UnscopedWorkspaceOperators
from parley.usage.accounts import Accounts
from parley.usage.bills import Bill, Estimate
from parley.usage.ceilings import Ceilings
from parley.usage.errors import OverBudget
from parley.usage.ledger import CallRecord, CallStatus, Purpose
from parley.usage.operators import UnscopedCeilings
from parley.usage.periods import Period
from parley.usage.sweeping import UnscopedLedger
from tests.chat.books import Books, set_budgets, workspace_budget
from tests.chat.conftest import Talk, start_talk, until
from tests.conftest import Account, SignUp, make_settings, running
from tests.tenancy.team import join

pytestmark = pytest.mark.usefixtures("swept_by_hand")

DAY_S = 86_400
TEN = Ceilings(day=Decimal(10))


class Desk:
    """One workspace's calls under the operator's ceilings."""

    def __init__(self, app: FastAPI, owner: Account, admin: asyncpg.Connection) -> None:
        self.app = app
        self.database = app.state.database
        self.admin = admin
        self.scope = Scope(owner.workspace_id, owner.user_id, Role.OWNER)
        self.ceilings = UnscopedCeilings(
            self.database, UnscopedWorkspaceOperators(self.database, Revocations()), app.state.ceilings
        )

    def say(self, ceilings: Ceilings) -> None:
        """Change what the settings of the running server say."""
        self.app.state.ceilings = self.app.state.usage.accounts.ceilings = ceilings

    async def reserve(self, amount: str = "4", *, own_key: bool = False, bill: Bill | None = None) -> Bill:
        bill = bill or Bill.of(new_id(), self.scope, Purpose.STRUCTURED)
        cost = Decimal("0.5")
        estimate = Estimate("m", "p", Decimal(amount), 7, cost, own_key=own_key, by_operator=not own_key)
        async with self.database.unit_of_work(self.scope) as unit:
            await self._accounts.reserve(unit, bill, estimate, expires_in=timedelta(minutes=1))
        return bill

    async def settle(self, bill: Bill, *costs: str, own_key: bool = False) -> None:
        now = clock.now()
        records = [
            CallRecord(
                new_id(), "m", "p", 1, CallStatus.COMPLETED, None, 10, 2, 5, 0, False, own_key, Decimal(cost), now, now
            )
            for cost in costs
        ]
        async with self.database.unit_of_work(self.scope) as unit:
            await self._accounts.settle(unit, bill, records)

    async def spend(self, cost: str, *, own_key: bool = False) -> None:
        await self.settle(await self.reserve("0", own_key=own_key), cost, own_key=own_key)

    async def counters(self) -> list[tuple[Any, ...]]:
        """Return period, spent and reserved of each operator's counter."""
        rows = await self.admin.fetch(
            "SELECT b.period, c.spent, c.reserved FROM budget_counters c"
            " JOIN budgets b ON b.workspace_id = c.workspace_id AND b.id = c.budget_id"
            " WHERE b.operator ORDER BY c.starts_on, b.period"
        )
        return [tuple(row) for row in rows]

    @property
    def _accounts(self) -> Accounts:
        found: Accounts = self.app.state.usage.accounts
        return found


@pytest.fixture
def desk(app: FastAPI, alice: Account, admin: asyncpg.Connection) -> Desk:
    made = Desk(app, alice, admin)
    made.say(TEN)
    return made


async def test_a_workspace_without_budgets_is_bound(desk: Desk) -> None:
    await desk.settle(await desk.reserve("4"), "9.5")
    last = await desk.reserve("4")
    with pytest.raises(OverBudget) as refused:
        await desk.reserve("0")
    assert refused.value.details == {"subject": "workspace", "period": "day", "set_by": "operator"}
    assert refused.value.detail == "The daily ceiling that this installation has for this workspace is reached."
    assert await desk.counters() == [("day", Decimal("9.5"), 4)]
    await desk.settle(last)
    assert await desk.counters() == [("day", Decimal("9.5"), 0)]
    with clock.shifted(DAY_S):
        await desk.reserve("4")


async def test_of_many_at_once_those_are_admitted_that_fit(desk: Desk) -> None:
    """Forty at once, the very first of the workspace: each of them may be the one that makes the counter."""
    answers = await asyncio.gather(*(desk.reserve("2") for _ in range(40)), return_exceptions=True)
    assert sum(isinstance(answer, Bill) for answer in answers) == 5
    assert {type(answer) for answer in answers} == {Bill, OverBudget}
    assert await desk.counters() == [("day", 0, 10)]
    assert await desk.admin.fetchval("SELECT count(*) FROM budgets WHERE operator") == 1


async def test_what_was_spent_before_there_was_a_ceiling_counts(desk: Desk) -> None:
    desk.say(Ceilings())
    await desk.spend("9")
    assert await desk.counters() == []
    desk.say(Ceilings(day=Decimal(10), month=Decimal(9)))
    with pytest.raises(OverBudget) as refused:
        await desk.reserve()
    assert refused.value.details["period"] == "month"


async def test_a_change_of_the_settings_holds_at_once(desk: Desk) -> None:
    await desk.spend("10")
    with pytest.raises(OverBudget):
        await desk.reserve()
    desk.say(Ceilings(day=Decimal(11)))
    await desk.spend("1")
    with pytest.raises(OverBudget):
        await desk.reserve()
    desk.say(Ceilings())
    await desk.reserve()


async def test_calls_by_a_key_of_the_workspaces_own_are_not_the_operators(desk: Desk, books: Books) -> None:
    await desk.spend("50", own_key=True)
    await desk.spend("10")
    with pytest.raises(OverBudget):
        await desk.reserve()
    await desk.reserve("4", own_key=True)
    assert await desk.counters() == [("day", 10, 0)]
    assert [(row["cost"], row["own_key"]) for row in await books.entries()] == [(50, True), (10, False)]
    assert await UnscopedLedger(desk.database, TEN).reconcile() == []


async def test_a_call_whose_fallback_is_the_operators_is_bound_and_counted_by_who_answered(desk: Desk) -> None:
    bill = await desk.reserve("4")
    await desk.settle(bill, "3", own_key=True)
    assert await desk.counters() == [("day", 0, 0)]


async def test_what_was_admitted_today_stays_admitted_and_tomorrow_it_is_asked_anew(desk: Desk) -> None:
    """A reply that waited is reserved again when it begins, beside others that have passed the ceiling since."""
    waiting = [await desk.reserve(amount) for amount in ("5", "4.9", "100")]
    for bill in waiting:
        await desk.reserve("6", bill=bill)
    assert await desk.counters() == [("day", 0, 18)]
    with clock.shifted(DAY_S):
        await desk.spend("10")
        with pytest.raises(OverBudget):
            await desk.reserve("6", bill=waiting[0])


async def test_people_are_told_again_of_a_ceiling_that_was_raised(desk: Desk) -> None:
    async def notices() -> list[str]:
        rows = await desk.admin.fetch("SELECT payload->>'level' AS level FROM jobs WHERE kind = 'usage.notice'")
        return sorted(row["level"] for row in rows)

    await desk.spend("10")
    assert await notices() == ["stop"]
    desk.say(Ceilings(day=Decimal(20)))
    await desk.spend("5")
    assert await notices() == ["stop"]
    await desk.spend("1")
    assert await notices() == ["alert", "stop"]
    await desk.spend("4")
    assert await notices() == ["alert", "stop", "stop"]
    # Saying the same again is no news.
    desk.say(Ceilings(day=Decimal(25)))
    await desk.spend("1")
    for _ in range(2):
        await desk.ceilings.set(desk.scope.workspace_id, {Period.DAY: Decimal(25)})
        await desk.spend("0.5")
    assert await notices() == ["alert", "stop", "stop"]


async def test_a_lost_call_of_an_own_key_is_the_workspaces(desk: Desk, books: Books) -> None:
    await desk.reserve("4", own_key=True)
    await desk.reserve("4")
    with clock.shifted(DAY_S):
        assert await UnscopedLedger(desk.database, TEN).end_expired() == 2
    assert sorted((row["cost"], row["own_key"]) for row in await books.entries()) == [
        (Decimal("0.5"), False), (Decimal("0.5"), True),
    ]  # fmt: skip
    assert (await desk.counters())[0] == ("day", Decimal("0.5"), 0)


# -- single workspaces -------------------------------------------------------------------------------------------------


async def test_a_workspace_may_have_more_or_less_than_the_others(desk: Desk, bob: Account) -> None:
    await desk.spend("10")
    shown = await desk.ceilings.set(desk.scope.workspace_id, {Period.DAY: Decimal(20)})
    assert shown == [
        {"period": "day", "ceiling": 20, "own": True, "spent": 10, "reserved": 0},
        {"period": "month", "ceiling": None, "own": False, "spent": 10, "reserved": 0},
    ]
    await desk.spend("9")
    await desk.ceilings.set(desk.scope.workspace_id, {Period.DAY: Decimal(0)})
    with pytest.raises(OverBudget):
        await desk.reserve()
    # The other one has what the settings say.
    desk.scope = Scope(bob.workspace_id, bob.user_id, Role.OWNER)
    await desk.spend("9.99")
    await desk.spend("1")
    with pytest.raises(OverBudget):
        await desk.reserve()


async def test_default_is_what_the_settings_say(desk: Desk) -> None:
    workspace = desk.scope.workspace_id
    await desk.ceilings.set(workspace, {Period.DAY: Decimal(0), Period.MONTH: Decimal(1)})
    with pytest.raises(OverBudget):
        await desk.reserve()
    await desk.ceilings.set(workspace, {Period.DAY: None, Period.MONTH: None})
    await desk.spend("9")
    await desk.reserve()


async def test_a_change_is_in_the_workspaces_audit_log(desk: Desk, alice: Account) -> None:
    await desk.ceilings.set(desk.scope.workspace_id, {Period.MONTH: Decimal("2.50")})
    row = await desk.admin.fetchrow(
        "SELECT actor, details::text AS details FROM audit_events WHERE workspace_id = $1 AND action = $2",
        alice.workspace_id, "ceilings.changed",
    )  # fmt: skip
    assert tuple(row) == ("operator", '{"month":"2.50"}')


async def test_there_is_none_for_a_workspace_that_is_not_there(desk: Desk) -> None:
    with pytest.raises(NoSuchWorkspace):
        await desk.ceilings.set(uuid4(), {Period.DAY: Decimal(1)})
    with pytest.raises(NoSuchWorkspace):
        await desk.ceilings.show(uuid4())


# -- what a workspace can do about it: nothing -------------------------------------------------------------------------


async def test_an_owner_sees_the_ceiling_and_cannot_lift_it(
    desk: Desk, alice: Account, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    desk.say(Ceilings(day=Decimal(10), month=Decimal(100)))
    listed = (await alice.http.get("/api/v1/budgets")).json()["data"]
    assert [(row["subject"], row["period"], row["limit"], row["set_by"]) for row in listed] == [
        ("workspace", "day", "10.00000000", "operator"),
        ("workspace", "month", "100.00000000", "operator"),
    ]
    await desk.spend("10")
    assert [row["set_by"] for row in await set_budgets(alice, workspace_budget("1000"))] == [
        "workspace",
        *["operator"] * 2,
    ]
    with pytest.raises(OverBudget):
        await desk.reserve()
    left = await set_budgets(alice)
    assert [(row["period"], row["remaining"]) for row in left] == [("day", "0.00000000"), ("month", "90.00000000")]
    viewer = await join(await sign_up(), alice.workspace_id, Role.VIEWER, admin)
    assert (await viewer.http.get("/api/v1/budgets")).json()["data"] == left


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE budgets SET ceiling = 1000 WHERE operator",
        "UPDATE budgets SET operator = false, ceiling = 1000",
        "DELETE FROM budgets",
    ],
)
async def test_the_role_of_requests_cannot_change_what_an_operator_has_set(desk: Desk, statement: str) -> None:
    await desk.ceilings.set(desk.scope.workspace_id, {Period.DAY: Decimal(5)})
    async with desk.database.unit_of_work(desk.scope) as unit:
        assert (await (await unit.driver()).execute(statement)).endswith(" 0")
    assert await desk.admin.fetchval("SELECT ceiling FROM budgets") == 5


@pytest.mark.parametrize(
    "statement",
    [
        """INSERT INTO budgets (workspace_id, id, period, ceiling, alert_at, operator)
           VALUES ($1, $2, 'month', 1000, 0.8, true)""",
        "UPDATE budgets SET operator = true",
    ],
)
async def test_nor_set_it_itself(desk: Desk, alice: Account, statement: str) -> None:
    await set_budgets(alice, workspace_budget("7"))
    arguments = (desk.scope.workspace_id, uuid4()) if "$1" in statement else ()
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with desk.database.unit_of_work(desk.scope) as unit:
            await (await unit.driver()).execute(statement, *arguments)


# -- over HTTP, from the settings --------------------------------------------------------------------------------------

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
models:
  gpt: {{provider: openai, name: fake, context: 1000, max_output_tokens: 100, retries: 0, price: {{input: 1, output: 10}}}}
aliases:
  default: [gpt]
"""


@pytest.fixture
def costly(tmp_path: Path, urls: DatabaseUrls, provider: FakeProvider) -> Settings:
    """Settings whose models cost something, and that let a workspace spend a tenth of a cent a day."""
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    llm = LlmSettings(registry=path, titles=False, workspace_cost_per_day=Decimal("0.001"))
    return make_settings(tmp_path, urls, llm=llm)


async def used_up(person: Account) -> tuple[Account, Talk, UUID]:
    """Spend what the person's workspace may; return them with the conversation and its reply."""
    talk = await start_talk(person)
    _, reply = await talk.send("deltas=100 rate=0")
    await talk.ended(reply)
    return person, talk, reply


async def test_sends_and_calls_are_refused_once_it_is_reached(
    costly: Settings, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    async with running(costly) as app:
        eve, talk, reply = await used_up(await sign_up(app=app))
        assert (await admin.fetchval("SELECT sum(spent) FROM budget_counters")) >= Decimal("0.001")
        answer = await eve.http.post(talk.path, json={"text": "hi"}, headers={"Idempotency-Key": str(uuid4())})
        assert (answer.status_code, answer.json()["error"]) == (429, "over_budget")
        assert answer.json()["details"]["set_by"] == "operator"
        assert 1 <= int(answer.headers["Retry-After"]) <= DAY_S
        again = await eve.http.post(
            f"/api/v1/replies/{reply}/regenerate", json={}, headers={"Idempotency-Key": str(uuid4())}
        )
        assert (again.status_code, again.json()["error"]) == (429, "over_budget")
        # The notice says whose limit it is.
        await until(lambda: _told(admin))
        data = await admin.fetchval(
            "SELECT d->>'text' || ' ' || (d->'budget'->>'set_by') FROM channel_events WHERE e = 'notice'"
        )
        assert data == "The workspace's daily ceiling is used up. operator"


async def test_a_reply_that_waited_is_looked_at_again_when_it_begins(
    costly: Settings, sign_up: SignUp, provider: FakeProvider
) -> None:
    """Admitted by a key of the workspace's own, which is gone when its turn comes: it would be the operator's."""
    async with running(costly) as app:
        eve, talk, _ = await used_up(await sign_up(app=app))
        keys = "/api/v1/provider-keys/openai"
        assert (await eve.http.put(keys, json={"key": "a-key-of-its-own"})).status_code == 200
        _, running_reply = await talk.send("deltas=100 rate=20 own")
        _, waiting = await talk.send("deltas=3 rate=0 never", on_active="queue")
        assert (await eve.http.delete(keys)).status_code == 204
        assert (await eve.http.post(f"/api/v1/replies/{running_reply}/cancel")).status_code == 202
        ended = await talk.ended(waiting)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "over_budget")
        assert not any("never" in str(request.body["messages"][-1]) for request in provider.requests)


async def _told(admin: asyncpg.Connection) -> bool:
    return bool(await admin.fetchval("SELECT count(*) FROM channel_events WHERE e = 'notice'"))


@pytest.mark.parametrize(("value", "expected"), [("0", None), ("", None), ("0.50", Decimal("0.5"))])
def test_zero_is_no_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: Decimal | None
) -> None:
    monkeypatch.setenv("PARLEY_LLM_WORKSPACE_COST_PER_MONTH", value)
    ceilings = Ceilings.from_settings(load_settings(tmp_path).llm)
    assert ceilings == Ceilings(month=expected)
    assert bool(ceilings) is (expected is not None)


@pytest.mark.parametrize("value", ["-1", "much", "1e12", "0.000000001"])
def test_a_ceiling_that_is_no_amount_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PARLEY_LLM_WORKSPACE_COST_PER_DAY", value)
    with pytest.raises(SettingsInvalid, match="PARLEY_LLM_WORKSPACE_COST_PER_DAY"):
        load_settings(tmp_path)


# -- one person, many workspaces -----------------------------------------------------------------------------------------


async def test_a_person_makes_only_so_many_workspaces_whatever_becomes_of_them(
    tmp_path: Path, urls: DatabaseUrls, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    settings = make_settings(tmp_path, urls, rate_limits="on", limits=LimitSettings(workspaces_per_month=4))
    async with running(settings) as app:
        eve, other = await sign_up(app=app), await sign_up(app=app)

        async def make(person: Account) -> Any:
            body, key = {"name": "One more"}, {"Idempotency-Key": str(uuid4())}
            return await person.http.post("/api/v1/workspaces", json=body, headers=key)

        answers = await asyncio.gather(*(make(eve) for _ in range(8)))
        made = [UUID(answer.json()["data"]["id"]) for answer in answers if answer.status_code == 201]
        assert len(made) == 4
        refused = next(answer for answer in answers if answer.status_code != 201)
        assert (refused.status_code, refused.json()["error"]) == (429, "too_many_workspaces")
        assert 29 * DAY_S < int(refused.headers["Retry-After"]) <= 30 * DAY_S
        # Deleted ones count: their ledgers are gone with them.
        for workspace in made:
            await UnscopedWorkspaceOperators(app.state.database, Revocations()).delete(workspace)
        assert (await make(eve)).status_code == 429
        assert (await make(other)).status_code == 201
        await admin.execute("UPDATE audit_events SET at = at - interval '30 days' WHERE user_id = $1", eve.user_id)
        assert (await make(eve)).status_code == 201
