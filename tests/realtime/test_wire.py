"""Between processes: what one commits another shows at once, and soon when nobody could tell it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
from fastapi import FastAPI

from parley.core.db import DatabaseUrls
from parley.core.settings import RealtimeSettings
from parley.realtime.events import Channel, LoggedEvent, NewEvent
from parley.realtime.log import append
from parley.realtime.wire import CHANNEL, Wire, mark_of
from tests.chat.conftest import until
from tests.conftest import make_settings, running
from tests.valkey import Valkey, run_valkey

WORKSPACE = UUID(int=7)
SLOW_POLL_S = 30.0


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with run_valkey(tmp_path) as made:
        yield made


class Watcher:
    """A subscriber that notes what it is woken for."""

    def __init__(self) -> None:
        self.resets = 0

    def wake(self) -> None: ...

    def reset(self) -> None:
        self.resets += 1


@asynccontextmanager
async def two(
    tmp_path: Path, urls: DatabaseUrls, *, redis_url: str | None = None, poll_s: float = SLOW_POLL_S
) -> AsyncIterator[tuple[FastAPI, FastAPI]]:
    """Run two processes' worth of the service on one database. Their poll is too slow to help."""
    async with AsyncExitStack() as stack:
        apps = []
        for name in ("one", "two"):
            realtime = RealtimeSettings(poll_s=poll_s)
            settings = make_settings(tmp_path / name, urls, realtime=realtime, redis_url=redis_url)
            settings.data_dir.mkdir(exist_ok=True)
            apps.append(await stack.enter_async_context(running(settings)))

        async def know_each_other() -> bool:
            return not any(app.state.chat.wire.alone for app in apps)

        await until(know_each_other)
        yield apps[0], apps[1]


@pytest.fixture
async def workspace(admin: asyncpg.Connection) -> UUID:
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'One', false)", WORKSPACE)
    return WORKSPACE


async def write(app: FastAPI, channel: Channel, count: int = 1) -> None:
    """Append events as a request would."""
    async with app.state.database.system_unit_of_work() as unit:
        await append(unit, app.state.realtime.bus, [NewEvent(channel, "task.created", {"n": n}) for n in range(count)])


def ring_of(app: FastAPI, channel: Channel) -> "tuple[object, Watcher]":
    watcher = Watcher()
    ring, new = app.state.realtime.bus.attach(channel, watcher)
    if new:
        ring.open(head=0, epoch="e")
    return ring, watcher


def named(n: int) -> Channel:
    return Channel(WORKSPACE, f"conversation:{UUID(int=n)}", f"conversation:{UUID(int=n)}")


async def sees(app: FastAPI, channel: Channel, head: int, *, timeout_s: float = 3) -> None:
    ring, _ = ring_of(app, channel)

    async def there() -> bool:
        return bool(ring.head >= head)  # type: ignore[attr-defined]  # a Ring

    await until(there, timeout_s=timeout_s)
    found = ring.after(0, limit=1000)  # type: ignore[attr-defined]  # as above
    assert [event.seq for event in found] == list(range(1, head + 1))


async def test_what_one_commits_the_other_shows(tmp_path: Path, urls: DatabaseUrls, workspace: UUID) -> None:
    async with two(tmp_path, urls) as (one, other):
        channel = named(1)
        ring_of(other, channel)
        for n in range(1, 6):
            await write(one, channel, 2)
            await sees(other, channel, 2 * n)
        # And the other way round.
        ring_of(one, channel)
        await write(other, channel)
        await sees(one, channel, 11)


async def test_what_was_committed_while_one_subscribed(tmp_path: Path, urls: DatabaseUrls, workspace: UUID) -> None:
    """Told before there was anybody to hear: whoever subscribes looks once more."""
    async with two(tmp_path, urls) as (one, other):
        channel = named(2)
        await write(one, channel, 3)
        ring_of(other, channel)
        await other_epoch(other, one, channel)
        await sees(other, channel, 3)


async def other_epoch(app: FastAPI, writer: FastAPI, channel: Channel) -> None:
    """Give the ring the channel's real epoch, as a subscription does."""
    async with writer.state.database.system_unit_of_work() as unit:
        connection = await unit.driver()
        epoch = await connection.fetchval(
            "SELECT epoch FROM channel_heads WHERE workspace_id = $1 AND channel = $2", *channel.address
        )
    ring, watcher = ring_of(app, channel)
    ring.epoch = epoch  # type: ignore[attr-defined]  # a Ring
    app.state.realtime.bus.detach(ring, watcher)


async def test_many_channels_at_once(tmp_path: Path, urls: DatabaseUrls, workspace: UUID) -> None:
    """More than one payload holds, and more events in one of them than are read together."""
    async with two(tmp_path, urls) as (one, other):
        channels = [named(n) for n in range(300)]
        for channel in channels:
            ring_of(other, channel)
        await asyncio.gather(*(write(one, channel, 200 if channel is channels[0] else 3) for channel in channels))
        for channel in channels[1:]:
            await sees(other, channel, 3, timeout_s=10)
        await sees(other, channels[0], 200)


async def test_a_process_whose_connection_was_cut_hears_again(
    tmp_path: Path, urls: DatabaseUrls, workspace: UUID, admin: asyncpg.Connection
) -> None:
    async with two(tmp_path, urls) as (one, other):
        channel = named(3)
        ring_of(other, channel)
        await write(one, channel)
        await sees(other, channel, 1)
        cut = await admin.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND (query LIKE 'LISTEN%' OR query LIKE '%pg_notify%')"
        )
        assert cut
        await write(one, channel)
        # It missed that, and knows that it may have: it looks when it hears again.
        await other_epoch(other, one, channel)
        await sees(other, channel, 2, timeout_s=10)
        await write(one, channel)
        await sees(other, channel, 3, timeout_s=10)


async def test_when_nobody_is_told_the_poll_finds_it(tmp_path: Path, urls: DatabaseUrls, workspace: UUID) -> None:
    async with two(tmp_path, urls, poll_s=0.3) as (one, other):
        one.state.chat.wire.announce = lambda *_: None
        channel = named(4)
        await write(one, channel, 5)
        ring_of(other, channel)
        await other_epoch(other, one, channel)
        await sees(other, channel, 5)
        await write(one, channel, 5)
        await sees(other, channel, 10)


async def test_a_channel_that_is_gone_is_gone_everywhere(tmp_path: Path, urls: DatabaseUrls, workspace: UUID) -> None:
    async with two(tmp_path, urls) as (one, other):
        channel = named(5)
        _, watcher = ring_of(other, channel)
        await write(one, channel)
        await sees(other, channel, 1)
        async with one.state.database.system_unit_of_work() as unit:
            connection = await unit.driver()
            await connection.execute("DELETE FROM channel_heads")
        one.state.realtime.bus.close_channel(channel.address)

        async def told() -> bool:
            return watcher.resets > 0

        await until(told, timeout_s=3)


async def test_valkey_carries_the_events(tmp_path: Path, urls: DatabaseUrls, workspace: UUID, valkey: Valkey) -> None:
    async with two(tmp_path, urls, redis_url=valkey.url) as (one, other):
        channel = named(6)
        ring_of(other, channel)

        async def both_listen() -> bool:
            found = await one.state.chat.wire._redis._client.pubsub_numsub("parley:realtime")
            return bool(found[0][1] == 2)

        await until(both_listen)
        reads: list[int] = []

        async def read(told: dict[object, int]) -> None:
            reads.extend(told.values())

        other.state.realtime.bus._read_told = read
        for n in range(1, 21):
            await write(one, channel, 2)
            await sees(other, channel, 2 * n)
        assert reads == [], "it was read from PostgreSQL"


async def test_valkey_may_die_and_come_back(
    tmp_path: Path, urls: DatabaseUrls, workspace: UUID, valkey: Valkey
) -> None:
    async with two(tmp_path, urls, redis_url=valkey.url) as (one, other):
        channel = named(8)
        ring_of(other, channel)
        await write(one, channel)
        await other_epoch(other, one, channel)
        ring_of(other, channel)
        await sees(other, channel, 1)
        valkey.kill()
        for n in range(2, 7):
            began = time.monotonic()
            await write(one, channel)
            await sees(other, channel, n)
            assert time.monotonic() - began < 3
        valkey.start()
        for n in range(7, 12):
            await write(one, channel)
            await sees(other, channel, n, timeout_s=5)


async def test_payloads_stay_below_what_postgres_takes(database: "object", urls: DatabaseUrls) -> None:
    from parley.core.db import Database
    from parley.core.settings import DatabaseSettings

    made = Database(urls, DatabaseSettings(url=urls.app))
    wire = Wire(made)
    moved = {(uuid4(), f"conversation:{uuid4()}"): 10**12 + n for n in range(2000)}
    texts = list(wire._texts(moved, [("cancel", uuid4())]))
    assert max(len(text) for text in texts) < 8000
    pieces = [piece for text in texts for piece in text.split(" ")[1:]]
    assert len(pieces) == 2001
    assert len(texts) < 10
    assert {f"{mark_of(address)}:{seq}" for address, seq in moved.items()} < set(pieces)
    await made.close()


def test_what_cannot_be_read_is_taken_for_news() -> None:
    """A message of another version says at least that there is something to look at."""
    missed: list[bool] = []

    class Receiver:
        def moved(self, mark: str, seq: int) -> None: ...

        def arrived(self, mark: str, events: "list[LoggedEvent]") -> None: ...

        def missed(self) -> None:
            missed.append(True)

        def called(self, word: str, id: UUID) -> None: ...

    wire = Wire.__new__(Wire)
    wire._receiver = Receiver()  # type: ignore[assignment]  # it has what a receiver has
    wire._node = "me"
    wire._notified("me mark:not-a-number")
    assert missed == []
    wire._notified("other mark:not-a-number")
    assert missed == [True]
    assert CHANNEL
