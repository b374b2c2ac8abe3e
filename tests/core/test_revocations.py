"""Revocations: told to every process when they hold, and nothing is trusted for long by one that does not hear."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import asyncpg
import pytest

from parley.core import listening as listening_module
from parley.core.db import Database
from parley.core.revocations import CHANNEL, UNHEARD_CACHE_S, Revocation, Revocations
from parley.core.scope import Role, Scope


@dataclass
class Heard:
    """What a process was told, and how often it was to look at everything."""

    revocations: list[Revocation] = field(default_factory=list)
    resets: int = 0

    def listen(self, made: Revocations) -> "Heard":
        made.subscribe(self.revocations.append, reset=self.reset)
        return self

    def reset(self) -> None:
        self.resets += 1


async def until(holds: Callable[[], bool], *, timeout_s: float = 5) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def listening(database: Database, heard: Heard) -> AsyncIterator[Revocations]:
    made = Revocations(database)
    heard.listen(made)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def announce(made: Revocations, database: Database, *revocations: Revocation) -> None:
    async with database.system_unit_of_work() as unit:
        for revocation in revocations:
            await made.announce(unit, revocation)


async def cut(admin: asyncpg.Connection) -> int:
    """End every connection that listens; return how many there were."""
    rows = await admin.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND usename = 'parley_system'"
    )
    return len(rows)


async def test_another_process_hears_of_each_and_this_one_at_the_commit(database: Database) -> None:
    here, there = Heard(), Heard()
    sent = [
        Revocation("session", uuid4()),
        Revocation("switch", uuid4(), uuid4()),
        Revocation("user", uuid4()),
        Revocation("key", uuid4()),
        Revocation("membership", uuid4(), uuid4()),
        Revocation("workspace", uuid4()),
    ]
    async with listening(database, here) as mine, listening(database, there):
        assert (here.resets, there.resets) == (1, 1)
        async with database.system_unit_of_work() as unit:
            for revocation in sent:
                await mine.announce(unit, revocation)
            assert here.revocations == []
        # At that very moment, and not when the news comes round.
        assert set(sent) <= set(here.revocations)
        await until(lambda: len(there.revocations) == len(sent))
        assert there.revocations == sent
        assert (here.resets, there.resets) == (1, 1)


async def test_what_was_rolled_back_is_told_to_nobody(database: Database) -> None:
    here, there = Heard(), Heard()
    async with listening(database, here) as mine, listening(database, there):
        with pytest.raises(RuntimeError):
            async with database.system_unit_of_work() as unit:
                await mine.announce(unit, Revocation("user", uuid4()))
                raise RuntimeError
        last = Revocation("user", uuid4())
        await announce(mine, database, last)
        await until(lambda: bool(there.revocations))
        assert here.revocations[:1] == there.revocations == [last]


@pytest.mark.parametrize(
    "text", ["", "planet:" + str(UUID(int=1)), "session", "session:", "session:x", "membership:" + str(UUID(int=1)) + ":y", "é" * 100]
)  # fmt: skip
async def test_what_this_version_does_not_know_has_everything_looked_at(
    database: Database, admin: asyncpg.Connection, text: str
) -> None:
    heard = Heard()
    async with listening(database, heard) as made:
        await admin.execute("SELECT pg_notify($1, $2)", CHANNEL, text)
        await until(lambda: heard.resets == 2)
        assert made.is_listening
        assert heard.revocations == []


async def test_a_cut_connection_comes_back_and_everything_is_looked_at(
    database: Database, admin: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    async with listening(database, heard) as made:
        for turn in range(1, 4):
            with caplog.at_level(logging.WARNING, logger=listening_module.__name__):
                assert await cut(admin) >= 1
                # Nobody hears this one: it is why everything is looked at afterwards.
                await admin.execute("SELECT pg_notify($1, $2)", CHANNEL, Revocation("user", uuid4()).to_text())
                loop = asyncio.get_running_loop()
                began = loop.time()
                await until(lambda turn=turn: heard.resets == turn + 1)  # type: ignore[misc]  # a default binds the turn
                assert loop.time() - began < 1.5
            assert f"not listening to {CHANNEL}" in caplog.text
            caplog.clear()
        last = Revocation("user", uuid4())
        await admin.execute("SELECT pg_notify($1, $2)", CHANNEL, last.to_text())
        await until(lambda: heard.revocations == [last])
        assert made.is_listening


async def test_while_nothing_is_heard_nothing_is_remembered_for_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert UNHEARD_CACHE_S <= 0.8
    heard = Heard()
    async with listening(database, heard) as made:
        assert made.cache_s(30) == 30
        refused = asyncio.Event()

        async def refuse() -> asyncpg.Connection:
            refused.set()
            raise OSError("no way there")

        with monkeypatch.context() as patched:
            patched.setattr(database, "connect_system", refuse)
            assert made._listening is not None
            assert made._listening._connection is not None
            made._listening._connection.terminate()
            async with asyncio.timeout(5):
                await refused.wait()
            assert not made.is_listening
            assert made.cache_s(30) == UNHEARD_CACHE_S
            assert made.cache_s(0.2) == 0.2
            assert heard.resets == 1
        await until(lambda: made.is_listening)
        assert heard.resets == 2
        assert made.cache_s(30) == 30
    assert not made.is_listening
    # One that was never started hears nothing either.
    assert Revocations().cache_s(30) == UNHEARD_CACHE_S


async def test_a_connection_that_falls_silent_is_noticed(database: Database) -> None:
    # As through a router that forgot the connection: no answer, and no end either.
    stalled, heard = _Stalled(database), Heard()
    made = Revocations(stalled)  # type: ignore[arg-type]  # all of a database that is asked for
    heard.listen(made)
    await made.start()
    await until(lambda: heard.resets == 2)
    assert stalled.opened == 2
    await made.close()


class _Stalled:
    """A database whose first connection never answers a ping."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.opened = 0

    async def connect_system(self) -> object:
        connection = await self._database.connect_system()
        self.opened += 1
        return _Silent(connection) if self.opened == 1 else connection


class _Silent:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def add_listener(self, channel: str, callback: object) -> None:
        await self._connection.add_listener(channel, callback)

    async def execute(self, _: str) -> None:
        await asyncio.Event().wait()

    def terminate(self) -> None:
        self._connection.terminate()


async def test_starting_without_a_database_that_answers_returns_and_goes_on_trying(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> asyncpg.Connection:
        raise OSError("no way there")

    heard = Heard()
    made = Revocations(database)
    heard.listen(made)
    with monkeypatch.context() as patched:
        patched.setattr(database, "connect_system", refuse)
        await made.start()
        assert not made.is_listening
    await until(lambda: made.is_listening)
    assert heard.resets == 1
    await made.close()


def scope(**changes: object) -> Scope:
    values = {"workspace_id": UUID(int=1), "user_id": UUID(int=2), "role": Role.MEMBER, "session_id": UUID(int=3)}
    return Scope(**{**values, **changes})  # type: ignore[arg-type]  # keyword arguments by name


@pytest.mark.parametrize(
    ("revocation", "changes", "concerned"),
    [
        (Revocation("session", UUID(int=3)), {}, True),
        (Revocation("session", UUID(int=4)), {}, False),
        (Revocation("switch", UUID(int=3), UUID(int=9)), {}, True),
        (Revocation("switch", UUID(int=3), UUID(int=1)), {}, False),
        (Revocation("switch", UUID(int=4), UUID(int=9)), {}, False),
        (Revocation("user", UUID(int=2)), {}, True),
        (Revocation("user", UUID(int=3)), {}, False),
        (Revocation("key", UUID(int=5)), {"session_id": None, "key_id": UUID(int=5)}, True),
        (Revocation("key", UUID(int=5)), {}, False),
        (Revocation("membership", UUID(int=1), UUID(int=2)), {}, True),
        (Revocation("membership", UUID(int=1), UUID(int=8)), {}, False),
        (Revocation("membership", UUID(int=8), UUID(int=2)), {}, False),
        (Revocation("workspace", UUID(int=1)), {}, True),
        (Revocation("workspace", UUID(int=2)), {}, False),
    ],
)
def test_whom_a_revocation_concerns(revocation: Revocation, changes: dict[str, object], concerned: bool) -> None:
    assert revocation.concerns(scope(**changes)) is concerned
    assert Revocation.from_text(revocation.to_text()) == revocation
