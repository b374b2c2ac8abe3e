"""Usage and budgets over HTTP."""

import csv
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.scope import Role
from parley.usage.reports import cell
from tests.conftest import Account, SignUp
from tests.tenancy.team import Team, make_team

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
async def team(app: FastAPI, sign_up: SignUp, admin: asyncpg.Connection) -> Team:
    return await make_team(app, sign_up, admin)


async def spend(
    admin: asyncpg.Connection, account: Account, cost: str, *, at: datetime = NOON, model: str = "gpt",
    user_id: UUID | None = None, key_id: UUID | None = None, purpose: str = "reply",
) -> None:  # fmt: skip
    """Put a call into the ledger."""
    await admin.execute(
        "INSERT INTO usage_entries (workspace_id, id, user_id, key_id, purpose, provider, model, attempt, status,"
        " input_tokens, cached_tokens, output_tokens, images, estimated, cost, started_at, ended_at)"
        " VALUES ($1, $2, $3, $4, $5, 'p', $6, 1, 'completed', 10, 4, 3, 0, false, $7, $8, $8)",
        account.workspace_id, uuid4(), user_id or account.user_id, key_id, purpose, model, Decimal(cost), at,
    )  # fmt: skip


async def usage(account: Account, group_by: str, **parameters: str) -> list[dict[str, Any]]:
    days = {"from": "2026-11-01", "to": "2026-11-30"}
    answer = await account.http.get("/api/v1/usage", params={"group_by": group_by, **days, **parameters})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def test_usage_by_day_model_and_user(team: Team, admin: asyncpg.Connection) -> None:
    owner, member = team.owner, team.people[Role.MEMBER]
    await spend(admin, owner, "1.5", at=NOON - timedelta(days=1))
    await spend(admin, owner, "0.00000001", model="claude")
    await spend(admin, member, "2")
    assert await usage(owner, "day") == [
        {
            "day": "2026-11-19", "calls": 1, "input_tokens": 10, "cached_tokens": 4, "output_tokens": 3,
            "cost": "1.50000000",
        },
        {
            "day": "2026-11-20", "calls": 2, "input_tokens": 20, "cached_tokens": 8, "output_tokens": 6,
            "cost": "2.00000001",
        },
    ]  # fmt: skip
    by_model = await usage(owner, "model")
    assert [(row["model"], row["calls"], row["cost"]) for row in by_model] == [
        ("gpt", 2, "3.50000000"), ("claude", 1, "0.00000001"),
    ]  # fmt: skip
    by_user = await usage(owner, "user")
    assert [(row["user_id"], row["cost"]) for row in by_user] == [
        (str(member.user_id), "2.00000000"), (str(owner.user_id), "1.50000001"),
    ]  # fmt: skip


async def test_days_are_those_of_utc_and_both_ends_belong_to_it(team: Team, admin: asyncpg.Connection) -> None:
    midnight = datetime(2026, 11, 20, tzinfo=UTC)
    for at in (midnight - timedelta(microseconds=1), midnight, midnight + timedelta(days=1)):
        await spend(admin, team.owner, "1", at=at)
    for first, last, days in (
        ("2026-11-20", "2026-11-20", ["2026-11-20"]),
        ("2026-11-19", "2026-11-20", ["2026-11-19", "2026-11-20"]),
        ("2026-11-21", "2026-11-21", ["2026-11-21"]),
    ):
        rows = await usage(team.owner, "day", **{"from": first, "to": last})
        assert [row["day"] for row in rows] == days


async def test_the_last_thirty_days_are_the_default(team: Team, admin: asyncpg.Connection) -> None:
    now = clock.now()
    await spend(admin, team.owner, "1", at=now)
    await spend(admin, team.owner, "1", at=now - timedelta(days=29))
    await spend(admin, team.owner, "1", at=now - timedelta(days=30))
    answer = await team.owner.http.get("/api/v1/usage")
    assert len(answer.json()["data"]) == 2


async def test_usage_can_be_narrowed(team: Team, admin: asyncpg.Connection) -> None:
    owner, key = team.owner, uuid4()
    await spend(admin, owner, "1", purpose="title")
    await spend(admin, owner, "2", key_id=key)
    await spend(admin, owner, "4", model="claude")
    await spend(admin, team.people[Role.MEMBER], "8")
    for parameters, cost in (
        ({"purpose": "title"}, 1),
        ({"key_id": str(key)}, 2),
        ({"model": "claude"}, 4),
        ({"user_id": str(owner.user_id)}, 7),
        ({"user_id": str(owner.user_id), "model": "gpt", "purpose": "reply"}, 2),
    ):
        rows = await usage(owner, "day", **parameters)
        assert [Decimal(row["cost"]) for row in rows] == [cost], parameters
    assert await usage(owner, "day", model="nobody") == []


@pytest.mark.parametrize("role", [Role.MEMBER, Role.VIEWER])
async def test_members_see_their_own(team: Team, admin: asyncpg.Connection, role: Role) -> None:
    person = team.people[role]
    await spend(admin, team.owner, "1")
    await spend(admin, person, "2")
    assert [row["cost"] for row in await usage(person, "day")] == ["2.00000000"]
    assert [row["user_id"] for row in await usage(person, "user")] == [str(person.user_id)]
    answer = await person.http.get("/api/v1/usage", params={"user_id": str(team.owner.user_id)})
    assert (answer.status_code, answer.json()["details"]) == (403, {"permission": "usage:read_all"})


async def test_admins_see_everybodys_and_no_other_workspaces(
    team: Team, admin: asyncpg.Connection, alice: Account
) -> None:
    await spend(admin, team.people[Role.MEMBER], "1")
    assert len(await usage(team.people[Role.ADMIN], "day")) == 1
    assert await usage(alice, "day") == []


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"from": "2026-11-02", "to": "2026-11-01"}, "from"),
        ({"from": "2025-11-01", "to": "2026-11-02"}, "from"),
        ({"from": "yesterday"}, "from"),
        ({"to": "0"}, "to"),
        ({"to": "0001-01-01"}, None),
        ({"from": "9999-12-31", "to": "9999-12-31"}, "from"),
        ({"group_by": "provider"}, "group_by"),
        ({"format": "xlsx"}, "format"),
        ({"purpose": "fun"}, "purpose"),
    ],
)
async def test_what_cannot_be_summed_up_is_refused(alice: Account, parameters: dict[str, str], field: str) -> None:
    answer = await alice.http.get("/api/v1/usage", params=parameters)
    if field is None:
        assert answer.status_code == 200, answer.text
    else:
        assert (answer.status_code, answer.json()["details"]["field"]) == (422, field)


# -- CSV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [{"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}])
async def test_usage_as_csv(alice: Account, admin: asyncpg.Connection, ask: dict[str, Any]) -> None:
    now = clock.now()
    await spend(admin, alice, "0.00000001", model='=cmd|"/c calc"!A1', at=now)
    await spend(admin, alice, "0.00000002", model="gpt, large", at=now)
    params = {"group_by": "model", **ask.get("params", {})}
    answer = await alice.http.get("/api/v1/usage", params=params, headers=ask.get("headers", {}))
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="usage-by-model.csv"'
    rows = list(csv.reader(io.StringIO(answer.text)))
    assert rows == [
        ["model", "calls", "input_tokens", "cached_tokens", "output_tokens", "cost"],
        ["gpt, large", "1", "10", "4", "3", "0.00000002"],
        ['\'=cmd|"/c calc"!A1', "1", "10", "4", "3", "0.00000001"],
    ]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("text/csv;q=0", "application/json"),
        ("text/csv; q=0.000, */*", "application/json"),
        ("text/csvx", "application/json"),
        ("*/*", "application/json"),
        ("text/csv;q=0.5", "text/csv; charset=utf-8"),
        ("application/pdf, Text/CSV ; q=0.05", "text/csv; charset=utf-8"),
    ],
)
async def test_a_table_is_given_to_whoever_would_take_one(alice: Account, accept: str, kind: str) -> None:
    answer = await alice.http.get("/api/v1/usage", headers={"Accept": accept})
    assert answer.headers["Content-Type"] == kind


async def test_json_is_given_to_whoever_asks_for_it(alice: Account) -> None:
    answer = await alice.http.get("/api/v1/usage", params={"format": "json"}, headers={"Accept": "text/csv"})
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert cell(text) == f"'{text}"
    assert cell(f"a{text}") == f"a{text}"
    assert cell(None) == ""


# -- budgets -------------------------------------------------------------------------------------------------------


async def put(account: Account, *budgets: dict[str, Any]) -> Any:
    return await account.http.put("/api/v1/budgets", json={"budgets": list(budgets)})


def of_workspace(limit: str = "5", **fields: Any) -> dict[str, Any]:
    return {"subject": "workspace", "period": "day", "limit": limit, **fields}


async def test_budgets_are_set_all_at_once(team: Team, admin: asyncpg.Connection) -> None:
    owner, member = team.owner, team.people[Role.MEMBER]
    await spend(admin, member, "1.25", at=clock.now())
    of_member = {
        "subject": "user", "subject_id": str(member.user_id), "period": "month", "limit": "3", "alert_at": "0.5",
    }  # fmt: skip
    answer = await put(owner, of_workspace(), of_member)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["data"]
    midnight = clock.now().replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    assert first == {
        "id": first["id"], "subject": "workspace", "subject_id": None, "period": "day", "limit": "5.00000000",
        "set_by": "workspace", "alert_at": "0.8", "spent": "1.25000000", "reserved": "0.00000000", "remaining": "3.75000000",
        "resets_at": midnight.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    assert (second["subject_id"], second["limit"], second["alert_at"], second["spent"]) == (
        str(member.user_id), "3.00000000", "0.5", "1.25000000",
    )  # fmt: skip
    # What stays is the same budget, what is left out is gone.
    (kept,) = (await put(owner, of_workspace("7"))).json()["data"]
    assert (kept["id"], kept["limit"]) == (first["id"], "7.00000000")
    assert (await owner.http.get("/api/v1/budgets")).json()["data"] == [kept]
    (event,) = await admin.fetch(
        "SELECT details::text AS details FROM audit_events WHERE action = 'budgets.changed' ORDER BY id LIMIT 1"
    )
    assert str(member.user_id) in event["details"]
    assert (await put(owner)).json()["data"] == []


async def test_only_admins_set_budgets_and_members_see_those_that_bind_them(team: Team) -> None:
    owner, member = team.owner, team.people[Role.MEMBER]
    of = [
        {"subject": "user", "subject_id": str(person.user_id), "period": "day", "limit": "1"}
        for person in (owner, member)
    ]
    answer = await put(team.people[Role.ADMIN], of_workspace(), *of)
    assert answer.status_code == 200, answer.text
    assert len((await owner.http.get("/api/v1/budgets")).json()["data"]) == 3
    seen = (await member.http.get("/api/v1/budgets")).json()["data"]
    assert [budget["subject_id"] for budget in seen] == [None, str(member.user_id)]
    for role in (Role.MEMBER, Role.VIEWER):
        refused = await put(team.people[role], of_workspace())
        assert (refused.status_code, refused.json()["details"]) == (403, {"permission": "budgets:manage"})


async def test_a_budget_for_a_stranger_is_refused(alice: Account, bob: Account) -> None:
    made = await bob.http.post("/api/v1/api-keys", json={"name": "k"})
    key = made.json()["data"]["id"]
    for subject, id_ in (("user", bob.user_id), ("user", uuid4()), ("api_key", key), ("api_key", bob.user_id)):
        answer = await put(alice, {"subject": subject, "subject_id": str(id_), "period": "day", "limit": "1"})
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
    assert (await alice.http.get("/api/v1/budgets")).json()["data"] == []


@pytest.mark.parametrize(
    ("budgets", "status"),
    [
        ([of_workspace(), of_workspace("6")], 409),
        ([of_workspace("-1")], 422),
        ([of_workspace("1e10")], 422),
        ([of_workspace("1_000")], 422),
        ([of_workspace(" 5")], 422),
        ([of_workspace("٥")], 422),
        ([of_workspace("")], 422),
        ([of_workspace("0.000000001")], 422),
        ([of_workspace("NaN")], 422),
        ([of_workspace("Infinity")], 422),
        ([of_workspace(alert_at="0")], 422),
        ([of_workspace(alert_at="1.001")], 422),
        ([of_workspace(subject_id=str(uuid4()))], 422),
        ([{"subject": "user", "period": "day", "limit": "1"}], 422),
        ([{"subject": "team", "period": "day", "limit": "1"}], 422),
        ([{"subject": "workspace", "period": "week", "limit": "1"}], 422),
        ([of_workspace()] * 501, 422),
    ],
)
async def test_what_is_no_budget_is_refused(alice: Account, budgets: list[dict[str, Any]], status: int) -> None:
    answer = await put(alice, *budgets)
    assert answer.status_code == status, answer.text


async def test_the_budget_of_whoever_leaves_goes_too(team: Team) -> None:
    member = team.people[Role.MEMBER]
    await put(team.owner, {"subject": "user", "subject_id": str(member.user_id), "period": "day", "limit": "1"})
    answer = await team.owner.http.delete(team.path(f"/members/{member.user_id}"))
    assert answer.status_code == 204, answer.text
    assert (await team.owner.http.get("/api/v1/budgets")).json()["data"] == []
