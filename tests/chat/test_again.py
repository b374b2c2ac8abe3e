"""Continuing a reply and answering a question once more: replies of their own, each asked for once."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from benchmarks.fake_plan import script
from benchmarks.fake_provider import FakeProvider
from parley.realtime.fold import visible_text
from tests.chat.conftest import Talk
from tests.conftest import Account

Again = dict[str, Any]


async def ask(owner: Account, reply: UUID | str, mode: str, *, cid: UUID | None = None) -> httpx.Response:
    headers = {"Idempotency-Key": str(cid)} if cid else {}
    return await owner.http.post(f"/api/v1/replies/{reply}/{mode}", headers=headers)


async def asked(owner: Account, reply: UUID | str, mode: str, *, cid: UUID | None = None) -> Again:
    answer = await ask(owner, reply, mode, cid=cid)
    assert answer.status_code == 202, answer.text
    data: Again = answer.json()["data"]
    return data


async def test_regenerate_answers_the_same_question_beside_the_first_answer(
    talk: Talk, alice: Account, provider: FakeProvider
) -> None:
    question, first = await talk.send("deltas=5 rate=0 seed=3")
    await talk.ended(first)
    data = await asked(alice, first, "regenerate")
    assert data["message"]["id"] == str(question)
    second = data["reply"]
    assert (second["parent_id"], second["status"]) == (str(question), "queued")
    ended = await talk.ended(UUID(second["id"]))
    assert ended["status"] == "completed"
    assert visible_text(ended) == "".join(script(3, 5, 4))
    # The model was told what the first time it was told, and not its first answer.
    asked_first, asked_then = (request.body["messages"] for request in provider.requests)
    assert asked_first == asked_then
    # The conversation shows the new one, and goes on from there.
    shown = (await alice.http.get(f"/api/v1/conversations/{talk.id}")).json()["data"]
    assert shown["current_id"] == second["id"]
    assert (await talk.message(first))["status"] == "completed"


async def test_continue_goes_on_from_what_was_cut_off(talk: Talk, alice: Account, provider: FakeProvider) -> None:
    _, reply = await talk.send("deltas=1000 rate=100 seed=5")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    await alice.http.post(f"/api/v1/replies/{reply}/cancel")
    partial = await talk.ended(reply)
    data = await asked(alice, reply, "continue")
    assert (data["message"]["id"], data["reply"]["parent_id"]) == (str(reply), str(reply))
    ended = await talk.ended(UUID(data["reply"]["id"]))
    assert (ended["status"], ended["parent_id"]) == ("completed", str(reply))
    told = provider.requests[-1].body["messages"]
    # This model cannot be given the beginning of its answer: it is asked in words.
    assert [message["role"] for message in told][-3:] == ["user", "assistant", "user"]
    assert visible_text(partial) in str(told[-2]["content"])
    assert "cut off" in str(told[-1]["content"])
    # What had its end stays as it was.
    assert await talk.message(reply) == partial


@pytest.mark.parametrize("mode", ["continue", "regenerate"])
async def test_fifty_at_once_with_one_key_are_one(
    talk: Talk, alice: Account, provider: FakeProvider, admin: asyncpg.Connection, mode: str
) -> None:
    _, reply = await talk.send("deltas=3 rate=0")
    await talk.ended(reply)
    cid = uuid4()
    answers = await asyncio.gather(*(asked(alice, reply, mode, cid=cid) for _ in range(50)))
    assert len({(answer["message"]["id"], answer["reply"]["id"]) for answer in answers}) == 1
    await talk.ended(UUID(answers[0]["reply"]["id"]))
    assert len(provider.requests) == 2
    assert await admin.fetchval("SELECT count(*) FROM replies") == 2
    again = await asked(alice, reply, mode, cid=cid)
    assert (again["reply"]["id"], again["reply"]["status"]) == (answers[0]["reply"]["id"], "completed")


async def test_a_key_stands_for_one_thing(talk: Talk, alice: Account, admin: asyncpg.Connection) -> None:
    cid = uuid4()
    _, reply = await talk.send("deltas=3 rate=0", cid=cid)
    await talk.ended(reply)
    for mode in ("continue", "regenerate"):
        refused = await ask(alice, reply, mode, cid=cid)
        assert (refused.status_code, refused.json()["error"]) == (422, "idempotency_key_reused")
    other = uuid4()
    made = await asked(alice, reply, "regenerate", cid=other)
    await talk.ended(UUID(made["reply"]["id"]))
    refused = await ask(alice, reply, "continue", cid=other)
    assert refused.status_code == 422
    body = {"text": "deltas=3 rate=0"}
    refused = await alice.http.post(talk.path, json=body, headers={"Idempotency-Key": str(other)})
    assert (refused.status_code, refused.json()["error"]) == (422, "idempotency_key_reused")
    assert await admin.fetchval("SELECT count(*) FROM messages") == 3


async def test_one_that_is_being_written_is_refused(talk: Talk, alice: Account) -> None:
    _, reply = await talk.send("deltas=1000 rate=50")
    for mode in ("continue", "regenerate"):
        refused = await ask(alice, reply, mode)
        assert (refused.status_code, refused.json()["error"]) == (409, "active_reply")
    await alice.http.post(f"/api/v1/replies/{reply}/cancel")
    await talk.ended(reply)


async def test_it_waits_for_its_turn(talk: Talk, alice: Account) -> None:
    _, first = await talk.send("deltas=3 rate=0")
    await talk.ended(first)
    _, running = await talk.send("deltas=20 rate=100")
    made = await asked(alice, first, "regenerate")
    second = UUID(made["reply"]["id"])
    assert (await talk.message(second))["status"] == "queued"
    assert (await talk.ended(second))["status"] == "completed"
    assert (await talk.message(running))["status"] == "completed"


@pytest.mark.parametrize("mode", ["continue", "regenerate"])
async def test_what_is_not_ones_own_is_not_there(talk: Talk, bob: Account, mode: str) -> None:
    question, reply = await talk.send("deltas=3 rate=0")
    await talk.ended(reply)
    for id_ in (reply, question, uuid4()):
        refused = await ask(bob, id_, mode)
        assert refused.status_code == 404
    # A question is no reply.
    assert (await ask(talk.owner, question, mode)).status_code == 404
