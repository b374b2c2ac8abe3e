"""What is left of a person who wrote in somebody else's conversation."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from fastapi import FastAPI

from parley.chat.personal_data import ChatData
from parley.core.personal_data import Person
from parley.realtime.fold import visible_text
from tests.chat.conftest import Talk
from tests.chat.people import change, join
from tests.conftest import Account, SignUp

_MARKER = "ornithopter"

Log = Callable[[UUID], Awaitable[list[tuple[int, str, dict[str, Any]]]]]


@pytest.fixture
async def guest(talk: Talk, alice: Account, sign_up: SignUp, admin: asyncpg.Connection) -> Account:
    """A member who may write in alice's conversation, and keeps it at the top."""
    joined = await join(admin, alice, await sign_up())
    await change(alice, talk.id, shared_access="write")
    await change(joined, talk.id, pinned=True)
    return joined


async def test_what_they_said_is_emptied_and_the_rest_stays(
    app: FastAPI, talk: Talk, guest: Account, alice: Account, admin: asyncpg.Connection, log_of: Log
) -> None:
    _, before = await talk.send("deltas=4 rate=0 seed=1")
    await talk.ended(before)
    question, reply = await Talk(guest, talk.id).send(f"deltas=2 rate=0 say={_MARKER} x")
    await talk.ended(reply)
    _, after = await talk.send("deltas=4 rate=0 seed=2")
    await talk.ended(after)
    kept = {id_: visible_text(await talk.message(id_)) for id_ in (before, after)}
    person = Person(guest.user_id, (guest.workspace_id,))
    exported = [record async for record in ChatData().export(app.state.database, person)]
    assert [record.entry for record in exported] == [
        *[f"workspaces/{guest.workspace_id}/messages.json"] * 2, f"workspaces/{guest.workspace_id}/conversation_pins.json"
    ]  # fmt: skip

    for _ in range(2):
        # Any number of times: an attempt may end anywhere.
        await ChatData().erase(app.state.database, person)

    for table in ("messages", "search_entries", "channel_events", "conversation_pins"):
        rows = await admin.fetch(f"SELECT t::text AS row FROM {table} t")
        assert not [row["row"] for row in rows if _MARKER in row["row"]], table
    assert await admin.fetchval("SELECT count(*) FROM conversation_pins") == 0
    assert [message["parts"] for message in await talk.messages() if message["id"] in {str(question), str(reply)}] == [
        [], []
    ]  # fmt: skip
    assert {id_: visible_text(await talk.message(id_)) for id_ in kept} == kept
    # Whoever reads along is told, in a log that has no hole.
    log = await log_of(talk.id)
    told = [d["id"] for _, e, d in log if e == "message.updated"]
    assert sorted(told) == sorted([str(question), str(reply)])
    assert [seq for seq, _, _ in log] == list(range(log[0][0], log[0][0] + len(log)))
    floor = await admin.fetchval("SELECT floor FROM channel_heads WHERE channel = $1", f"conversation:{talk.id}")
    assert floor == log[0][0] - 1


async def test_a_reply_of_somebody_else_goes_on_meanwhile(
    app: FastAPI, talk: Talk, guest: Account, log_of: Log
) -> None:
    _, reply = await Talk(guest, talk.id).send(f"deltas=2 rate=0 say={_MARKER} x")
    await talk.ended(reply)
    _, running = await talk.send("deltas=100 rate=100 seed=3")
    await talk.when(running, lambda message: len(visible_text(message)) > 20)
    await ChatData().erase(app.state.database, Person(guest.user_id, (guest.workspace_id,)))
    log = await log_of(talk.id)
    assert _MARKER not in str(log)
    ended = await talk.ended(running)
    assert ended["status"] == "completed"
    assert UUID(ended["id"]) == running
