"""A turn: durable before it is acknowledged, once per key, and with exactly one end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider, script
from parley.chat.turns import Send
from parley.core.scope import Role, Scope
from parley.realtime.fold import digest, visible_text
from tests.chat.conftest import Talk, start_talk, until
from tests.conftest import Account
from tests.documented import documented

Log = Callable[[UUID], Awaitable[list[tuple[int, str, dict[str, Any]]]]]

TERMINAL = {"reply.completed", "reply.failed", "reply.cancelled"}


def terminals(log: list[tuple[int, str, dict[str, Any]]], reply: UUID) -> list[tuple[str, dict[str, Any]]]:
    """Return the terminal events of a reply."""
    return [(e, d) for _, e, d in log if e in TERMINAL and d["reply"] == str(reply)]


def text_of(log: list[tuple[int, str, dict[str, Any]]], reply: UUID) -> str:
    """Return the text that the deltas of a reply add up to, checking every offset."""
    text = ""
    for _, e, d in log:
        if e == "reply.delta" and d["reply"] == str(reply):
            assert d["off"] == len(text)
            text += d["x"]
    return text


@pytest.mark.parametrize("model", ["gpt", "claude"])
async def test_two_thousand_deltas_arrive_whole(talk: Talk, log_of: Log, model: str) -> None:
    question, reply = await talk.send("deltas=2000 rate=0 seed=11 size=4", model=model)
    ended = await talk.ended(reply)

    expected = "".join(script(11, 2000, 4))
    assert ended["status"] == "completed"
    assert visible_text(ended) == expected
    log = await log_of(talk.id)
    assert [seq for seq, _, _ in log] == list(range(1, len(log) + 1))
    assert text_of(log, reply) == expected
    ((e, d),) = terminals(log, reply)
    assert (e, d["len"], d["sha256"]) == ("reply.completed", *digest(expected))
    assert d["message"] == ended
    assert d["usage"]["output_tokens"] == 2000
    assert [e for _, e, _ in log[:3]] == ["message.created", "message.created", "reply.started"]
    assert log[0][2]["id"] == str(question)


async def test_the_same_key_fifty_times_is_one_message_and_one_generation(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    cid = uuid4()
    answers = await asyncio.gather(*(talk.send("deltas=20 rate=0", cid=cid) for _ in range(50)))
    assert len(set(answers)) == 1
    await talk.ended(answers[0][1])

    assert len(provider.requests) == 1
    assert await admin.fetchval("SELECT count(*) FROM messages") == 2
    assert await admin.fetchval("SELECT count(*) FROM replies") == 1
    assert (await talk.send("deltas=20 rate=0", cid=cid)) == answers[0]
    assert len(provider.requests) == 1


async def test_a_key_used_for_something_else_is_refused(talk: Talk, alice: Account, admin: asyncpg.Connection) -> None:
    cid = uuid4()
    _, reply = await talk.send("deltas=3 rate=0", cid=cid)
    other_body = await alice.http.post(talk.path, json={"text": "other"}, headers={"Idempotency-Key": str(cid)})
    assert (other_body.status_code, other_body.json()["error"]) == (422, "idempotency_key_reused")
    elsewhere = await start_talk(alice)
    other_place = await alice.http.post(
        elsewhere.path, json={"text": "deltas=3 rate=0"}, headers={"Idempotency-Key": str(cid)}
    )
    assert (other_place.status_code, other_place.json()["error"]) == (422, "idempotency_key_reused")
    await talk.ended(reply)
    assert await admin.fetchval("SELECT count(*) FROM messages") == 2


async def test_two_users_may_use_the_same_key(talk: Talk, bob: Account, provider: FakeProvider) -> None:
    cid = uuid4()
    theirs = await start_talk(bob)
    (_, one), (_, two) = await asyncio.gather(
        talk.send("deltas=2 rate=0", cid=cid), theirs.send("deltas=2 rate=0", cid=cid)
    )
    assert one != two
    await asyncio.gather(talk.ended(one), theirs.ended(two))
    assert len(provider.requests) == 2


async def test_a_send_takes_at_most_six_queries(app: FastAPI, talk: Talk, alice: Account) -> None:
    # asyncpg's own log sees what SQLAlchemy sends and what we send past it; BEGIN and COMMIT do not count.
    seen: list[str] = []

    def note(record: Any) -> None:
        seen.append(record.query)

    connect = asyncpg.connect
    scope = Scope(alice.workspace_id, alice.user_id, Role.OWNER)
    database = app.state.database
    async with database.unit_of_work(scope) as unit:
        connection = await unit.driver()
        connection.add_query_logger(note)
    assert connect is asyncpg.connect
    seen.clear()
    wanted = Send(conversation_id=talk.id, cid=uuid4(), contents=("deltas=2 rate=0 ttft=0.5",))
    sent = await app.state.chat.turns.send(scope, wanted)
    before_generation = [q for q in seen if not q.strip().upper().startswith(("BEGIN", "COMMIT", "ROLLBACK"))]
    # The pool is last-in first-out, so the send ran on the connection that is being watched.
    assert 3 <= len(before_generation) <= 6, before_generation
    await talk.ended(UUID(sent.reply["id"]))


async def test_cancel_in_mid_stream_keeps_the_partial(
    talk: Talk, alice: Account, provider: FakeProvider, log_of: Log
) -> None:
    _, reply = await talk.send("deltas=1000 rate=100 seed=5")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    answer = await alice.http.post(f"/api/v1/replies/{reply}/cancel")
    assert answer.status_code == 202
    ended = await talk.ended(reply)

    assert ended["status"] == "cancelled"
    text = visible_text(ended)
    assert text
    assert "".join(script(5, 1000, 4)).startswith(text)
    log = await log_of(talk.id)
    ((e, d),) = terminals(log, reply)
    assert (e, d["by"], d["partial"], d["len"], d["sha256"]) == (
        "reply.cancelled", str(alice.user_id), True, *digest(text),
    )  # fmt: skip
    assert text_of(log, reply) == text

    async def provider_saw_it() -> bool:
        return provider.requests[0].closed_early

    await until(provider_saw_it, timeout_s=0.5)


async def test_cancel_before_the_start_of_a_waiting_reply(
    talk: Talk, alice: Account, log_of: Log, provider: FakeProvider
) -> None:
    _, first = await talk.send("deltas=200 rate=100")
    _, second = await talk.send("deltas=5 rate=0")
    assert (await talk.message(second))["status"] == "queued"
    await alice.http.post(f"/api/v1/replies/{second}/cancel")
    assert (await talk.message(second))["status"] == "cancelled"
    await alice.http.post(f"/api/v1/replies/{first}/cancel")
    await talk.ended(first)

    log = await log_of(talk.id)
    assert [e for e, _ in terminals(log, second)] == ["reply.cancelled"]
    assert not [e for _, e, d in log if e == "reply.started" and d["reply"] == str(second)]
    assert len(provider.requests) == 1


async def test_cancel_twice_and_after_the_end_is_one_end(talk: Talk, alice: Account, log_of: Log) -> None:
    _, reply = await talk.send("deltas=400 rate=100")
    cancels = [alice.http.post(f"/api/v1/replies/{reply}/cancel") for _ in range(5)]
    assert {answer.status_code for answer in await asyncio.gather(*cancels)} == {202}
    await talk.ended(reply)
    assert (await alice.http.post(f"/api/v1/replies/{reply}/cancel")).status_code == 202
    assert len(terminals(await log_of(talk.id), reply)) == 1


async def test_cancel_racing_the_end_is_one_end(talk: Talk, alice: Account, log_of: Log) -> None:
    for number in range(20):
        _, reply = await talk.send(f"deltas={number % 5 + 1} rate=0 seed={number}")
        await asyncio.sleep(number * 0.0007)  # not to wait for anything: to move the race
        await alice.http.post(f"/api/v1/replies/{reply}/cancel")
        ended = await talk.ended(reply)
        log = await log_of(talk.id)
        assert len(terminals(log, reply)) == 1, (ended, log[-8:])
        ((e, _),) = terminals(log, reply)
        assert e == f"reply.{ended['status']}"
        last = [seq for seq, _, d in log if d.get("reply") == str(reply)][-1]
        assert [x for seq, x, _ in log if seq == last] == [e], "nothing of a reply follows its end"


async def test_a_second_message_waits_for_the_first_reply(talk: Talk, log_of: Log) -> None:
    _, first = await talk.send("deltas=20 rate=100")
    _, second = await talk.send("deltas=5 rate=0 seed=3")
    _, third = await talk.send("deltas=5 rate=0 seed=4")
    ended = [await talk.ended(reply) for reply in (first, second, third)]
    assert [message["status"] for message in ended] == ["completed"] * 3

    shown = {"reply.queued", "reply.started", "reply.completed"}
    order = [(e, UUID(d["reply"])) for _, e, d in await log_of(talk.id) if e in shown]
    assert order == [
        ("reply.started", first), ("reply.queued", second), ("reply.queued", third), ("reply.completed", first),
        ("reply.started", second), ("reply.completed", second), ("reply.started", third), ("reply.completed", third),
    ]  # fmt: skip


async def test_reject_and_interrupt(talk: Talk, alice: Account) -> None:
    _, first = await talk.send("deltas=1000 rate=50")
    refused = await alice.http.post(talk.path, json={"text": "now", "on_active": "reject"})
    assert (refused.status_code, refused.json()["error"]) == (409, "active_reply")
    _, second = await talk.send("deltas=3 rate=0", on_active="interrupt")
    assert (await talk.ended(first))["status"] == "cancelled"
    assert (await talk.ended(second))["status"] == "completed"


async def test_history_reaches_the_model(talk: Talk, provider: FakeProvider) -> None:
    _, first = await talk.send("deltas=3 rate=0 seed=1")
    answer = visible_text(await talk.ended(first))
    _, second = await talk.send("deltas=3 rate=0 seed=2")
    await talk.ended(second)
    said = [(m["role"], m["content"]) for m in provider.requests[1].body["messages"]]
    assert [role for role, _ in said] == ["system", "user", "assistant", "user"]
    assert said[2][1] == answer


async def test_a_tool_call_acts_on_the_callers_tasks(app: FastAPI, alice: Account, bob: Account, log_of: Log) -> None:
    talk = await start_talk(alice)
    _, reply = await talk.send("add task buy milk", model="demo")
    ended = await talk.ended(reply)
    assert ended["status"] == "completed"
    tool, text = ended["parts"][0], ended["parts"][-1]
    assert (tool["type"], tool["name"], tool["state"]) == ("tool", "add_task", "done")
    assert tool["input"] == {"title": "buy milk"}
    assert "buy milk" in text["text"]

    titles = [task["title"] for task in (await alice.http.get("/api/v1/tasks")).json()["data"]]
    assert titles == ["buy milk"]
    assert (await bob.http.get("/api/v1/tasks")).json()["data"] == []
    states = [d["state"] for _, e, d in await log_of(talk.id) if e == "reply.tool"]
    assert states == ["input", "running", "done"]


async def test_a_tool_that_fails_is_told_to_the_model(talk: Talk, provider: FakeProvider) -> None:
    _, reply = await talk.send('tool=add_task:{"title":""} deltas=3 rate=0')
    ended = await talk.ended(reply)
    tool = next(part for part in ended["parts"] if part["type"] == "tool")
    assert tool["state"] == "failed"
    assert "title" in tool["output"]["error"]


async def test_deleting_a_conversation_stops_its_reply(
    talk: Talk, alice: Account, admin: asyncpg.Connection, provider: FakeProvider
) -> None:
    _, reply = await talk.send("deltas=1000 rate=50")
    await talk.when(reply, lambda message: bool(visible_text(message)))
    answer = await alice.http.delete(f"/api/v1/conversations/{talk.id}")
    assert answer.status_code == 204

    async def stopped() -> bool:
        return provider.requests[0].closed_early

    await until(stopped)
    for table in ("messages", "conversations", "replies"):
        assert await admin.fetchval(f"SELECT count(*) FROM {table}") == 0
    left = await admin.fetchval("SELECT count(*) FROM channel_events WHERE channel LIKE 'conversation:%'")
    assert left == 0
    assert (await alice.http.get(talk.path)).status_code == 404


async def test_a_lost_process_leaves_a_failed_reply_with_its_partial(
    app: FastAPI, talk: Talk, log_of: Log, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=1000 rate=100 seed=9")
    _, waiting = await talk.send("deltas=5 rate=0")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    # As if the process had died and another had started: the rows belong to an owner that holds no lock.
    await admin.execute("UPDATE replies SET owner = 1")
    await app.state.chat.take_over.sweep()
    ended = await talk.ended(reply)

    assert ended["status"] == "failed"
    assert ended["error"]["code"] == "worker_lost"
    text = visible_text(ended)
    assert text
    assert "".join(script(9, 1000, 4)).startswith(text)
    log = await log_of(talk.id)
    ((e, d),) = terminals(log, reply)
    assert (e, d["partial"], d["can"], d["len"], d["sha256"]) == (
        "reply.failed", True, ["continue", "regenerate"], *digest(text),
    )  # fmt: skip
    assert (await talk.ended(waiting))["status"] == "completed", "who waited behind it is served"


async def test_the_former_owner_appends_nothing(
    app: FastAPI, talk: Talk, log_of: Log, admin: asyncpg.Connection, provider: FakeProvider
) -> None:
    _, reply = await talk.send("deltas=1000 rate=100")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    await admin.execute("UPDATE replies SET fence = fence + 1")

    async def given_up() -> bool:
        return provider.requests[0].closed_early and app.state.chat.generator.running == 0

    await until(given_up)
    before = await log_of(talk.id)
    await asyncio.sleep(0.1)  # three ticks in which a zombie would write
    assert await log_of(talk.id) == before
    assert not terminals(before, reply)


async def test_a_foreign_reply_is_not_found(talk: Talk, bob: Account) -> None:
    _, reply = await talk.send("deltas=5 rate=0")
    for id_ in (reply, uuid4()):
        answer = await bob.http.post(f"/api/v1/replies/{id_}/cancel")
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
    assert (await talk.ended(reply))["status"] == "completed"


async def test_the_turn_as_server_sent_events(talk: Talk, alice: Account) -> None:
    cid = str(uuid4())
    headers = {"Accept": "text/event-stream", "Idempotency-Key": cid}
    body = {"text": "deltas=30 rate=200 seed=8"}
    live = await alice.http.post(talk.path, json=body, headers=headers)
    assert live.status_code == 200
    assert live.headers["content-type"].startswith("text/event-stream")
    again = await alice.http.post(talk.path, json=body, headers=headers)

    def last_id(answer: httpx.Response) -> str:
        return [line for line in answer.text.splitlines() if line.startswith("id: ")][-1]

    assert last_id(live) == last_id(again)
    lines = documented().streamed(live.text).splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[:2] == ["message.created", "message.created"]
    assert names[-1] == "reply.completed"
    assert len(await talk.messages()) == 2
