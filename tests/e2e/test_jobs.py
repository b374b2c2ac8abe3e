"""`kill -9` in the middle of a job: the process that comes next does it."""

from pathlib import Path

import asyncpg
import pytest

from parley.core.ids import new_id
from parley.core.scope import NO_WORKSPACE
from tests.jobs.conftest import until
from tests.process import server_process

pytestmark = pytest.mark.process


async def _connect(data_dir: Path) -> asyncpg.Connection:
    lines = (data_dir / "postgres/data/postmaster.pid").read_text().splitlines()
    return await asyncpg.connect(host=lines[4], port=int(lines[3]), user="postgres", database="parley")


async def _when(connection: asyncpg.Connection, query: str) -> None:
    await until(lambda: connection.fetchval(query), timeout_s=20)


async def test_a_job_outlives_its_process(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    options = {"PARLEY_JOB_LEASE_S": "1", "PARLEY_JOB_POLL_S": "0.1"}
    with server_process(data_dir, **options) as server:
        connection = await _connect(data_dir)
        # The one of this hour has run; another is begun, and held up where it removes rows.
        await _when(connection, "SELECT bool_or(status = 'completed') FROM jobs WHERE kind = 'cleaning'")
        await connection.execute(
            "INSERT INTO webhook_events (source, event_id, received_at) VALUES ('clerk', 'old', now() - interval '8 days')"
        )
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("LOCK TABLE webhook_events IN ACCESS EXCLUSIVE MODE")
        other = await _connect(data_dir)
        await other.execute(
            "INSERT INTO jobs (workspace_id, id, kind, payload, max_attempts, dedupe_key) "
            "VALUES ($1, $2, 'cleaning', '{}', 3, 'held up')", NO_WORKSPACE, new_id(),
        )  # fmt: skip
        await _when(other, "SELECT status = 'running' FROM jobs WHERE dedupe_key = 'held up'")
        await _when(other, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock')")
        server.kill()
        for one in (connection, other):
            one.terminate()

    with server_process(data_dir, **options) as server:
        connection = await _connect(data_dir)
        await _when(connection, "SELECT status = 'completed' FROM jobs WHERE dedupe_key = 'held up'")
        row = await connection.fetchrow("SELECT attempts, error FROM jobs WHERE dedupe_key = 'held up'")
        assert tuple(row) == (2, None)
        assert await connection.fetchval("SELECT count(*) FROM webhook_events") == 0
        await connection.close()
        assert server.terminate() == 0
