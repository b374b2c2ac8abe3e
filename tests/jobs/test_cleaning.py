"""What has had its time goes, once an hour over all processes; what has not stays."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.ids import new_id
from parley.core.scope import NO_WORKSPACE
from parley.core.settings import DatabaseSettings, JobSettings, Settings
from parley.jobs.background import clean_jobs
from parley.jobs.cleaning import Cleaner, Cleaning, CleaningIncomplete
from parley.jobs.registry import JobRun, Periodic
from parley.jobs.schedule import Schedule
from parley.jobs.setup import build_jobs
from tests.conftest import Account, running
from tests.jobs.conftest import Heard, Outbox, until


def a_run(database: Database) -> JobRun:
    return JobRun(new_id(), NO_WORKSPACE, None, {}, 1, database)


async def test_a_cleaner_goes_on_until_nothing_is_left(database: Database) -> None:
    left = [2500]

    async def clean(_: Database, limit: int) -> int:
        removed = min(limit, left[0])
        left[0] -= removed
        return removed

    assert await Cleaning([Cleaner("things", clean)]).handle(a_run(database)) == {"things": 2500}
    assert left == [0]


async def test_a_cleaner_that_fails_keeps_no_other_from_its_work(database: Database) -> None:
    ran: list[str] = []

    async def broken(_: Database, __: int) -> int:
        raise RuntimeError

    async def works(_: Database, __: int) -> int:
        ran.append("works")
        return 0

    with pytest.raises(CleaningIncomplete, match="broken"):
        await Cleaning([Cleaner("broken", broken), Cleaner("works", works)]).handle(a_run(database))
    assert ran == ["works"]


async def test_jobs_that_ended_long_ago_go_and_free_their_keys(outbox: Outbox) -> None:
    states = {"completed": 8, "failed": 8, "cancelled": 8, "queued": None, "running": None}
    old = {}
    for state, days in states.items():
        old[state] = await outbox.add(dedupe_key=state)
        await outbox.admin.execute(
            "UPDATE jobs SET status = $2::varchar, finished_at = now() - $3::interval, created_at = now() - interval '90 days' "
            "WHERE id = $1", old[state], state, None if days is None else timedelta(days=days),
        )  # fmt: skip
    young = await outbox.add(dedupe_key="young")
    await outbox.admin.execute(
        "UPDATE jobs SET status = 'completed', finished_at = now() - interval '6 days' WHERE id = $1", young
    )
    assert await clean_jobs(outbox.database, 2, keep_days=7) == 2
    assert await clean_jobs(outbox.database, 2, keep_days=7) == 1
    kept = {row["id"] for row in await outbox.admin.fetch("SELECT id FROM jobs")}
    assert kept == {old["queued"], old["running"], young}
    assert await outbox.add(dedupe_key="young") == young
    assert await outbox.add(dedupe_key="failed") != old["failed"]


async def _rows(admin: asyncpg.Connection, statements: Sequence[str], *arguments: Any) -> None:
    for statement in statements:
        await admin.execute(statement, *arguments)


async def test_every_module_removes_what_has_had_its_time(
    settings: Settings, alice: Account, admin: asyncpg.Connection
) -> None:
    """Of each kind an old row goes and a young one stays. A new process does it as soon as it starts."""
    session = await admin.fetchval("SELECT id FROM sessions WHERE user_id = $1", alice.user_id)
    await _rows(
        admin,
        [
            ("INSERT INTO one_time_tokens (id, user_id, purpose, hash, expires_at) "
            "SELECT gen_random_uuid(), $1, 'a test', '', now() + n * interval '1 hour' FROM (VALUES (-1), (1)) v (n)"),
            ("INSERT INTO exports (id, user_id, expires_at) "
            "SELECT gen_random_uuid(), $1, now() + n * interval '25 hours' FROM (VALUES (-1), (1)) v (n)"),
            ("INSERT INTO sessions (id, user_id, workspace_id, counter, salt, idle_expires_at, absolute_expires_at, revoked_at) "
            "SELECT gen_random_uuid(), user_id, workspace_id, 0, '', now() + n * interval '1 day', now() + interval '9 days', "
            "CASE WHEN n > 0 THEN now() - n * interval '1 day' END "
            "FROM sessions, (VALUES (-31), (-29), (31), (29)) v (n) WHERE user_id = $1"),
        ],
        alice.user_id,
    )  # fmt: skip
    await _rows(
        admin,
        [
            (
                "INSERT INTO webhook_events (source, event_id, received_at) "
                "SELECT 'clerk', n::text, now() - n * interval '1 day' FROM (VALUES (6), (8)) v (n)"
            ),
            "DELETE FROM jobs WHERE kind = 'cleaning'",
        ],
    )
    await _rows(
        admin,
        [
            ("INSERT INTO realtime_tickets (workspace_id, hash, user_id, expires_at) "
            "SELECT $1, n::text::bytea, $2, now() + n * interval '2 minutes' FROM (VALUES (-1), (1)) v (n)"),
            ("INSERT INTO idempotency_keys (workspace_id, user_id, hash, fingerprint, status, headers, body, expires_at) "
            "SELECT $1, $2, n::text::bytea, '', 201, '{}', '', now() + n * interval '1 hour' FROM (VALUES (-1), (1)) v (n)"),
        ],
        alice.workspace_id,
        alice.user_id,
    )  # fmt: skip

    async def cleaned() -> bool:
        return bool(await admin.fetchval("SELECT bool_or(status = 'completed') FROM jobs WHERE kind = 'cleaning'"))

    async with running(settings):
        await until(cleaned)
    # The mail that greets alice makes a token of its own.
    tokens = "one_time_tokens WHERE purpose = 'a test'"
    tables = (tokens, "exports", "webhook_events", "realtime_tickets", "idempotency_keys")
    left = {table: await admin.fetchval(f"SELECT count(*) FROM {table}") for table in tables}
    assert left == dict.fromkeys(left, 1)
    assert await admin.fetchval("SELECT count(*) FROM sessions WHERE id <> $1", session) == 2
    assert await admin.fetchval("SELECT count(*) FROM sessions WHERE id = $1", session) == 1


# -- the schedule ------------------------------------------------------------------------------------------------------


async def test_periodic_work_runs_once_a_period_over_all_processes(outbox: Outbox, urls: DatabaseUrls) -> None:
    ran: list[JobRun] = []

    async def handle(run: JobRun) -> None:
        ran.append(run)

    second = Database(urls, DatabaseSettings())
    made = [
        build_jobs(
            database=database,
            publisher=Heard(),
            settings=JobSettings(poll_s=0.02),
            types=[],
            periodic=[Periodic("hourly", timedelta(hours=1), handle)],
        )
        for database in (outbox.database, second)
    ]
    # From the middle of an hour, so that none begins by itself.
    with clock.shifted(1800 - clock.timestamp() % 3600):
        for jobs in made:
            await jobs.dispatcher.start()
        done = "SELECT count(*) = {} FROM jobs WHERE kind = 'hourly' AND status = 'completed'"
        await until(lambda: outbox.admin.fetchval(done.format(1)))
        with clock.shifted(3600):
            await until(lambda: outbox.admin.fetchval(done.format(2)))
            # A process that starts in the same hour finds it done.
            await Schedule(second, [Periodic("hourly", timedelta(hours=1), handle)]).enqueue_due()
            assert await outbox.admin.fetchval("SELECT count(*) FROM jobs WHERE kind = 'hourly'") == 2
        await asyncio.gather(*(jobs.dispatcher.close() for jobs in made))
    await second.close()
    assert len(ran) == 2
    assert {(run.workspace_id, run.user_id) for run in ran} == {(NO_WORKSPACE, None)}
    assert not any("hourly" in jobs.registry.shown for jobs in made)
