"""The ledger when a person asks for their data, and when they are erased."""

from decimal import Decimal

import asyncpg
import orjson
from fastapi import FastAPI

from parley.core.personal_data import Person
from parley.usage.personal_data import UsageData
from tests.conftest import Account
from tests.usage.test_router import spend


async def test_a_person_gets_their_calls_and_nobody_elses(
    app: FastAPI, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await spend(admin, alice, "1.5")
    await spend(admin, alice, "2", user_id=bob.user_id)
    person = Person(alice.user_id, (alice.workspace_id,))
    records = [record async for record in UsageData().export(app.state.database, person)]
    assert [record.entry for record in records] == [f"workspaces/{alice.workspace_id}/usage.json"]
    assert Decimal(orjson.loads(records[0].json)["cost"]) == Decimal("1.5")


async def test_an_erased_person_is_taken_out_and_the_figures_stay(
    app: FastAPI, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await spend(admin, alice, "1.5", key_id=bob.user_id)
    await spend(admin, alice, "2", user_id=bob.user_id)
    person = Person(alice.user_id, (alice.workspace_id,))
    for _ in range(2):
        await UsageData().erase(app.state.database, person)
    rows = await admin.fetch("SELECT user_id, key_id, cost FROM usage_entries ORDER BY cost")
    assert [tuple(row) for row in rows] == [(None, None, Decimal("1.5")), (bob.user_id, None, Decimal(2))]
