"""What has had its time goes from the log; whoever comes back gets the rest of it, or a state, and never a hole."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parley.core.db import Database, DatabaseUrls
from parley.core.personal_data import Person
from parley.core.settings import DatabaseSettings, RealtimeSettings, Settings
from parley.realtime import retention as module
from parley.realtime.bus import Bus
from parley.realtime.events import Channel
from parley.realtime.frames import Since
from parley.realtime.personal_data import RealtimeData
from parley.realtime.retention import Retention, RetentionIncomplete, Target, Trimmed
from tests.conftest import Account, running
from tests.jobs.conftest import until
from tests.realtime.written_log import WrittenLog, apply, limits

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


@pytest.fixture
async def log(database: Database, admin: asyncpg.Connection) -> WrittenLog:
    """An empty conversation."""
    return await WrittenLog.make(database, admin)


@pytest.fixture
def retention(database: Database) -> Retention:
    """Retention as the service runs it."""
    return Retention(database, RealtimeSettings())


# -- any history -------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.just(("ask",)),
        st.tuples(st.just("write"), st.integers(0, 5)),
        st.tuples(st.just("end"), st.sampled_from(["completed", "failed", "cancelled"])),
        st.just(("start_next",)),
        st.just(("cancel_waiting",)),
        st.just(("edit",)),
        st.tuples(st.just("age"), st.sampled_from([1, 10, 16, 500, 1500])),
        st.just(("trim",)),
    ),
    max_size=25,
)


async def do(log: WrittenLog, retention: Retention, step: Sequence[Any]) -> None:
    """Do a step if it can be done now."""
    match step:
        case ["ask"] if len(log.waiting) < 3 and len(log.questions) < 20:
            await log.ask()
        case ["write", int(deltas)] if log.running:
            await log.write(deltas)
        case ["end", str(status)] if log.running:
            await log.end(status)
        case ["start_next"]:
            await log.start_next()
        case ["cancel_waiting"] if log.waiting:
            await log.cancel_waiting()
        case ["edit"] if log.questions:
            await log.edit()
        case ["age", int(minutes)]:
            await log.age(minutes * MINUTE)
        case ["trim"]:
            assert (await retention.run()).failed == 0


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    history=steps,
    first=st.integers(985, 1000),
    keep_events=st.sampled_from([6, 15, 10_000]),
    batch=st.sampled_from([3, 2000]),
    ring_events=st.sampled_from([0, 4, 512]),
)
async def test_after_any_history_a_client_gets_what_it_lacks_or_a_state(
    database: Database,
    admin: asyncpg.Connection,
    history: list[tuple[Any, ...]],
    first: int,
    keep_events: int,
    batch: int,
    ring_events: int,
) -> None:
    log = await WrittenLog.make(database, admin, settings=limits(ring_events=ring_events), first=first)
    retention = Retention(database, limits(keep_events=keep_events), batch=batch)
    for step in [("ask",), *history, ("trim",)]:
        await do(log, retention, step)
    floor = await log.assert_whole()
    for since in range(-1, first + 2):
        if since in {-1, 0, first - 1} or since >= first:
            await log.assert_reads(since, floor=floor)
    for since in range(first + 2, log.head + 2):
        await log.assert_reads(since, floor=floor)
    # What runs and what waits can be read from its question on.
    open_ = [log.running, *log.waiting] if log.running else log.waiting
    starts = [await admin.fetchval("SELECT start_seq FROM replies WHERE id = $1", reply) for reply in open_]
    assert all(floor <= max(start - 2, first) for start in starts)
    assert (await retention.run()) == Trimmed()


# -- what goes, and when -----------------------------------------------------------------------------------------------


async def test_deltas_go_a_quarter_of_an_hour_after_the_end(log: WrittenLog, retention: Retention) -> None:
    await log.ask()
    await log.write(20)
    await log.age(3 * 60 * MINUTE)
    assert await retention.run() == Trimmed()
    await log.end()
    end = log.head
    await log.ask()
    await log.write(3)
    await log.end()
    later = log.head
    await log.age(14 * MINUTE)
    assert await retention.run() == Trimmed()
    await log.admin.execute("UPDATE channel_events SET at = at - $1::interval WHERE seq <= $2", 2 * MINUTE, end)
    assert await retention.run() == Trimmed(channels=1, events=end)
    assert await log.assert_whole() == end
    await log.age(2 * MINUTE)
    assert await retention.run() == Trimmed(channels=1, events=later - end)
    assert await log.assert_whole() == later == log.head
    await log.assert_reads(end, floor=later)


async def test_a_reply_cancelled_while_it_waited_takes_no_delta_of_another_along(
    log: WrittenLog, retention: Retention
) -> None:
    await log.ask()
    await log.write(5)
    await log.ask()
    await log.cancel_waiting()
    await log.age(16 * MINUTE)
    assert await retention.run() == Trimmed()
    await log.write(5)
    await log.end()
    await log.age(5 * MINUTE)
    assert await retention.run() == Trimmed()
    await log.age(11 * MINUTE)
    assert (await retention.run()).events == log.head
    assert await log.assert_whole() == log.head


async def test_a_reply_that_waited_keeps_no_delta_of_the_one_before_it(log: WrittenLog, retention: Retention) -> None:
    await log.ask()
    await log.write(5)
    await log.ask()
    await log.end()
    end = log.head
    await log.start_next()
    await log.write(5)
    await log.age(10 * MINUTE)
    await log.end()
    await log.age(6 * MINUTE)
    assert (await retention.run()).events == end
    assert await log.assert_whole() == end


async def test_everything_goes_after_a_day(log: WrittenLog, retention: Retention) -> None:
    note = ("notice", {"text": "hello"})
    await log.append(note, note, note)
    await log.age(2 * 60 * MINUTE)
    await log.append(note, note)
    await log.age(DAY - 3 * 60 * MINUTE)
    assert await retention.run() == Trimmed()
    await log.age(2 * 60 * MINUTE)
    assert await retention.run() == Trimmed(channels=1, events=3)
    assert await log.assert_whole() == 3
    await log.age(2 * 60 * MINUTE)
    assert await retention.run() == Trimmed(channels=1, events=2)
    assert await log.assert_whole() == 5
    # Positions go on where they were.
    assert await log.append(note) == [6]


async def test_a_channel_keeps_ten_thousand_events(
    log: WrittenLog, retention: Retention, admin: asyncpg.Connection
) -> None:
    for channel, count in (("tasks", 10_000), ("trading", 12_345)):
        await fill(admin, Channel(log.scope.workspace_id, channel, channel), count)
    assert await retention.run() == Trimmed(channels=1, events=2345)
    rows = await admin.fetch(
        "SELECT h.channel, h.floor, count(*) AS kept, min(e.seq) AS first FROM channel_heads h "
        "JOIN channel_events e USING (workspace_id, channel) GROUP BY 1, 2 ORDER BY 1"
    )
    assert [tuple(row) for row in rows] == [("tasks", 0, 10_000, 1), ("trading", 2345, 10_000, 2346)]


async def fill(admin: asyncpg.Connection, channel: Channel, count: int) -> None:
    """Give a new channel so many events."""
    await admin.execute(
        "INSERT INTO channel_heads (workspace_id, channel, seq) VALUES ($1, $2, $3)", *channel.address, count
    )
    await admin.execute(
        "INSERT INTO channel_events (workspace_id, channel, seq, e, d, at) "
        "SELECT $1, $2, n, 'notice', '{}', now() FROM generate_series(1, $3) n",
        *channel.address, count,
    )  # fmt: skip


@pytest.mark.parametrize("keep_events", [1, 10_000])
async def test_an_open_reply_keeps_what_it_is_folded_from(
    database: Database, log: WrittenLog, admin: asyncpg.Connection, keep_events: int
) -> None:
    """However old it is, and however long the channel."""
    await log.ask()
    await log.write(3)
    await log.end()
    before = log.head
    await log.ask()
    await log.write(8)
    await log.ask()
    await admin.execute("UPDATE channel_heads SET seq = seq + 1000")
    await admin.execute("UPDATE replies SET start_seq = start_seq + 1000 WHERE start_seq > $1", before)
    await admin.execute("UPDATE channel_events SET seq = seq + 1000 WHERE seq > $1", before)
    log.events = [(seq + 1000 if seq > before else seq, e, d) for seq, e, d in log.events]
    await log.age(30 * DAY)
    assert (await Retention(database, limits(keep_events=keep_events)).run()).failed == 0
    # Its question and itself are events too.
    floor = await log.assert_whole()
    assert floor == before + 1000
    await log.assert_reads(0, floor=floor)
    for since in range(floor, log.head + 1):
        await log.assert_reads(since, floor=floor)


# -- how ---------------------------------------------------------------------------------------------------------------


async def watch(admin: asyncpg.Connection) -> None:
    """Note each statement that removes events, with the floor that its transaction leaves."""
    await admin.execute(
        """
        CREATE TABLE removals (at serial, count bigint, last bigint, floor bigint, transaction bigint);
        CREATE FUNCTION note_removal() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            INSERT INTO public.removals (count, last, floor, transaction)
            SELECT count(*), max(g.seq), (SELECT max(h.floor) FROM public.channel_heads h), txid_current() FROM gone g;
            RETURN NULL;
        END $$;
        CREATE TRIGGER note_removal AFTER DELETE ON channel_events REFERENCING OLD TABLE AS gone
            FOR EACH STATEMENT EXECUTE FUNCTION note_removal();
        """
    )


async def test_batches_are_bounded_and_the_floor_goes_with_each(
    database: Database, log: WrittenLog, admin: asyncpg.Connection
) -> None:
    await log.ask()
    await log.write(95)
    await log.end()
    await log.age(DAY)
    await watch(admin)
    assert await Retention(database, RealtimeSettings(), batch=30).run() == Trimmed(channels=1, events=log.head)
    rows = await admin.fetch("SELECT count, last, floor, transaction FROM removals WHERE count > 0 ORDER BY at")
    assert [row["count"] for row in rows] == [30, 30, 30, log.head - 90]
    assert all(row["floor"] == row["last"] for row in rows)
    assert len({row["transaction"] for row in rows}) == 4


async def test_a_run_ends_when_its_time_is_over(
    database: Database, log: WrittenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.ask()
    await log.write(30)
    await log.end()
    await log.age(DAY)
    retention = Retention(database, RealtimeSettings(), batch=5)
    monkeypatch.setattr(module, "_RUN_S", -1.0)
    assert await retention.run() == Trimmed()
    monkeypatch.undo()
    assert (await retention.run()).events == log.head


async def test_more_than_a_page_is_found(
    log: WrittenLog, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first pages hold nothing but what must stay."""
    monkeypatch.setattr(module, "_PAGE", 2)
    logs = [log, *[await log.another() for _ in range(7)]]
    for one in logs[:4]:
        await one.ask()
        await one.write(2)
        await one.ask()
        await one.cancel_waiting()
        await one.age(2 * DAY)
    for one in logs[4:]:
        await one.ask()
        await one.write(2)
        await one.end()
        await one.age(20 * MINUTE)
    assert (await retention.run()).channels == 4
    assert [await one.assert_whole() for one in logs] == [0] * 4 + [one.head for one in logs[4:]]


async def test_many_trimmers_and_a_writer_do_no_harm(
    database: Database, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    log = await WrittenLog.make(database, admin)
    other = Database(urls, DatabaseSettings())
    try:
        await log.ask()
        await log.write(300)
        await log.end()
        old = log.head
        await log.age(DAY)
        await log.ask()

        async def write() -> None:
            for _ in range(40):
                await log.write(2)

        trimmers = [Retention(where, RealtimeSettings(), batch=7) for where in (database, other, other)]
        done, *_ = await asyncio.gather(asyncio.gather(*(one.run() for one in trimmers)), write())
        again = await trimmers[0].run()
        assert sum(one.events for one in [*done, again]) == old
        assert {one.failed for one in done} == {0}
        floor = await log.assert_whole()
        assert floor == old
        await log.assert_reads(old, floor=floor)
    finally:
        await other.close()


async def test_a_reader_that_is_overtaken_gets_no_hole(database: Database, admin: asyncpg.Connection) -> None:
    """At each position a reader may be when the floor passes it."""
    log = await WrittenLog.make(database, admin, settings=limits(ring_events=0))
    await log.ask()
    await log.write(40)
    await log.end()
    target = 30
    row = await admin.fetchrow("SELECT epoch FROM channel_heads")
    readers = []
    for pages in range(11):
        cursor = log.cursor()
        _, why, _ = await cursor.open(log.channel.name, Since(ep=row["epoch"], seq=0))
        assert why == "ok"
        for _ in range(pages):
            await cursor.read(limit=4)
        readers.append((pages * 4, cursor))
    retention = Retention(database, RealtimeSettings())
    assert await retention.trim(Target(*log.channel.address, row["epoch"], target)) == target
    for place, cursor in readers:
        if place < target:
            assert await cursor.read(limit=4) == []
            assert cursor.lost
            # What a connection does then.
            snapshot = await cursor.renew()
            assert {message["id"]: message for message in snapshot.state["messages"]} == log.state()
            assert not cursor.is_behind
        else:
            read = []
            while cursor.is_behind:
                read += await cursor.read(limit=4)
            assert not cursor.lost
            assert [event.first for event in read[:1]] == [place + 1]
            assert read[-1].seq == log.head
        cursor.close()


async def test_readers_racing_with_trimmers_get_no_hole(database: Database, admin: asyncpg.Connection) -> None:
    log = await WrittenLog.make(database, admin, settings=limits(ring_events=0, replay_bytes=10**9))
    await log.ask()
    await log.write(600)
    await log.end()
    overtaken: list[bool] = []

    async def read() -> None:
        cursor = log.cursor()
        _, _, snapshot = await cursor.open(log.channel.name, Since(ep=None, seq=0))
        place = 0 if snapshot is None else snapshot.head.seq
        messages = log.state(place)
        while cursor.is_behind and not cursor.lost:
            for event in await cursor.read(limit=3):
                assert event.first == place + 1
                place = event.seq
                apply(messages, event.e, event.d)
        assert messages == log.state(place)
        assert cursor.lost or place == log.head
        overtaken.append(cursor.lost or snapshot is not None)
        cursor.close()

    await log.age(DAY)
    readers = [asyncio.create_task(read()) for _ in range(4)]
    await asyncio.gather(*readers, Retention(database, RealtimeSettings(), batch=11).run())
    await read()
    assert overtaken[-1]
    assert await log.assert_whole() == log.head


async def test_a_channel_that_was_made_anew_is_left_alone(
    log: WrittenLog, retention: Retention, admin: asyncpg.Connection
) -> None:
    await log.append(*[("notice", {})] * 5)
    epoch = await admin.fetchval("SELECT epoch FROM channel_heads")
    await admin.execute("UPDATE channel_heads SET epoch = 'another'")
    assert await retention.trim(Target(*log.channel.address, epoch, 4)) == 0
    assert await retention.trim(Target(*log.channel.address, "another", 6)) == 0
    assert await log.assert_whole() == 0
    assert await retention.trim(Target(*log.channel.address, "another", 4)) == 4
    assert await retention.trim(Target(*log.channel.address, "another", 3)) == 0
    assert await log.assert_whole() == 4


async def test_whoever_works_in_a_channel_for_long_is_not_waited_for(
    log: WrittenLog, retention: Retention, admin: asyncpg.Connection
) -> None:
    other = await log.another()
    for one in (log, other):
        await one.append(("notice", {}))
        await one.age(2 * DAY)
    async with admin.transaction():
        await admin.execute("SELECT FROM channel_heads WHERE channel = $1 FOR UPDATE", log.channel.key)
        assert await retention.run() == Trimmed(channels=1, events=1, busy=1)
        assert await retention.handle(None) == {"channels": 0, "events": 0, "busy": 1}
    assert await retention.run() == Trimmed(channels=1, events=1)


async def test_an_erasure_is_never_the_one_to_give_way(
    log: WrittenLog, retention: Retention, admin: asyncpg.Connection
) -> None:
    """It takes the events before the head, the other way round than retention."""
    await log.append(("notice", {}), ("notice", {}))
    await log.age(2 * DAY)
    await admin.execute("UPDATE channel_heads SET owner_id = $1", log.scope.user_id)
    async with admin.transaction():
        await admin.execute("DELETE FROM channel_events")
        trimming = asyncio.create_task(retention.run())
        watcher = await log.database.connect_system()

        async def waits() -> bool:
            return trimming.done() or await watcher.fetchval(
                "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%moved%'"
            )

        await until(waits)
        await watcher.close()
        await admin.execute("DELETE FROM channel_heads")
    assert await trimming == Trimmed(busy=1)


async def test_a_channel_that_cannot_be_trimmed_keeps_no_other_from_it(
    log: WrittenLog, retention: Retention, admin: asyncpg.Connection
) -> None:
    other = await log.another()
    for one in (log, other):
        await one.append(("notice", {}))
        await one.age(2 * DAY)
    await admin.execute(
        f"ALTER TABLE channel_heads ADD CONSTRAINT broken CHECK (floor = 0 OR channel <> '{log.channel.key}')"
    )
    assert await retention.run() == Trimmed(channels=1, events=1, failed=1)
    with pytest.raises(RetentionIncomplete, match="1 channels"):
        await retention.handle(None)


async def test_no_run_looks_at_all_channels_or_events(log: WrittenLog, admin: asyncpg.Connection) -> None:
    await admin.execute(
        "INSERT INTO channel_heads (workspace_id, channel, seq) SELECT $1, n::text, 20 FROM generate_series(1, 2000) n",
        log.scope.workspace_id,
    )
    await admin.execute(
        """
        INSERT INTO channel_events (workspace_id, channel, seq, e, d, at)
        SELECT $1, n::text, s, CASE s WHEN 1 THEN 'message.created' WHEN 20 THEN 'reply.completed' ELSE 'reply.delta' END,
               '{}', now() - random() * interval '10 minutes'
        FROM generate_series(1, 2000) n, generate_series(1, 20) s
        """,
        log.scope.workspace_id,
    )
    await admin.execute("ANALYZE")
    runs: list[tuple[str, tuple[Any, ...]]] = [
        (module._ENDED, (15 * MINUTE, *module._BEGINNING, 2000)),
        (module._OLD, (DAY, *module._BEGINNING, 2000)),
        (module._LONG, (10_000, 10)),
        (module._TRIM, (log.scope.workspace_id, "7", "epoch", 10, 2000)),
    ]
    for statement, arguments in runs:
        plan = "\n".join(row[0] for row in await admin.fetch(f"EXPLAIN {statement}", *arguments))
        assert "Seq Scan on channel_" not in plan, plan
        assert "Index" in plan


# -- over the life of a workspace ----------------------------------------------------------------------------------


async def test_it_runs_by_itself(settings: Settings, log: WrittenLog, admin: asyncpg.Connection) -> None:
    await log.append(("notice", {}), ("notice", {}))
    await log.age(2 * DAY)

    async def trimmed() -> bool:
        return bool(await admin.fetchval("SELECT floor = 2 FROM channel_heads WHERE channel = $1", log.channel.key))

    async def done() -> bool:
        return bool(await admin.fetchval("SELECT bool_or(status = 'completed') FROM jobs WHERE kind = 'retention'"))

    async with running(settings):
        await until(trimmed)
        await until(done)
    row = await admin.fetchrow(
        "SELECT result::text AS result, workspace_id::text AS workspace FROM jobs WHERE kind = 'retention'"
    )
    assert '"events": 2' in row["result"] or '"events":2' in row["result"]
    assert row["workspace"] == "00000000-0000-0000-0000-000000000000"


async def test_nothing_stays_without_a_head(
    alice: Account, admin: asyncpg.Connection, log: WrittenLog, database: Database
) -> None:
    """Retention finds channels by their heads: whoever removes a head removes the events."""
    made = (await alice.http.post("/api/v1/conversations", json={})).json()["data"]["id"]
    body = {"parts": [{"type": "text", "text": "hello"}]}
    sent = await alice.http.post(f"/api/v1/conversations/{made}/messages", json=body)
    assert sent.status_code in {201, 202}, sent.text
    orphans = (
        "SELECT DISTINCT e.workspace_id, e.channel FROM channel_events e "
        "LEFT JOIN channel_heads h USING (workspace_id, channel) WHERE h.channel IS NULL"
    )
    assert (await alice.http.delete(f"/api/v1/conversations/{made}")).status_code in {200, 204}
    assert await admin.fetch(orphans) == []
    await log.append(("notice", {}))
    await admin.execute("DELETE FROM workspaces WHERE id = $1", log.scope.workspace_id)
    await RealtimeData().erase(database, Person(alice.user_id, (alice.workspace_id,)))
    assert await admin.fetch(orphans) == []
    assert await admin.fetchval("SELECT count(*) FROM channel_events WHERE channel = $1", f"user:{alice.user_id}") == 0


@pytest.mark.parametrize("everything", [False, True])
async def test_a_process_that_slept_past_the_floor_gives_its_readers_a_state(
    database: Database, admin: asyncpg.Connection, *, everything: bool
) -> None:
    log = await WrittenLog.make(database, admin)
    await log.ask()
    cursor = log.cursor()
    await cursor.open(log.channel.name, Since(ep=None, seq=-1))
    # Another process writes and trims; this one hears of nothing.
    awake, log.bus = log.bus, Bus(database, limits())
    await log.write(100)
    await log.end()
    await log.age(DAY)
    if not everything:
        await log.ask()
    assert (await Retention(database, RealtimeSettings()).run()).channels == 1
    await awake.heal()
    assert cursor.is_behind
    assert await cursor.read() == []
    assert cursor.lost
    snapshot = await cursor.renew()
    assert {message["id"]: message for message in snapshot.state["messages"]} == log.state()
    await log.ask()
    await awake.heal()
    assert [event.seq for event in await cursor.read()] == list(range(snapshot.head.seq + 1, log.head + 1))
    cursor.close()
