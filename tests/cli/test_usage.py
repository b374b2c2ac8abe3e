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


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


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
