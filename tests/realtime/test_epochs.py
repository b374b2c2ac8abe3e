"""After a restore from a backup no position means what it meant: every client gets a state, and goes on from there."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from typer.testing import CliRunner

from parley.cli.app import app
from parley.core.db import Database, DatabaseUrls
from parley.core.settings import DatabaseSettings
from parley.realtime.epochs import new_epochs
from tests.conftest import Account, TestDatabases
from tests.realtime.conftest import Frame, LiveServer, Peer, Serve, conversation_of
from tests.realtime.written_log import WrittenLog

TABLES = ("conversations", "messages", "replies", "channel_heads", "channel_events")
"""What a conversation is made of, in the order in which rows refer to each other."""


@dataclass
class Backup:
    """The conversations of a database as they are now, and the way back to them."""

    admin: asyncpg.Connection

    async def take(self) -> None:
        """Remember."""
        for table in TABLES:
            await self.admin.execute(f"CREATE TABLE saved_{table} AS TABLE {table}")

    async def restore(self) -> None:
        """Make everything as it was."""
        async with self.admin.transaction():
            await self.admin.execute("UPDATE conversations SET current_id = NULL")
            for table in reversed(TABLES):
                await self.admin.execute(f"DELETE FROM {table}")
            for table in TABLES:
                await self.admin.execute(f"INSERT INTO {table} SELECT * FROM saved_{table}")


@pytest.fixture
async def server(serve_with: Serve) -> AsyncIterator[LiveServer]:
    """A server with a database of its own."""
    started, done = asyncio.Event(), asyncio.Event()
    made: list[LiveServer] = []

    async def run() -> None:
        async with serve_with() as one:
            made.append(one)
            started.set()
            await done.wait()

    task = asyncio.create_task(run())
    waiter = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task.done():
        task.result()
    yield made[0]
    done.set()
    await task


@pytest.fixture
async def account(server: LiveServer) -> AsyncIterator[Account]:
    """A user of it."""
    async with server.sign_up() as made:
        yield made


@pytest.fixture
async def backup(server: LiveServer, databases: TestDatabases) -> AsyncIterator[Backup]:
    """A backup of its database."""
    connection = await asyncpg.connect(databases.postgres.admin_url(server.urls.name))
    yield Backup(connection)
    await connection.close()


@pytest.fixture
async def operator(server: LiveServer) -> AsyncIterator[Database]:
    """The database as a command beside the server has it."""
    made = Database(server.urls, DatabaseSettings())
    yield made
    await made.close()


async def turn(peer: Peer, channel: str, text: str = "hello") -> Frame:
    """Say something and read to the end of the reply; return the last frame."""
    sent = await peer.say(channel, text)
    assert sent["t"] == "ok", sent
    return await peer.event("reply.completed", reply=sent["reply"])


def asked(snap: Frame) -> list[str]:
    """Return the questions of a state."""
    return [message["parts"][0]["text"] for message in snap["state"]["messages"] if message["role"] == "user"]


async def test_a_connected_client_gets_the_older_state_within_a_second(
    server: LiveServer, account: Account, backup: Backup, operator: Database
) -> None:
    channel = await conversation_of(account)
    async with server.join(account) as peer:
        subbed = await peer.sub(channel)
        older = (await turn(peer, channel, "first"))["seq"]
        await backup.take()
        newer = (await turn(peer, channel, "second"))["seq"]
        seen = len(peer.seen)
        await backup.restore()
        # The inbox has a head too.
        assert await new_epochs(operator) >= 2
        started = time.monotonic()
        again = await peer.until("subbed")
        while again["ep"] == subbed["ep"]:
            # The poll came between the restore and the epochs.
            again = await peer.until("subbed")
        # A second for the poll; the rest is the machine's.
        assert time.monotonic() - started < 2.5
        assert (again["why"], again["recovered"], again["head"]) == ("epoch", False, older)
        snap = await peer.until("snap")
        assert (snap["ep"], snap["seq"], asked(snap)) == (again["ep"], older, ["first"])
        assert (await peer.until("live"))["seq"] == older
        assert [frame for frame in peer.seen[seen:] if frame["t"] == "ev"] == []
        # The positions of the old count come again, and mean something else.
        await turn(peer, channel, "another second, which is longer than the first one was")
        assert peer.logs[channel].ep == again["ep"]
        assert peer.logs[channel].last >= newer


@pytest.mark.parametrize("more", [False, True])
async def test_a_client_that_comes_back_gets_the_older_state(
    server: LiveServer, account: Account, backup: Backup, operator: Database, *, more: bool
) -> None:
    """Also where the new count has passed the old one, so that its position could be one of ours."""
    channel = await conversation_of(account)
    async with server.join(account) as peer:
        subbed = await peer.sub(channel)
        older = (await turn(peer, channel, "first"))["seq"]
        await backup.take()
        newer = (await turn(peer, channel, "second"))["seq"]
        await backup.restore()
        await new_epochs(operator)
        while (await peer.until("subbed"))["ep"] == subbed["ep"]:
            pass
        questions = ["first"]
        if more:
            for text in ("third", "fourth"):
                head = (await turn(peer, channel, text))["seq"]
                questions.append(text)
            assert head > newer
    await assert_anew(server, account, channel, subbed["ep"], (1, older, newer), questions)


async def assert_anew(
    server: LiveServer, account: Account, channel: str, epoch: str, positions: tuple[int, ...], questions: list[str]
) -> None:
    """Fail unless a client with a position of the old epoch gets the state, and nothing on top of it."""
    for seq in positions:
        async with server.join(account, subs=[{"ch": channel, "since": {"ep": epoch, "seq": seq}}]) as peer:
            again = await peer.until("subbed")
            assert (again["why"], again["recovered"]) == ("epoch", False)
            assert asked(await peer.until("snap")) == questions
            await peer.until("live")
            assert [frame["t"] for frame in peer.seen] == ["welcome", "subbed", "snap", "live"]


async def test_a_client_that_comes_back_before_the_poll_gets_nothing_of_the_old_count(
    serve_with: Serve, databases: TestDatabases
) -> None:
    """The process still holds events of the old epoch, of a channel that nobody watches or that somebody does."""
    async with serve_with(realtime={"poll_s": 3600}) as server, server.sign_up() as account:
        connection = await asyncpg.connect(databases.postgres.admin_url(server.urls.name))
        operator = Database(server.urls, DatabaseSettings())
        backup = Backup(connection)
        channel = await conversation_of(account)
        async with server.join(account) as peer:
            subbed = await peer.sub(channel)
            older = (await turn(peer, channel, "first"))["seq"]
            await backup.take()
            newer = (await turn(peer, channel, "second"))["seq"]
        await backup.restore()
        await new_epochs(operator)
        await assert_anew(server, account, channel, subbed["ep"], (1, older, newer), ["first"])
        async with server.join(account) as watcher:
            await watcher.sub(channel)
            await new_epochs(operator)
            await assert_anew(server, account, channel, subbed["ep"], (older,), ["first"])
            # Whoever comes makes it known to those who are there.
            assert (await watcher.until("subbed"))["why"] == "epoch"
            await watcher.until("live")
            await turn(watcher, channel, "third")
        await operator.close()
        await connection.close()


async def test_a_stream_ends_and_comes_back_with_the_older_state(
    server: LiveServer, account: Account, backup: Backup, operator: Database
) -> None:
    channel = await conversation_of(account)
    async with server.join(account) as peer:
        subbed = await peer.sub(channel)
        older = (await turn(peer, channel, "first"))["seq"]
        await backup.take()
        newer = (await turn(peer, channel, "second"))["seq"]
    url = f"/api/v1/channels/{channel}/events"
    position = {"Last-Event-ID": f"{subbed['ep']}:{newer}"}
    async with account.http.stream("GET", url, headers=position) as stream:
        lines = stream.aiter_lines()
        assert await anext(lines) == ": parley.v1"
        await backup.restore()
        await new_epochs(operator)
        async with asyncio.timeout(5):
            assert [line async for line in lines if line.startswith("event:")] == ["event: unsubbed"]
    async with account.http.stream("GET", url, headers=position) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("id:"):
                epoch, _, seq = line.removeprefix("id:").strip().rpartition(":")
                break
    assert epoch != subbed["ep"]
    assert int(seq) == older


async def test_every_channel_gets_another_epoch(database: Database, admin: asyncpg.Connection) -> None:
    assert await new_epochs(database) == 0
    log = await WrittenLog.make(database, admin)
    for _ in range(4):
        await log.another()
    await WrittenLog.make(database, admin)
    heads = "SELECT epoch, workspace_id, channel, seq, floor FROM channel_heads ORDER BY workspace_id, channel"
    before = await admin.fetch(heads)
    for batch in (2, 3, 6, 1000):
        assert await new_epochs(database, batch=batch) == 6
    after = await admin.fetch(heads)
    assert [row[1:] for row in map(tuple, after)] == [row[1:] for row in map(tuple, before)]
    assert {row["epoch"] for row in before}.isdisjoint(row["epoch"] for row in after)
    assert len({row["epoch"] for row in after}) == 6


async def test_who_writes_meanwhile_is_not_disturbed(
    database: Database, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    log = await WrittenLog.make(database, admin)
    other = await log.another()
    for one in (log, other):
        await one.ask()

    async def write(one: WrittenLog) -> None:
        for _ in range(30):
            await one.write(1)

    operator = Database(urls, DatabaseSettings())
    try:
        *counts, _, _ = await asyncio.gather(
            *(new_epochs(operator, batch=1) for _ in range(5)), write(log), write(other)
        )
    finally:
        await operator.close()
    assert counts == [2] * 5
    for one in (log, other):
        assert await one.assert_whole() == 0


def test_the_command_says_how_many(
    urls: DatabaseUrls, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, made: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARLEY_DATABASE_URL", urls.app)
    monkeypatch.setenv("PARLEY_DATABASE_SYSTEM_URL", urls.system)
    monkeypatch.setenv("PARLEY_DATABASE_OWNER_URL", urls.owner)
    made()
    result = CliRunner().invoke(app, ["db", "epoch"])
    assert (result.exit_code, result.output) == (0, "3 channels have a new epoch.\n")


@pytest.fixture
def made(urls: DatabaseUrls, databases: TestDatabases) -> Callable[[], None]:
    """Make three channels, outside of any event loop."""

    async def make() -> None:
        connection = await asyncpg.connect(databases.postgres.admin_url(urls.name))
        await connection.execute(
            """
            WITH w AS (
                INSERT INTO workspaces (id, name, personal) VALUES (gen_random_uuid(), 'A', true) RETURNING id
            )
            INSERT INTO channel_heads (workspace_id, channel, seq) SELECT id, n::text, 5 FROM w, generate_series(1, 3) n
            """
        )
        await connection.close()

    return lambda: asyncio.run(make())
