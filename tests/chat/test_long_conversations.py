"""A conversation of 5,000 messages: as many queries as in a short one, and none that looks at all of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
from fastapi import FastAPI

from benchmarks.long_conversation import fill
from benchmarks.servers import Account as Filler
from parley.chat import repository
from parley.chat.repository import HISTORY, HISTORY_CHARACTERS
from parley.chat.search import repository as search
from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.ids import new_id
from tests.chat.conftest import Talk, start_talk
from tests.chat.people import change, scope_of
from tests.conftest import Account
from tests.tasks.conftest import CountQueries, count_queries

__all__ = ["count_queries"]

_LONG = 5000


@dataclass(frozen=True)
class Two:
    """A short conversation and a long one, of alice's."""

    alice: Account
    short: Talk
    long: Talk


@pytest.fixture
async def two(alice: Account, admin: asyncpg.Connection) -> Two:
    """Both, filled."""
    made = Two(alice, await start_talk(alice), await start_talk(alice))
    filler = Filler("", str(alice.user_id), str(alice.workspace_id))
    for talk, count in ((made.short, 10), (made.long, _LONG)):
        await fill(admin, filler, str(talk.id), count)
    # Others' rows, so that the planner has no reason to read the whole of a table.
    await admin.execute("ANALYZE")
    return made


async def first_of(talk: Talk, admin: asyncpg.Connection) -> str:
    return str(await admin.fetchval("SELECT id FROM messages WHERE conversation_id = $1 ORDER BY id LIMIT 1", talk.id))


async def test_the_queries_are_as_many_however_long_it_is(
    app: FastAPI, two: Two, admin: asyncpg.Connection, count_queries: CountQueries
) -> None:
    counts: dict[str, list[int]] = {}
    http = two.alice.http
    for talk in (two.short, two.long):
        first, path = await first_of(talk, admin), f"/api/v1/conversations/{talk.id}"
        question, reply = await talk.send("deltas=1 rate=0")
        await talk.ended(reply)

        async def snapshot(talk: Talk = talk) -> None:
            scope = scope_of(two.alice)
            realtime = app.state.realtime
            channel, _, _ = await realtime.channels.authorise(scope, f"conversation:{talk.id}")
            state = (await realtime.channels.snapshot(scope, channel)).state
            assert len(state["messages"]) == (50 if talk is two.long else 12)

        async def get(path: str, **params: Any) -> None:
            assert (await http.get(path, params=params)).status_code == 200

        plan = {"text": "deltas=1 rate=0 ttft=1"}
        doings: dict[str, Callable[[], Awaitable[object]]] = {
            "snapshot": snapshot,
            "page": partial(get, talk.path),
            "branch": partial(get, talk.path, branch=str(reply)),
            "get": partial(get, path),
            "list": partial(get, "/api/v1/conversations"),
            "search": partial(get, "/api/v1/search", q="the"),
            "choose": partial(change, two.alice, talk.id, current_id=first),
            "rename": partial(change, two.alice, talk.id, title="Renamed"),
            # What it is answered with goes on beside, so it is counted to the answer of the request only.
            "send": partial(http.post, talk.path, json=plan),
            "edit": partial(http.patch, f"/api/v1/messages/{question}", json=plan),
        }
        for doing, do in doings.items():
            tries = []
            for _ in range(4):
                async with count_queries(app.state.database) as statements:
                    await do()
                tries.append(len(statements))
            # What goes on beside, such as the end of the reply before, may be among those of a try.
            counts.setdefault(doing, []).append(min(tries))
    assert {doing: few for doing, few in counts.items() if len(set(few)) > 1} == {}
    assert max(few[0] for few in counts.values()) <= 10, counts


@pytest.fixture
async def bound(urls: DatabaseUrls, two: Two) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the app's role, bound to alice for the test."""
    connection = await asyncpg.connect(asyncpg_dsn(urls.app))
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(
        "SELECT set_config('app.workspace_id', $1, true), set_config('app.user_id', $2, true)",
        str(two.alice.workspace_id), str(two.alice.user_id),
    )  # fmt: skip
    yield connection
    await transaction.rollback()
    await connection.close()


async def blocks(connection: asyncpg.Connection, statement: str, *arguments: object) -> int:
    """Return how many blocks of the database a statement reads."""
    (row,) = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *arguments)
    plan = orjson.loads(row[0])[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def test_a_send_reads_no_more_than_a_model_is_given(two: Two, bound: asyncpg.Connection) -> None:
    who = (two.alice.workspace_id, two.alice.user_id)

    async def read(talk: Talk, **limits: int) -> tuple[int, int]:
        current = await bound.fetchval("SELECT current_id FROM conversations WHERE id = $1", talk.id)
        arguments = (
            *who, talk.id, f"conversation:{talk.id}", new_id(), None, current,
            limits.get("messages", HISTORY), limits.get("characters", HISTORY_CHARACTERS),
        )  # fmt: skip
        row = await bound.fetchrow(repository._BEFORE_SEND, *arguments)
        return len(orjson.loads(row["history"])), await blocks(bound, repository._BEFORE_SEND, *arguments)

    short, _ = await read(two.short)
    long, cost = await read(two.long)
    assert (short, long) == (10, HISTORY)
    fewer, less = await read(two.long, characters=10_000)
    assert fewer < 40
    assert less < cost / 5
    # The one that passes the bound is the last.
    assert (await read(two.long, characters=1))[0] == 1
    path = await bound.fetch(
        repository._PATH, who[0],
        await bound.fetchval("SELECT current_id FROM conversations WHERE id = $1", two.long.id), HISTORY, 10_000,
    )  # fmt: skip
    assert len(path) == fewer


async def test_a_page_reads_a_page(two: Two, bound: asyncpg.Connection) -> None:
    who = (two.alice.workspace_id, two.alice.user_id)
    assert await blocks(bound, repository._PAGE, *who, two.long.id, None, 51) < 200
    current: UUID = await bound.fetchval("SELECT current_id FROM conversations WHERE id = $1", two.long.id)
    assert await blocks(bound, repository._BRANCH, *who, two.long.id, current, None, 51) < 1000


async def test_a_search_reads_what_the_caller_has_and_nothing_else(two: Two, bound: asyncpg.Connection) -> None:
    who = (two.alice.workspace_id, two.alice.user_id)
    rows = await bound.fetch(search._SEARCH, *who, "th", True, 20, 0)
    assert 0 < rows[0]["total"] < _LONG
    size = await bound.fetchval("SELECT pg_relation_size('search_entries') / 8192")
    assert await blocks(bound, search._SEARCH, *who, "th", True, 20, 0) < 4 * size + 500
