"""Tool calls that wait for a yes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import orjson
import pytest
from fastapi import FastAPI

from parley.chat.approvals.personal_data import ApprovalData
from parley.core.personal_data import Person
from parley.core.settings import Settings
from parley.main import PERSONAL_DATA
from tests.chat.conftest import Talk, until
from tests.chat.scripted import MODEL, Script, newcomer
from tests.conftest import Account, SignUp, http_client, running

Log = Callable[[UUID], Awaitable[list[tuple[int, str, dict[str, Any]]]]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The model, which adds a task."""
    return Script([("add_task", {"title": "Buy milk"})]).install(monkeypatch)


async def asking_talk(owner: Account, *, approval: str = "writes", **fields: Any) -> Talk:
    """Make an assistant that asks, and a conversation with it."""
    body = {
        "name": f"a{uuid4().hex[:12]}",
        "title": "Asks",
        "instructions": "Be brief.",
        "approval": approval,
        **fields,
    }
    made = await owner.http.post("/api/v1/assistants", json=body)
    assert made.status_code == 201, made.text
    talk = await owner.http.post("/api/v1/conversations", json={"assistant": made.json()["data"]["id"], "model": MODEL})
    assert talk.status_code == 201, talk.text
    return Talk(owner, UUID(talk.json()["data"]["id"]))


@pytest.fixture
async def asking(alice: Account) -> Talk:
    """Alice's conversation with an assistant that asks before it changes anything."""
    return await asking_talk(alice)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tool parts of a message."""
    return [part for part in message["parts"] if part["type"] == "tool"]


async def waiting(talk: Talk, reply: UUID, count: int = 1) -> list[dict[str, Any]]:
    """Return the calls of a reply once so many wait."""

    def holds(message: dict[str, Any]) -> bool:
        assert message["status"] in {"queued", "streaming"}, message
        return [call["state"] for call in calls_of(message)].count("approval") == count

    return [call for call in calls_of(await talk.when(reply, holds)) if call["state"] == "approval"]


async def approve(http: httpx.AsyncClient, call: str | UUID, approved: object = True) -> httpx.Response:
    """Say yes or no."""
    return await http.post(f"/api/v1/tool-calls/{call}/approve", json={"approved": approved})


async def titles(account: Account) -> list[str]:
    """Return the titles of someone's tasks."""
    return [task["title"] for task in (await account.http.get("/api/v1/tasks")).json()["data"]]


async def test_a_yes_makes_the_call_and_the_log_tells_every_state(
    asking: Talk, alice: Account, script: Script, log_of: Log
) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    assert (call["name"], call["input"], await titles(alice)) == ("add_task", {"title": "Buy milk"}, [])
    answer = await approve(alice.http, call["call"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == {"call": call["call"], "reply": str(reply), "approved": True}
    ended = await asking.ended(reply)

    assert (ended["status"], await titles(alice)) == ("completed", ["Buy milk"])
    states = [(d["state"], "input" in d) for _, e, d in await log_of(asking.id) if e == "reply.tool"]
    assert states == [("input", True), ("approval", True), ("running", False), ("done", False)]
    assert script.told()[0]["task"]["title"] == "Buy milk"


async def test_a_no_is_told_to_the_model_and_nothing_is_done(
    asking: Talk, alice: Account, script: Script, log_of: Log
) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    assert (await approve(alice.http, call["call"], False)).status_code == 200
    ended = await asking.ended(reply)

    assert (ended["status"], await titles(alice)) == ("completed", [])
    (part,) = calls_of(ended)
    assert part["state"] == "failed"
    assert "refused" in part["output"]["error"]
    (result,) = script.results()
    assert (result.failed, "refused" in result.content) == (True, True)
    states = [d["state"] for _, e, d in await log_of(asking.id) if e == "reply.tool"]
    assert states == ["input", "approval", "failed"]


async def test_the_first_answer_holds_and_the_same_one_again_is_harmless(
    asking: Talk, alice: Account, script: Script
) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    answers = await asyncio.gather(*(approve(alice.http, call["call"], approved) for approved in (True, False) * 10))
    decided = {answer.json()["data"]["approved"] for answer in answers if answer.status_code == 200}
    assert len(decided) == 1, "all who were heard said the same"
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {(answer.status_code, answer.json()["error"]) for answer in refused} == {(409, "already_decided")}
    assert len(refused) == 10
    ended = await asking.ended(reply)
    assert len(await titles(alice)) == (1 if decided == {True} else 0)
    assert calls_of(ended)[0]["state"] == ("done" if decided == {True} else "failed")
    again = await approve(alice.http, call["call"], *decided)
    assert again.status_code == 200, "also when the reply has ended"
    assert len(await titles(alice)) == (1 if decided == {True} else 0)
    assert len(script.requests) == 2


async def test_only_whoever_asked_may_answer(
    asking: Talk, alice: Account, bob: Account, sign_up: SignUp, admin: asyncpg.Connection, script: Script
) -> None:
    carol = await sign_up("carol@example.com")
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'admin')",
        alice.workspace_id, carol.user_id,
    )  # fmt: skip
    switched = await carol.http.post("/api/v1/auth/switch", json={"workspace_id": str(alice.workspace_id)})
    carol.http.headers["Authorization"] = f"Bearer {switched.json()['data']['access_token']}"
    # Whoever may write in the conversation still answers for nobody else: the call has the asker's rights.
    shared = await alice.http.patch(
        f"/api/v1/conversations/{asking.id}", json={"shared": True, "shared_access": "write"}
    )
    assert shared.status_code == 200, shared.text
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    for stranger in (bob, carol):
        for id_ in (call["call"], str(uuid4())):
            answer = await approve(stranger.http, id_)
            assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
    assert await admin.fetchval("SELECT approved FROM tool_approvals") is None
    assert (await approve(alice.http, call["call"])).status_code == 200
    assert (await asking.ended(reply))["status"] == "completed"
    assert script.told()[0]["task"]["title"] == "Buy milk"


async def test_a_key_lets_nothing_through_that_it_could_not_do_itself(
    app: FastAPI, asking: Talk, alice: Account, script: Script
) -> None:
    async def with_scopes(*scopes: str) -> httpx.AsyncClient:
        made = await alice.http.post("/api/v1/api-keys", json={"name": "k", "scopes": list(scopes)})
        return http_client(app, headers={"Authorization": f"Bearer {made.json()['data']['key']}"})

    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    chats, writes = await with_scopes("chat:write"), await with_scopes("chat:write", "tasks:write")
    reads = await with_scopes("chat:read", "tasks:write")
    assert (await approve(chats, call["call"])).status_code == 403
    assert (await approve(reads, call["call"])).status_code == 403
    assert (await approve(writes, call["call"])).status_code == 200
    assert (await asking.ended(reply))["status"] == "completed"
    for client in (chats, writes, reads):
        await client.aclose()
    assert len(script.requests) == 2


@pytest.mark.parametrize("approved", [1, "true", None, "yes"])
async def test_an_answer_is_true_or_false(asking: Talk, alice: Account, script: Script, approved: object) -> None:
    assert (await approve(alice.http, uuid4(), approved)).status_code == 422
    assert not script.requests


async def test_the_call_is_made_with_the_arguments_that_were_shown_or_not_at_all(
    asking: Talk, alice: Account, admin: asyncpg.Connection, script: Script
) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    # As whoever could write to the table would try it: the row says something else by the time of the yes.
    await admin.execute("""UPDATE tool_approvals SET arguments = '{"title": "Pay mallory"}'""")
    assert (await approve(alice.http, call["call"])).status_code == 200
    ended = await asking.ended(reply)
    (part,) = calls_of(ended)
    assert part["state"] == "failed"
    assert "not the ones that were approved" in part["output"]["error"]
    assert await titles(alice) == []
    assert len(script.requests) == 2


async def test_changed_arguments_with_a_hash_that_fits_them_are_refused_too(
    asking: Talk, alice: Account, admin: asyncpg.Connection, script: Script
) -> None:
    from parley.llm.tool_values import fingerprint

    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    forged = {"title": "Pay mallory"}
    await admin.execute(
        "UPDATE tool_approvals SET arguments = $1, arguments_hash = $2", orjson.dumps(forged).decode(),
        fingerprint(forged),
    )  # fmt: skip
    await approve(alice.http, call["call"])
    (part,) = calls_of(await asking.ended(reply))
    assert (part["state"], await titles(alice)) == ("failed", [])
    assert len(script.requests) == 2


async def test_every_call_asks_anew(alice: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([("add_task", {"title": "a"})], [("add_task", {"title": "b"})]).install(monkeypatch)
    talk = await asking_talk(alice)
    _, reply = await talk.send("go")
    (first,) = await waiting(talk, reply)
    await approve(alice.http, first["call"])
    await talk.when(reply, lambda message: [call["state"] for call in calls_of(message)] == ["done", "approval"])
    (second,) = await waiting(talk, reply)
    assert await titles(alice) == ["a"]
    await approve(alice.http, second["call"], False)
    assert (await talk.ended(reply))["status"] == "completed"
    assert await titles(alice) == ["a"]
    assert len(script.requests) == 3


async def test_calls_that_need_no_yes_do_not_wait_for_those_that_do(
    alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([("add_task", {"title": "a"}), ("list_tasks", {}), ("add_task", {"title": "b"})]).install(
        monkeypatch
    )
    talk = await asking_talk(alice)
    _, reply = await talk.send("go")
    await talk.when(
        reply, lambda message: [call["state"] for call in calls_of(message)] == ["approval", "done", "approval"]
    )
    one, two = await waiting(talk, reply, 2)
    # Not in the model's order: whoever asked decides what comes first.
    await approve(alice.http, two["call"])
    await talk.when(reply, lambda message: calls_of(message)[2]["state"] == "done")
    assert await titles(alice) == ["b"]
    await approve(alice.http, one["call"], False)
    ended = await talk.ended(reply)
    assert [call["state"] for call in calls_of(ended)] == ["failed", "done", "done"]
    assert [result.failed for result in script.results()] == [True, False, False], "in the order of the calls"


@pytest.mark.parametrize(
    ("approval", "fields", "asks"),
    [
        ("never", {}, []),
        ("never", {"approval_tools": ["list_tasks"]}, ["list_tasks"]),
        ("writes", {}, ["add_task"]),
        ("always", {}, ["add_task", "list_tasks"]),
    ],
)
async def test_an_assistant_says_what_is_asked_for(
    alice: Account, monkeypatch: pytest.MonkeyPatch, approval: str, fields: dict[str, Any], asks: list[str]
) -> None:
    Script([("add_task", {"title": "a"}), ("list_tasks", {})]).install(monkeypatch)
    talk = await asking_talk(alice, approval=approval, **fields)
    _, reply = await talk.send("go")
    if asks:
        calls = await waiting(talk, reply, len(asks))
        assert [call["name"] for call in calls] == asks
        for call in calls:
            await approve(alice.http, call["call"])
    assert (await talk.ended(reply))["status"] == "completed"
    assert await titles(alice) == ["a"]


async def test_nobody_is_asked_about_a_call_that_could_not_be_made(
    alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([("add_task", {"title": ""}), ("no_such_tool", {}), ("add_task", "{not json")]).install(monkeypatch)
    talk = await asking_talk(alice, approval="always")
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert [call["state"] for call in calls_of(ended)] == ["failed"] * 3
    assert [result.failed for result in script.results()] == [True] * 3


async def test_cancel_while_a_call_waits(asking: Talk, alice: Account, script: Script, log_of: Log) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    assert (await alice.http.post(f"/api/v1/replies/{reply}/cancel")).status_code == 202
    ended = await asking.ended(reply)
    assert ended["status"] == "cancelled"
    (part,) = calls_of(ended)
    assert (part["state"], part["output"]["error"]) == ("failed", "The reply ended before this call was approved.")
    late = await approve(alice.http, call["call"])
    assert (late.status_code, late.json()["error"]) == (409, "no_longer_waiting")
    assert await titles(alice) == []
    assert len(script.requests) == 1
    assert not [d for _, e, d in await log_of(asking.id) if e == "reply.tool" and d["state"] == "running"]


@asynccontextmanager
async def app_with(settings: Settings, **llm: Any) -> AsyncIterator[FastAPI]:
    """Run an application with other settings of tools."""
    changed = settings.model_copy(update={"llm": settings.llm.model_copy(update=llm)})
    async with running(changed) as app:
        yield app


async def test_nobodys_answer_is_a_no_in_time(settings: Settings, script: Script) -> None:
    async with app_with(settings, approval_s=0.2) as app:
        alice = await newcomer(app)
        talk = await asking_talk(alice)
        _, reply = await talk.send("go")
        ended = await talk.ended(reply)
        assert ended["status"] == "completed"
        (part,) = calls_of(ended)
        assert part["state"] == "failed"
        assert "in time" in part["output"]["error"]
        for approved in (True, False):
            late = await approve(alice.http, part["call"], approved)
            assert (late.status_code, late.json()["error"]) == (409, "no_longer_waiting")
        assert (await titles(alice), len(script.requests)) == ([], 2)


async def test_a_waiting_reply_keeps_its_lease(settings: Settings, script: Script, admin: asyncpg.Connection) -> None:
    realtime = settings.realtime.model_copy(update={"lease_s": 0.6})
    async with running(settings.model_copy(update={"realtime": realtime})) as app:
        alice = await newcomer(app)
        talk = await asking_talk(alice)
        _, reply = await talk.send("go")
        (call,) = await waiting(talk, reply)
        lease = "SELECT lease_until FROM replies WHERE id = $1"
        first = await admin.fetchval(lease, reply)

        async def renewed() -> bool:
            now: Any = await admin.fetchval("SELECT now()")
            until_: Any = await admin.fetchval(lease, reply)
            return bool(until_ > first and now > first)

        await until(renewed, timeout_s=30)
        assert await admin.fetchval("SELECT attempt FROM replies WHERE id = $1", reply) == 1
        await approve(alice.http, call["call"])
        assert (await talk.ended(reply))["status"] == "completed"
        assert len(script.requests) == 2


async def test_an_answer_that_was_not_heard_of_is_found_all_the_same(
    app: FastAPI, asking: Talk, alice: Account, script: Script, admin: asyncpg.Connection
) -> None:
    _, reply = await asking.send("go")
    await waiting(asking, reply)
    app.state.chat.approvals._poll_s = 0.1
    await admin.execute("UPDATE tool_approvals SET approved = true, decided_by = user_id, decided_at = now()")
    assert (await asking.ended(reply))["status"] == "completed"
    assert (await titles(alice), len(script.requests)) == (["Buy milk"], 2)


async def test_what_another_process_says_wakes_whoever_waits(
    app: FastAPI, asking: Talk, script: Script, admin: asyncpg.Connection
) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    app.state.chat.approvals._poll_s = 3600
    await admin.execute("UPDATE tool_approvals SET approved = true, decided_by = user_id, decided_at = now()")
    app.state.chat.wire._notified(f"another approval:{call['call']}")
    assert (await asking.ended(reply))["status"] == "completed"
    assert len(script.requests) == 2


async def test_what_a_reply_may_cost_is_counted_over_all_its_processes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = settings.llm.registry
    priced = "demo: {provider: demo, name: demo, price: {output: 500000}}"
    registry.write_text(registry.read_text().replace("demo: {provider: demo, name: demo}", priced))
    steps = [[("add_task", {"title": title})] for title in ("a", "b", "c")]
    script = Script(*steps).install(monkeypatch)
    async with app_with(settings, max_cost=Decimal("1.5")) as app:
        alice = await newcomer(app)
        talk = await asking_talk(alice)
        _, reply = await talk.send("go")
        (call,) = await waiting(talk, reply)
    async with app_with(settings, max_cost=Decimal("1.5")) as app:
        again = replace(alice, http=http_client(app, headers=dict(alice.http.headers)))
        talk = replace(talk, owner=again)
        await approve(again.http, call["call"])
        ended = await talk.ended(reply)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "over_budget")
        # A dollar there and one here.
        assert (Decimal(ended["cost"]), len(script.requests), await titles(again)) == (Decimal(2), 2, ["a"])
        await again.http.aclose()


async def test_a_stop_hands_a_waiting_reply_to_the_next_process(
    settings: Settings, script: Script, log_of: Log, admin: asyncpg.Connection
) -> None:
    async with running(settings) as app:
        alice = await newcomer(app)
        talk = await asking_talk(alice)
        _, reply = await talk.send("go")
        (call,) = await waiting(talk, reply)
    # Nobody is there; the answer is kept for whoever comes.
    status, owner = await admin.fetchrow("SELECT status, owner FROM replies WHERE id = $1", reply)
    assert (status, owner) == ("streaming", None)
    async with running(settings) as app:
        again = replace(alice, http=http_client(app, headers=dict(alice.http.headers)))
        talk = replace(talk, owner=again)
        await waiting(talk, reply)
        assert (await approve(again.http, call["call"])).status_code == 200
        assert (await talk.ended(reply))["status"] == "completed"
        assert (await titles(again), len(script.requests)) == (["Buy milk"], 2)
        await again.http.aclose()
    log = await log_of(talk.id)
    assert [d["state"] for _, e, d in log if e == "reply.tool"] == ["input", "approval", "running", "done"]
    assert [d["strategy"] for _, e, d in log if e == "reply.resumed"] == ["restart"]


async def test_what_was_asked_is_its_askers_to_take_along_and_to_have_erased(
    app: FastAPI, asking: Talk, alice: Account, bob: Account, script: Script, admin: asyncpg.Connection
) -> None:
    _, reply = await asking.send("go")
    (call,) = await waiting(asking, reply)
    await approve(alice.http, call["call"])
    await asking.ended(reply)
    database = app.state.database
    data = ApprovalData()
    assert any(isinstance(part, ApprovalData) for part in PERSONAL_DATA)
    mine, theirs = (Person(account.user_id, (alice.workspace_id, bob.workspace_id)) for account in (alice, bob))
    assert [record async for record in data.export(database, theirs)] == []
    (record,) = [record async for record in data.export(database, mine)]
    assert (call["call"] in record.json, "Buy milk" in record.json) == (True, True)
    await data.erase(database, theirs)
    assert await admin.fetchval("SELECT count(*) FROM tool_approvals") == 1
    for _ in range(2):
        await data.erase(database, mine)
    assert await admin.fetchval("SELECT count(*) FROM tool_approvals") == 0
    assert len(script.requests) == 2


async def test_a_deleted_assistant_takes_its_tools_along_and_not_its_questions(
    alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script([("add_task", {"title": "Buy milk"})]).install(monkeypatch)
    talk = await asking_talk(alice, approval="always")
    listed = (await alice.http.get("/api/v1/assistants")).json()["data"]
    (own,) = [one["id"] for one in listed if not one["built_in"]]
    assert (await alice.http.delete(f"/api/v1/assistants/{own}")).status_code == 204
    _, reply = await talk.send("go")
    assert (await talk.ended(reply))["status"] == "completed"
    assert await titles(alice) == []
