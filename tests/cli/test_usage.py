"""`parley usage …` on a database of its own."""

import asyncio
import json
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from typer.testing import CliRunner

from parley.cli.app import app
from parley.core.db import DatabaseUrls


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture(autouse=True)
def beside(urls: DatabaseUrls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands on the test's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARLEY_DATABASE_URL", urls.app)
    monkeypatch.setenv("PARLEY_DATABASE_SYSTEM_URL", urls.system)
    monkeypatch.setenv("PARLEY_DATABASE_OWNER_URL", urls.owner)
    monkeypatch.setenv("PARLEY_DATA_DIR", str(tmp_path / "d"))
    (tmp_path / "d").mkdir(mode=0o700)


async def wrong_counter(admin: asyncpg.Connection) -> str:
    """Make a budget whose counter says what the ledger does not; return its workspace."""
    workspace, budget = uuid4(), uuid4()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'W', true)", workspace)
    await admin.execute(
        "INSERT INTO budgets (workspace_id, id, period, ceiling, alert_at) VALUES ($1, $2, 'day', 5, 0.8)",
        workspace, budget,
    )  # fmt: skip
    await admin.execute(
        "INSERT INTO budget_counters (workspace_id, budget_id, starts_on, spent, reserved)"
        " VALUES ($1, $2, '2026-11-21', 3, 1)", workspace, budget,
    )  # fmt: skip
    return str(workspace)


async def test_counters_are_set_right_and_what_was_wrong_is_printed(admin: asyncpg.Connection) -> None:
    one, other = await wrong_counter(admin), await wrong_counter(admin)
    (found,) = json.loads(await asyncio.to_thread(run, "usage", "reconcile", "--workspace", one, "--json"))
    assert (found["workspace_id"], float(found["was_spent"]), float(found["was_reserved"])) == (one, 3, 1)
    table = await asyncio.to_thread(run, "usage", "reconcile")
    assert other in table
    assert one not in table
    assert await admin.fetchval("SELECT sum(spent) + sum(reserved) FROM budget_counters") == 0
    assert "There is none." in await asyncio.to_thread(run, "usage", "reconcile")


async def test_ceilings_are_shown_and_set(admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = str(uuid4())
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'W', true)", workspace)
    monkeypatch.setenv("PARLEY_LLM_WORKSPACE_COST_PER_MONTH", "40")

    async def ceilings(*arguments: str) -> list[tuple[str, float | None, bool]]:
        rows = json.loads(await asyncio.to_thread(run, "usage", "ceiling", workspace, *arguments, "--json"))
        return [(row["period"], row["ceiling"] and float(row["ceiling"]), row["own"]) for row in rows]

    assert await ceilings() == [("day", None, False), ("month", 40, False)]
    assert await ceilings("--day", "2.50", "--month", "100") == [("day", 2.5, True), ("month", 100, True)]
    assert await ceilings("--month", "default") == [("day", 2.5, True), ("month", 40, False)]
    assert await ceilings() == [("day", 2.5, True), ("month", 40, False)]
    assert "40" in await asyncio.to_thread(run, "usage", "ceiling", workspace)


@pytest.mark.parametrize("amount", ["-1", "much", "1e3", "1.123456789", ""])
def test_a_ceiling_is_an_amount(amount: str) -> None:
    assert "an amount of dollars" in run("usage", "ceiling", str(uuid4()), "--day", amount, code=2)


async def test_a_workspace_that_is_not_there_has_no_ceiling() -> None:
    assert "no such workspace" in await asyncio.to_thread(
        lambda: run("usage", "ceiling", str(uuid4()), "--day", "1", code=2)
    )
