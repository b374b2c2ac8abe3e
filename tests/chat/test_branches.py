"""Edits stand beside what they edit, and a conversation shows the branch that was chosen."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.realtime.fold import visible_text
from tests.chat.conftest import Talk, start_talk
from tests.chat.people import change, inbox
from tests.conftest import Account


async def edit(
    owner: Account, message: UUID | str, text: str = "deltas=3 rate=0 seed=9", *, cid: UUID | None = None, **body: Any
) -> httpx.Response:
    headers = {"Idempotency-Key": str(cid)} if cid else {}
    return await owner.http.patch(f"/api/v1/messages/{message}", json={"text": text, **body}, headers=headers)


async def edited(owner: Account, message: UUID | str, text: str = "deltas=3 rate=0 seed=9", **body: Any) -> Any:
    answer = await edit(owner, message, text, **body)
    assert answer.status_code == 202, answer.text
    return answer.json()["data"]


async def current(owner: Account, conversation: UUID) -> str:
    shown = (await owner.http.get(f"/api/v1/conversations/{conversation}")).json()["data"]
    return str(shown["current_id"])


async def test_an_edit_of_the_first_message_is_a_second_root_that_is_answered(
    talk: Talk, alice: Account, provider: FakeProvider
) -> None:
    question, reply = await talk.send("deltas=3 rate=0 seed=1")
    await talk.ended(reply)
    data = await edited(alice, question, "deltas=3 rate=0 seed=2")
    assert (data["message"]["parent_id"], data["message"]["role"]) == (None, "user")
    assert data["reply"]["parent_id"] == data["message"]["id"]
    ended = await talk.ended(UUID(data["reply"]["id"]))
    assert ended["status"] == "completed"
    # The model hears of the new one only; the old branch is whole; the new one is shown.
    told = provider.requests[-1].body["messages"]
    assert [message["content"] for message in told if message["role"] == "user"] == ["deltas=3 rate=0 seed=2"]
    assert len(await talk.messages()) == 4
    assert (await talk.message(reply))["status"] == "completed"
    assert await current(alice, talk.id) == data["reply"]["id"]


async def test_an_edit_further_down_keeps_what_came_before(talk: Talk, alice: Account, provider: FakeProvider) -> None:
    _, first = await talk.send("deltas=2 rate=0 seed=1")
    await talk.ended(first)
    question, second = await talk.send("deltas=2 rate=0 seed=2")
    await talk.ended(second)
    data = await edited(alice, question, "deltas=2 rate=0 seed=3")
    assert data["message"]["parent_id"] == str(first)
    await talk.ended(UUID(data["reply"]["id"]))
    told = [message["content"] for message in provider.requests[-1].body["messages"] if message["role"] == "user"]
    assert told == ["deltas=2 rate=0 seed=1", "deltas=2 rate=0 seed=3"]


async def test_the_same_key_edits_once(
    talk: Talk, alice: Account, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    question, reply = await talk.send("deltas=2 rate=0")
    await talk.ended(reply)
    cid = uuid4()
    answers = await asyncio.gather(*(edited(alice, question, cid=cid) for _ in range(20)))
    assert len({(answer["message"]["id"], answer["reply"]["id"]) for answer in answers}) == 1
    await talk.ended(UUID(answers[0]["reply"]["id"]))
    assert await admin.fetchval("SELECT count(*) FROM messages") == 4
    assert len(provider.requests) == 2
    # The same text in another place is something else.
    other = await edit(alice, answers[0]["message"]["id"], cid=cid)
    assert (other.status_code, other.json()["error"]) == (422, "idempotency_key_reused")


async def test_only_what_a_user_said_can_be_edited(talk: Talk, alice: Account, bob: Account) -> None:
    question, reply = await talk.send("deltas=2 rate=0")
    await talk.ended(reply)
    assert (await edit(alice, reply)).status_code == 409
    assert (await edit(alice, uuid4())).status_code == 404
    assert (await edit(bob, question)).status_code == 404
    both = await alice.http.patch(f"/api/v1/messages/{question}", json={"text": "a", "parts": []})
    assert both.status_code == 422
    assert len(await talk.messages()) == 2


@pytest.mark.parametrize(("on_active", "expected"), [("reject", 409), ("queue", 202), ("interrupt", 202)], ids=str)
async def test_an_edit_while_a_reply_is_written(
    talk: Talk, alice: Account, provider: FakeProvider, on_active: str, expected: int
) -> None:
    question, reply = await talk.send("deltas=1000 rate=100 seed=5")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    answer = await edit(alice, question, on_active=on_active)
    assert answer.status_code == expected, answer.text
    if on_active == "reject":
        assert answer.json()["error"] == "active_reply"
        assert len(await talk.messages()) == 2
    if on_active == "queue":
        waiting = UUID(answer.json()["data"]["reply"]["id"])
        assert (await talk.message(waiting))["status"] == "queued"
        assert (await talk.message(reply))["status"] == "streaming"
    if on_active != "interrupt":
        await alice.http.post(f"/api/v1/replies/{reply}/cancel")
    assert (await talk.ended(reply))["status"] == "cancelled"
    if expected == 202:
        assert (await talk.ended(UUID(answer.json()["data"]["reply"]["id"])))["status"] == "completed"


async def test_a_branch_is_chosen_by_any_of_its_messages(
    talk: Talk, alice: Account, admin: asyncpg.Connection, log_of: Any
) -> None:
    question, first = await talk.send("deltas=2 rate=0 seed=1")
    await talk.ended(first)
    _, end = await talk.send("deltas=2 rate=0 seed=2")
    await talk.ended(end)
    other = UUID((await edited(alice, question))["reply"]["id"])
    await talk.ended(other)
    assert await current(alice, talk.id) == str(other)

    # The old first question: its branch goes down to the newest end below it.
    assert (await change(alice, talk.id, current_id=str(question)))["current_id"] == str(end)
    assert (await change(alice, talk.id, current_id=str(other)))["current_id"] == str(other)
    assert (await change(alice, talk.id, current_id=str(first)))["current_id"] == str(end)
    # What is sent next follows the branch that is shown.
    data = (await alice.http.post(talk.path, json={"text": "deltas=1 rate=0"})).json()["data"]
    assert data["message"]["parent_id"] == str(end)
    await talk.ended(UUID(data["reply"]["id"]))
    told = [d["current_id"] for e, d in await inbox(admin, alice) if e == "conversation.updated"]
    assert told[-4:-1] == [str(end), str(other), str(end)]
    shown = [d for _, e, d in await log_of(talk.id) if e == "conversation.changed"]
    assert [d["current_id"] for d in shown] == [str(end), str(other), str(end)]
    assert all("pinned" not in d for d in shown)


async def test_a_branch_of_another_conversation_is_not_chosen(talk: Talk, alice: Account) -> None:
    _, reply = await talk.send("deltas=1 rate=0")
    await talk.ended(reply)
    elsewhere = await start_talk(alice)
    _, other = await elsewhere.send("deltas=1 rate=0")
    await elsewhere.ended(other)
    for id_ in (other, uuid4()):
        answer = await alice.http.patch(f"/api/v1/conversations/{talk.id}", json={"current_id": str(id_)})
        assert answer.status_code == 404
    refused = await alice.http.patch(f"/api/v1/conversations/{talk.id}", json={"current_id": None})
    assert refused.status_code == 422
    assert await current(alice, talk.id) == str(reply)


async def test_one_branch_is_listed_a_stretch_at_a_time(talk: Talk, alice: Account) -> None:
    question, first = await talk.send("deltas=1 rate=0 seed=1")
    await talk.ended(first)
    await talk.send("deltas=1 rate=0 seed=2")
    other = await edited(alice, question)
    await talk.ended(UUID(other["reply"]["id"]))
    last_question, last = await talk.send("deltas=1 rate=0 seed=4")
    await talk.ended(last)
    expected = [other["message"]["id"], other["reply"]["id"], str(last_question), str(last)]

    async def stretch(**params: Any) -> tuple[list[str], str | None]:
        answer = await alice.http.get(talk.path, params={"branch": str(last), **params})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        return [message["id"] for message in body["data"]], body["meta"].get("next_cursor")

    assert await stretch() == (expected, None)
    newest, cursor = await stretch(limit=3)
    assert newest == expected[1:]
    assert await stretch(limit=3, cursor=cursor) == (expected[:1], None)
    assert await stretch(branch=str(uuid4())) == ([], None)


async def test_an_edit_as_server_sent_events(talk: Talk, alice: Account) -> None:
    question, reply = await talk.send("deltas=2 rate=0")
    await talk.ended(reply)
    answer = await alice.http.patch(
        f"/api/v1/messages/{question}",
        json={"text": "deltas=4 rate=0"},
        headers={"Accept": "text/event-stream"},
    )
    assert answer.status_code == 200
    assert "event: reply.completed" in answer.text
