"""The dispatcher: at least once, one at a time, in fairness, and never quietly."""

import asyncio
import json
import logging
import random
from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.errors import Unavailable
from parley.core.ids import new_id
from parley.core.scope import NO_WORKSPACE
from parley.core.settings import DatabaseSettings
from parley.jobs.inprocess import (
    FAILED,
    NO_SUCH_WORKSPACE,
    TOO_LONG,
    UNKNOWN,
    LeaseLost,
    backoff,
)
from parley.jobs.outbox import enqueue
from parley.jobs.queue import CLAIM, LOST, PIN
from parley.jobs.registry import DuplicateKind, JobFailed, JobRegistry, JobRun, JobType
from tests.jobs.conftest import Heard, Outbox, dispatching, lose, make_dispatcher, until


async def nothing(_: JobRun) -> None:
    pass


async def write(run: JobRun, note: str = "") -> None:
    """Have an effect that a second attempt finds done."""
    async with run.database.system_unit_of_work() as unit:
        connection = await unit.driver()
        await connection.execute(
            "INSERT INTO effects (job_id, note) VALUES ($1, $2) ON CONFLICT DO NOTHING", run.id, note
        )


# -- one job -----------------------------------------------------------------------------------------------------------


async def test_a_job_is_done_and_keeps_its_result(outbox: Outbox) -> None:
    runs: list[JobRun] = []

    async def handle(run: JobRun) -> dict[str, Any]:
        runs.append(run)
        return {"greeting": f"hello {run.payload['name']}"}

    async with dispatching(outbox.database, handle):
        id_ = await outbox.add(payload={"name": "ada"})
        row = await outbox.ended(id_)
    (run,) = runs
    assert (run.id, run.workspace_id, run.user_id, run.attempt) == (id_, outbox.workspace, outbox.user, 1)
    assert (row["status"], json.loads(row["result"]), row["error"], row["attempts"]) == (
        "completed", {"greeting": "hello ada"}, None, 1,
    )  # fmt: skip
    assert row["created_at"] <= row["started_at"] <= row["finished_at"]
    assert (row["owner"], row["lease_until"]) == (None, None)


async def test_a_commit_wakes_the_dispatcher_at_once(outbox: Outbox) -> None:
    # Nothing is ever found by looking: the poll is an hour away.
    async with dispatching(outbox.database, nothing, poll_s=3600) as dispatcher:
        # It has looked, and waits.
        await until(lambda: _is(dispatcher._untold_wake.is_set() or bool(dispatcher._tasks)))
        first = await outbox.add()
        assert (await outbox.ended(first))["status"] == "completed"
        second = await outbox.add()
        assert (await outbox.ended(second))["status"] == "completed"


async def _is(value: bool) -> bool:
    return value


async def test_the_poll_finds_what_another_process_has_added(outbox: Outbox, urls: DatabaseUrls) -> None:
    elsewhere = Database(urls, DatabaseSettings())
    async with dispatching(outbox.database, nothing):
        async with elsewhere.system_unit_of_work() as unit:
            id_ = await enqueue(unit, "work", {}, workspace_id=outbox.workspace)
        assert (await outbox.ended(id_))["status"] == "completed"
    await elsewhere.close()


async def test_a_rolled_back_cause_leaves_no_job_and_wakes_nobody(outbox: Outbox) -> None:
    heard: list[object] = []
    stop = outbox.database.listen("jobs", heard.append)
    with pytest.raises(RuntimeError, match="the cause failed"):
        async with outbox.database.system_unit_of_work() as unit:
            await enqueue(unit, "work", {}, workspace_id=outbox.workspace)
            raise RuntimeError("the cause failed")
    assert await outbox.admin.fetchval("SELECT count(*) FROM jobs") == 0
    assert heard == []
    await outbox.add()
    assert len(heard) == 1
    stop()


async def test_a_delayed_job_waits(outbox: Outbox) -> None:
    async with dispatching(outbox.database, nothing):
        later = await outbox.add(delay=timedelta(hours=1))
        soon = await outbox.add()
        await outbox.ended(soon)
        assert (await outbox.row(later))["status"] == "queued"
        with clock.shifted(3601):
            assert (await outbox.ended(later))["status"] == "completed"


# -- failures ----------------------------------------------------------------------------------------------------------


async def test_a_failed_attempt_is_repeated_after_a_while(outbox: Outbox) -> None:
    attempts: list[int] = []

    async def handle(run: JobRun) -> None:
        attempts.append(run.attempt)
        if run.attempt < 3:
            raise RuntimeError("not yet")

    async with dispatching(outbox.database, handle):
        before = clock.now()
        id_ = await outbox.add()
        row = await outbox.when(id_, lambda row: row["status"] == "queued" and row["attempts"] == 1)
        wait = row["run_at"] - before
        assert timedelta(seconds=7.5) <= wait <= timedelta(seconds=12.5) + (clock.now() - before)
        assert (row["error"], row["owner"], row["finished_at"]) == (FAILED, None, None)
        # A moment before nothing happens, a moment after it does.
        with clock.shifted((row["run_at"] - clock.now()).total_seconds() - 5):
            other = await outbox.add(workspace_id=await outbox.new_workspace(), user_id=None, kind="nobody's")
            await outbox.when(other, lambda row: row["attempts"] == 1)
            assert attempts == [1]
        with clock.shifted(13):
            second = await outbox.when(id_, lambda row: row["status"] == "queued" and row["attempts"] == 2)
            assert timedelta(seconds=20) <= second["run_at"] - clock.now() <= timedelta(seconds=37.5)
        with clock.shifted(13 + 38):
            row = await outbox.ended(id_)
    assert attempts == [1, 2, 3]
    assert (row["status"], row["error"], row["attempts"]) == ("completed", None, 3)


def test_waits_grow_to_a_limit_and_spread() -> None:
    plain = [backoff(attempt, jitter=1).total_seconds() for attempt in range(1, 10)]
    assert plain == [10, 30, 90, 270, 810, 2430, 7200, 7200, 7200]
    random.seed(4)
    waits = {backoff(1).total_seconds() for _ in range(200)}
    assert min(waits) >= 7.5
    assert max(waits) <= 12.5
    assert len(waits) > 100
    assert backoff(1, at_least_s=120) == timedelta(seconds=120)


async def test_who_says_when_to_come_back_is_believed(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> None:
        raise Unavailable("The mail server is away.", retry_after_s=600)

    async with dispatching(outbox.database, handle):
        id_ = await outbox.add()
        row = await outbox.when(id_, lambda row: row["status"] == "queued" and row["attempts"] == 1)
    assert row["run_at"] - clock.now() > timedelta(seconds=590)
    assert row["error"] == "The mail server is away."


async def test_after_the_last_attempt_a_job_is_kept_as_failed(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> None:
        raise ValueError("password=hunter2")

    async with dispatching(outbox.database, handle):
        id_ = await outbox.add(max_attempts=2, dedupe_key="once")
        await outbox.when(id_, lambda row: row["attempts"] == 1 and row["status"] == "queued")
        with clock.shifted(20):
            row = await outbox.ended(id_)
        assert (row["status"], row["error"], row["attempts"]) == ("failed", FAILED, 2)
        assert row["finished_at"] is not None
        # It stays, and with it its key.
        assert await outbox.add(dedupe_key="once") == id_
        with clock.shifted(3600 * 24):
            await outbox.ended(await outbox.add(kind="nobody's", max_attempts=1))
        assert (await outbox.row(id_))["attempts"] == 2
    assert "hunter2" not in str(dict(row))


async def test_a_kinds_own_number_of_attempts_counts_too(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> None:
        raise ValueError

    async with dispatching(outbox.database, JobType("work", handle, max_attempts=1)):
        assert (await outbox.ended(await outbox.add()))["attempts"] == 1


async def test_a_handler_can_end_a_job_for_good(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> None:
        raise JobFailed("The file\0 is empty. " + "x" * 600)

    async with dispatching(outbox.database, handle):
        row = await outbox.ended(await outbox.add())
    assert (row["status"], row["attempts"]) == ("failed", 1)
    assert row["error"] == ("The file is empty. " + "x" * 600)[:500]


async def test_an_attempt_that_takes_too_long_is_cut_off(outbox: Outbox) -> None:
    cut_off: list[bool] = []

    async def handle(_: JobRun) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut_off.append(True)
            raise

    async with dispatching(outbox.database, JobType("work", handle, timeout_s=0.05, max_attempts=1)):
        row = await outbox.ended(await outbox.add())
    assert (row["status"], row["error"], cut_off) == ("failed", TOO_LONG, [True])


async def test_a_timeout_inside_a_handler_is_not_the_jobs_own(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> None:
        raise TimeoutError

    async with dispatching(outbox.database, JobType("work", handle, max_attempts=1)):
        assert (await outbox.ended(await outbox.add()))["error"] == FAILED


async def test_a_cancellation_that_nobody_asked_for_is_a_failure(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> None:
        raise asyncio.CancelledError

    async with dispatching(outbox.database, JobType("work", handle, max_attempts=1)):
        assert (await outbox.ended(await outbox.add()))["error"] == FAILED


async def test_a_result_that_is_no_json_is_a_failure(outbox: Outbox) -> None:
    async def handle(_: JobRun) -> dict[str, Any]:
        return {"text": "\ud800"}

    async with dispatching(outbox.database, JobType("work", handle, max_attempts=1)):
        assert (await outbox.ended(await outbox.add()))["error"] == FAILED


async def test_a_failure_is_logged_once_and_without_what_it_was_about(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(_: JobRun) -> None:
        raise ValueError("something")

    with caplog.at_level(logging.INFO, logger="parley.jobs"):
        async with dispatching(outbox.database, JobType("work", handle, max_attempts=1)):
            await outbox.ended(await outbox.add(payload={"to": "ada@example.com"}))
    (record,) = [record for record in caplog.records if record.name.startswith("parley.jobs")]
    assert (record.levelname, record.getMessage()) == ("ERROR", "job failed")
    assert "ada@example.com" not in str(vars(record))


async def test_a_kind_that_nobody_knows_ends_in_a_clear_state(outbox: Outbox) -> None:
    async with dispatching(outbox.database, nothing):
        waiting = await outbox.add(kind="from a newer version")
        last = await outbox.add(kind="from a newer version", max_attempts=1)
        ended = await outbox.ended(last)
        row = await outbox.when(waiting, lambda row: row["attempts"] == 1 and row["status"] == "queued")
        # The dispatcher goes on.
        assert (await outbox.ended(await outbox.add()))["status"] == "completed"
    assert (ended["status"], ended["error"]) == ("failed", UNKNOWN)
    # For a newer process, which may know it.
    assert row["run_at"] > clock.now()


async def test_a_job_of_a_deleted_workspace_is_cancelled(outbox: Outbox) -> None:
    ran: list[UUID] = []

    async def handle(run: JobRun) -> None:
        ran.append(run.workspace_id)

    async with dispatching(outbox.database, handle):
        row = await outbox.ended(await outbox.add(workspace_id=new_id()))
        await outbox.ended(await outbox.add(workspace_id=NO_WORKSPACE, user_id=None))
    assert (row["status"], row["error"]) == ("cancelled", NO_SUCH_WORKSPACE)
    assert ran == [NO_WORKSPACE]


async def test_a_workspace_deleted_under_a_running_job_does_no_harm(outbox: Outbox) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def handle(run: JobRun) -> None:
        if run.workspace_id == outbox.workspace:
            begun.set()
            await go.wait()

    async with dispatching(outbox.database, handle):
        id_ = await outbox.add()
        await begun.wait()
        await outbox.admin.execute("DELETE FROM workspaces WHERE id = $1", outbox.workspace)
        go.set()
        other = await outbox.add(workspace_id=await outbox.new_workspace(), user_id=None)
        assert (await outbox.ended(other))["status"] == "completed"
    assert await outbox.admin.fetchval("SELECT count(*) FROM jobs WHERE id = $1", id_) == 0


# -- several processes -------------------------------------------------------------------------------------------------


async def test_two_dispatchers_never_run_one_job_twice_at_a_time(outbox: Outbox, urls: DatabaseUrls) -> None:
    second = Database(urls, DatabaseSettings())
    now, at_once, by = set[UUID](), list[UUID](), Counter[str]()

    def handler(name: str) -> Any:
        async def handle(run: JobRun) -> None:
            if run.id in now:
                at_once.append(run.id)
            now.add(run.id)
            await write(run, name)
            by[name] += 1
            now.discard(run.id)

        return handle

    await outbox.flood(100)
    async with (
        dispatching(outbox.database, handler("one"), per_workspace=8),
        dispatching(second, handler("two"), per_workspace=8),
    ):
        done = "SELECT count(*) = 100 FROM jobs WHERE status = 'completed'"
        await until(lambda: outbox.admin.fetchval(done), timeout_s=30)
    await second.close()
    assert at_once == []
    assert by.total() == 100
    assert await outbox.admin.fetchval("SELECT max(attempts) FROM jobs") == 1
    assert await outbox.admin.fetchval("SELECT count(*) FROM effects") == 100


async def test_the_job_of_a_lost_process_is_taken_over_after_its_lease(outbox: Outbox, urls: DatabaseUrls) -> None:
    begun = asyncio.Event()

    async def hang(run: JobRun) -> None:
        await write(run, "first")
        begun.set()
        await asyncio.Event().wait()

    first = make_dispatcher(outbox.database, hang)
    await first.start()
    id_ = await outbox.add()
    await begun.wait()
    await lose(first)
    assert (await outbox.row(id_))["status"] == "running"

    second = Database(urls, DatabaseSettings())
    attempts: list[int] = []

    async def handle(run: JobRun) -> None:
        attempts.append(run.attempt)
        await write(run, "second")

    async with dispatching(second, handle):
        # While the lease holds, it is not touched.
        await outbox.ended(await outbox.add(kind="nobody's", max_attempts=1))
        assert attempts == []
        with clock.shifted(601):
            row = await outbox.ended(id_)
    await second.close()
    assert (row["status"], row["attempts"], attempts) == ("completed", 2, [2])
    # The effect happened in both attempts, and is there once.
    assert [tuple(r) for r in await outbox.admin.fetch("SELECT * FROM effects")] == [(id_, "first")]


async def test_a_job_that_kills_its_processes_is_given_up(outbox: Outbox) -> None:
    begun = asyncio.Event()

    async def hang(_: JobRun) -> None:
        begun.set()
        await asyncio.Event().wait()

    first = make_dispatcher(outbox.database, hang)
    await first.start()
    id_ = await outbox.add(max_attempts=1)
    await begun.wait()
    await lose(first)
    heard = Heard()
    with clock.shifted(601):
        async with dispatching(outbox.database, nothing, heard=heard):
            row = await outbox.ended(id_)
            await until(lambda: _is(heard.states(id_) == ["failed"]))
    assert (row["status"], row["error"], row["owner"]) == ("failed", LOST, None)


async def test_a_zombie_cannot_write_an_outcome(outbox: Outbox, urls: DatabaseUrls) -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    refused: list[type[Exception]] = []

    async def slow(run: JobRun) -> dict[str, Any]:
        begun.set()
        await go.wait()
        try:
            await run.progress(1, 2)
        except LeaseLost as error:
            refused.append(type(error))
        return {"by": "zombie"}

    async def quick(_: JobRun) -> dict[str, Any]:
        return {"by": "successor"}

    second = Database(urls, DatabaseSettings())
    # Room for one: it does not take its own job over.
    async with dispatching(outbox.database, slow, concurrency=1) as zombie:
        id_ = await outbox.add()
        await begun.wait()
        with clock.shifted(601):
            async with dispatching(second, quick):
                await outbox.ended(id_)
        (task,) = [one.task for one in zombie._running.values()]
        go.set()
        await asyncio.wait({task})
        row = await outbox.row(id_)
    await second.close()
    assert refused == [LeaseLost]
    assert (row["status"], json.loads(row["result"]), row["attempts"], row["progress"]) == (
        "completed", {"by": "successor"}, 2, None,
    )  # fmt: skip


async def test_who_has_lost_the_lease_is_cancelled_at_the_next_renewal(outbox: Outbox, urls: DatabaseUrls) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def slow(_: JobRun) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    second = Database(urls, DatabaseSettings())
    async with dispatching(outbox.database, slow, concurrency=1) as zombie:
        id_ = await outbox.add()
        await begun.wait()
        await zombie.renew()
        assert not ended.is_set()
        with clock.shifted(601):
            async with dispatching(second, nothing):
                await outbox.ended(id_)
        await zombie.renew()
        async with asyncio.timeout(5):
            await ended.wait()
    await second.close()
    assert (await outbox.row(id_))["status"] == "completed"


async def test_a_lease_is_renewed_while_the_job_runs(outbox: Outbox) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(_: JobRun) -> None:
        begun.set()
        await go.wait()

    async with dispatching(outbox.database, slow, lease_s=0.3):
        id_ = await outbox.add()
        await begun.wait()
        first = (await outbox.row(id_))["lease_until"]
        # Past several leases it is still the first attempt.
        await outbox.when(id_, lambda row: row["lease_until"] > first + timedelta(seconds=1))
        go.set()
        row = await outbox.ended(id_)
    assert (row["status"], row["attempts"]) == ("completed", 1)


async def test_without_the_database_a_lease_that_has_ended_ends_the_attempt(outbox: Outbox) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def slow(_: JobRun) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with dispatching(outbox.database, slow, lease_s=0.5):
        await outbox.add()
        await begun.wait()
        async with asyncio.timeout(10):
            # Nobody gets a connection from here on.
            for _ in range(DatabaseSettings().system_pool_size):
                await outbox.database._system_turns.acquire()
            await ended.wait()
        for _ in range(DatabaseSettings().system_pool_size):
            outbox.database._system_turns.release()


# -- fairness ----------------------------------------------------------------------------------------------------------


async def test_a_flood_in_one_workspace_does_not_delay_another(outbox: Outbox) -> None:
    other = await outbox.new_workspace()
    begun: list[UUID] = []
    running, most = Counter[UUID](), Counter[UUID]()

    async def handle(run: JobRun) -> None:
        begun.append(run.workspace_id)
        running[run.workspace_id] += 1
        most[run.workspace_id] = max(most[run.workspace_id], running[run.workspace_id])
        await write(run)
        running[run.workspace_id] -= 1

    await outbox.flood(300)
    # Younger than all of the flood.
    id_ = await outbox.add(workspace_id=other, user_id=None)
    async with dispatching(outbox.database, handle, concurrency=4, per_workspace=3):
        await outbox.ended(id_)
        assert begun.index(other) < 4
        # And one that comes while the flood runs.
        await until(lambda: _is(len(begun) > 20))
        before = len(begun)
        id_ = await outbox.add(workspace_id=other, user_id=None)
        await outbox.ended(id_)
        place = len(begun[:before]) + begun[before:].index(other)
        assert place - before <= 8
    assert most[outbox.workspace] == 3


async def test_a_workspace_may_use_all_there_is_when_nobody_else_wants_it(outbox: Outbox) -> None:
    await outbox.flood(30)
    most = 0
    running = 0

    async def handle(run: JobRun) -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await write(run)
        running -= 1

    async with dispatching(outbox.database, handle, concurrency=4, per_workspace=4):
        done = "SELECT count(*) = 30 FROM jobs WHERE status = 'completed'"
        await until(lambda: outbox.admin.fetchval(done))
    assert most == 4


def _rows_read(plan: dict[str, Any]) -> int:
    own = plan["Actual Rows"] * plan["Actual Loops"] + plan.get("Rows Removed by Filter", 0) * plan["Actual Loops"]
    read = own if plan.get("Relation Name") == "jobs" else 0
    return int(read) + sum(_rows_read(below) for below in plan.get("Plans", ()))


@pytest.mark.parametrize("analysed", [True, False])
async def test_a_claim_does_not_read_the_whole_queue(outbox: Outbox, analysed: bool) -> None:
    await outbox.flood(10_000)
    await outbox.add(workspace_id=await outbox.new_workspace(), user_id=None)
    if not analysed:
        await outbox.admin.execute("DELETE FROM pg_statistic WHERE starelid = 'jobs'::regclass")
    now = clock.now()
    async with outbox.admin.transaction():
        await outbox.admin.execute(PIN)
        (text,) = await outbox.admin.fetchrow(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {CLAIM}", new_id(), now, now + timedelta(seconds=30), 8, 4, NO_WORKSPACE
        )
    assert _rows_read(json.loads(text)[0]["Plan"]) < 200
    assert await outbox.admin.fetchval("SELECT count(*) FROM jobs WHERE status = 'running'") == 5


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_shutdown_lets_jobs_end(outbox: Outbox) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def handle(_: JobRun) -> None:
        begun.set()
        await go.wait()

    dispatcher = make_dispatcher(outbox.database, handle, drain_s=10)
    await dispatcher.start()
    id_ = await outbox.add()
    await begun.wait()
    closing = asyncio.create_task(dispatcher.close())
    waiting = await outbox.add()
    go.set()
    await closing
    assert (await outbox.row(id_))["status"] == "completed"
    # It has taken no more.
    assert ((await outbox.row(waiting))["status"], (await outbox.row(waiting))["attempts"]) == ("queued", 0)


async def test_a_shutdown_hands_back_what_does_not_end(outbox: Outbox, urls: DatabaseUrls) -> None:
    begun = asyncio.Event()

    async def hang(_: JobRun) -> None:
        begun.set()
        await asyncio.Event().wait()

    dispatcher = make_dispatcher(outbox.database, hang)
    await dispatcher.start()
    id_ = await outbox.add(max_attempts=1)
    await begun.wait()
    await dispatcher.close()
    row = await outbox.row(id_)
    assert (row["status"], row["owner"], row["lease_until"], row["attempts"]) == ("queued", None, None, 0)

    second = Database(urls, DatabaseSettings())
    # At once, without waiting for a lease, and the attempt that was cut off did not count.
    async with dispatching(second, nothing):
        row = await outbox.ended(id_)
    await second.close()
    assert (row["status"], row["attempts"]) == ("completed", 1)


async def test_closing_what_was_never_started_does_nothing(outbox: Outbox) -> None:
    await make_dispatcher(outbox.database, nothing).close()


async def test_it_goes_on_when_the_database_comes_back(outbox: Outbox) -> None:
    async with dispatching(outbox.database, nothing):
        await outbox.ended(await outbox.add())
        await outbox.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await outbox.flood(1)
        done = "SELECT count(*) = 2 FROM jobs WHERE status = 'completed'"
        await until(lambda: outbox.admin.fetchval(done))


# -- what users hear ---------------------------------------------------------------------------------------------------


async def test_the_user_hears_of_each_state(outbox: Outbox) -> None:
    heard = Heard()
    go = asyncio.Event()

    async def handle(run: JobRun) -> dict[str, Any]:
        await go.wait()
        if run.attempt == 1:
            raise ValueError
        return {"made": 3}

    async with dispatching(outbox.database, handle, heard=heard, concurrency=1):
        first = await outbox.add()
        await until(lambda: _is(heard.states(first)[-1:] == ["running"]))
        # No room: it is announced as waiting.
        second = await outbox.add()
        await until(lambda: _is(heard.states(second) == ["queued"]))
        go.set()
        await until(lambda: _is(heard.states(second)[-1:] == ["queued"] and len(heard.states(second)) == 3))
        with clock.shifted(20):
            await until(lambda: _is(heard.states(second)[-1:] == ["completed"]))
    assert heard.states(second) == ["queued", "running", "queued", "running", "completed"]
    last = heard.events[-1]
    assert {event["channel"] for event in heard.events} == {f"user:{outbox.user}"}
    assert {event["e"] for event in heard.events} == {"job.updated"}
    assert set(last) - {"channel", "e"} == {
        "id", "kind", "status", "progress", "result", "error", "attempts", "created_at", "started_at", "finished_at",
    }  # fmt: skip
    assert last["result"] == {"made": 3}


async def test_progress_is_stored_announced_and_throttled(outbox: Outbox) -> None:
    heard = Heard()

    async def handle(run: JobRun) -> None:
        for step in range(1000):
            await run.progress(step + 1, 1000, "pages")

    async with dispatching(outbox.database, handle, heard=heard):
        id_ = await outbox.add()
        row = await outbox.ended(id_)
        await until(lambda: _is(heard.states(id_)[-1:] == ["completed"]))
    steps = [event["progress"]["done"] for event in heard.events if event["progress"]]
    assert steps[0] == 1
    assert len(steps) < 20
    # What was left out last is there at the end.
    assert json.loads(row["progress"]) == {"done": 1000, "total": 1000, "note": "pages"}
    assert steps[-1] == 1000


async def test_nobody_hears_of_hidden_kinds_and_of_jobs_without_a_user(outbox: Outbox) -> None:
    heard = Heard()

    async def handle(run: JobRun) -> None:
        await run.progress(1)

    hidden = JobType("hidden", handle, shown=False)
    async with dispatching(outbox.database, hidden, JobType("work", handle), heard=heard):
        await outbox.ended(await outbox.add(kind="hidden"))
        await outbox.ended(await outbox.add(user_id=None))
        # The installation's workspace has no channels.
        await outbox.ended(await outbox.add(workspace_id=NO_WORKSPACE))
    assert heard.events == []


# -- the registry ------------------------------------------------------------------------------------------------------


def test_a_kind_has_one_type() -> None:
    registry = JobRegistry([JobType("a", nothing), JobType("b", nothing, shown=False)])
    assert (registry.kinds, registry.shown, registry.find("c")) == (["a", "b"], ["a"], None)
    with pytest.raises(DuplicateKind):
        registry.add(JobType("a", nothing))


async def test_a_run_that_nobody_listens_to_takes_progress(database: Database) -> None:
    await JobRun(new_id(), NO_WORKSPACE, None, {}, 1, database).progress(1)
