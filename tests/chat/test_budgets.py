"""Replies and budgets: reserved with the question, settled with the end, whatever the end is."""

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider
from parley.chat.turns import Send
from parley.core.ids import new_id
from parley.core.scope import Role, Scope
from parley.core.settings import Settings
from parley.realtime.fold import visible_text
from tests.chat.books import Books, key_of, set_budgets, workspace_budget
from tests.chat.conftest import Talk, start_talk, until
from tests.conftest import Account, SignUp
from tests.live import greet, live
from tests.tenancy.team import join

# A reply reserves at most its model's context and its longest answer: 1,000 and 100 tokens.
REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
  gone: {{kind: openai, base_url: "{url}/gone", api_key: test-key}}
models:
  gpt: {{provider: openai, name: fake, context: 1000, max_output_tokens: 100, retries: 0, price: {{input: 1, cached_input: 0.5, output: 10}}, capabilities: [tools]}}
  patient: {{provider: gone, name: fake, context: 1000, max_output_tokens: 100, retries: 1, price: {{input: 1, output: 10}}, fallbacks: [gpt]}}
  begun: {{provider: openai, name: fake, context: 1000, max_output_tokens: 100, retries: 0, price: {{input: 1, output: 10}}, prefill: prefix}}
  large: {{provider: openai, name: fake, context: 100000, retries: 0, price: {{input: 1, output: 10}}, capabilities: [tools]}}
  free: {{provider: openai, name: fake, retries: 0}}
aliases:
  default: [gpt]
"""
RESERVED = Decimal("0.002")
PLAN = "deltas=50 rate=0"
# One of its words of input is cached; the prompt has some more.
LEAST_COST = Decimal("0.0005")


@pytest.fixture
def registry_file(tmp_path: Path, provider: FakeProvider) -> Path:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return path


@pytest.fixture
def books(admin: asyncpg.Connection) -> Books:
    return Books(admin)


async def try_to_send(talk: Talk, text: str, **body: Any) -> httpx.Response:
    """Send; a database that is busy, on a machine that is slow, is asked again."""
    key = {"Idempotency-Key": str(new_id())}
    while True:
        answer = await talk.owner.http.post(talk.path, json={"text": text, **body}, headers=key)
        if answer.status_code != 503:
            return answer


async def all_ended(admin: asyncpg.Connection) -> None:
    async def none_open() -> bool:
        count = await admin.fetchval("SELECT count(*) FROM replies WHERE status IN ('queued', 'streaming')")
        return bool(count == 0)

    await until(none_open, timeout_s=60)


@pytest.fixture
async def crowd(alice: Account, sign_up: SignUp, admin: asyncpg.Connection) -> list[Talk]:
    """Two hundred conversations of ten people of one workspace: all sends of one person wait for each other."""
    others = [await join(await sign_up(), alice.workspace_id, Role.MEMBER, admin) for _ in range(9)]
    return [await start_talk(person) for _ in range(20) for person in (alice, *others)]


async def test_of_two_hundred_sends_as_many_are_admitted_as_a_budget_can_pay_for(
    crowd: list[Talk], alice: Account, provider: FakeProvider, admin: asyncpg.Connection, books: Books
) -> None:
    await set_budgets(alice, workspace_budget(str(10 * RESERVED)))

    # None of them ends before all have been sent: what is reserved is all there is to go by.
    answers = await asyncio.gather(*(try_to_send(talk, f"{PLAN} ttft=3") for talk in crowd))

    assert [answer.status_code for answer in answers].count(202) == 10
    refused = [answer for answer in answers if answer.status_code != 202]
    assert {(answer.status_code, answer.json()["error"]) for answer in refused} == {(429, "over_budget")}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 86_400 for answer in refused)
    assert await books.reserved() == 10 * RESERVED
    # Nothing of what was refused is there.
    assert await admin.fetchval("SELECT count(*) FROM messages") == 20
    await all_ended(admin)
    await books.nothing_reserved()
    await books.balanced()
    served = provider.served()
    entries = await books.entries()
    assert len(entries) == served.calls == 10
    assert sum(row["input_tokens"] for row in entries) == served.input_tokens
    assert sum(row["cached_tokens"] for row in entries) == served.cached_tokens
    assert sum(row["output_tokens"] for row in entries) == served.output_tokens == 500
    assert not any(row["estimated"] for row in entries)
    assert {(row["status"], row["purpose"], row["model"]) for row in entries} == {("completed", "reply", "gpt")}


async def test_spending_passes_a_budget_by_less_than_one_call(
    crowd: list[Talk], alice: Account, provider: FakeProvider, admin: asyncpg.Connection, books: Books
) -> None:
    _, first = await crowd[0].send(PLAN)
    await crowd[0].ended(first)
    one = await books.spent()
    limit = 10 * one
    await set_budgets(alice, workspace_budget(f"{limit:f}"))
    refused = 0
    # As fast as they are ended others are begun, until none is admitted any more while nothing runs.
    while True:
        answers = await asyncio.gather(*(try_to_send(talk, PLAN, on_active="reject") for talk in crowd[1:]))
        refused += [answer.status_code for answer in answers].count(429)
        await all_ended(admin)
        await books.nothing_reserved()
        if all(answer.status_code == 429 for answer in answers):
            break
    most = max(row["cost"] for row in await books.entries())
    assert limit <= await books.spent() < limit + most
    assert refused > 0
    await books.balanced()
    assert sum(row["output_tokens"] for row in await books.entries()) == provider.served().output_tokens


async def test_a_send_takes_at_most_six_queries_with_budgets_too(app: FastAPI, talk: Talk, alice: Account) -> None:
    await set_budgets(
        alice,
        workspace_budget("1"),
        workspace_budget("1", "month"),
        {"subject": "user", "subject_id": str(alice.user_id), "period": "day", "limit": "1"},
    )
    seen: list[str] = []
    scope = Scope(alice.workspace_id, alice.user_id, Role.OWNER)
    async with app.state.database.unit_of_work(scope) as unit:
        (await unit.driver()).add_query_logger(lambda record: seen.append(record.query))
    seen.clear()
    # The pool is last-in first-out, so the send runs on the connection that is being watched.
    sent = await app.state.chat.turns.send(scope, Send(talk.id, new_id(), (f"{PLAN} ttft=0.5",)))
    asked = [query for query in seen if not query.strip().upper().startswith(("BEGIN", "COMMIT", "ROLLBACK"))]
    assert any("usage_reserve" in query for query in asked)
    assert len(asked) <= 6, asked
    await talk.ended(UUID(sent.reply["id"]))


async def test_without_budgets_nothing_is_reserved_and_all_is_in_the_ledger(
    talk: Talk, alice: Account, books: Books
) -> None:
    _, reply = await talk.send(f"{PLAN} ttft=0.5")
    assert await books.reservations() == 0
    ended = await talk.ended(reply)
    (entry,) = await books.entries()
    assert (entry["message_id"], entry["conversation_id"], entry["attempt"]) == (reply, talk.id, 1)
    assert (entry["provider"], entry["key_id"], entry["estimated"]) == ("openai", None, False)
    assert entry["started_at"] <= entry["ended_at"]
    # One input token of those was cached, at half the price.
    told = ended["usage"]["input_tokens"]
    assert entry["cost"] == Decimal(told - 1) / 10**6 + Decimal("0.0000005") + Decimal("0.0005")
    assert Decimal(ended["cost"]) == entry["cost"]
    await books.balanced()


async def test_calls_without_a_price_cost_nothing_and_are_in_the_ledger(
    talk: Talk, alice: Account, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send(PLAN, model="free")
    await talk.ended(reply)
    (entry,) = await books.entries()
    assert (entry["cost"], entry["output_tokens"]) == (0, 50)
    await books.nothing_reserved()


async def test_a_cancelled_reply_is_counted_by_what_it_said(
    talk: Talk, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send("deltas=1000 rate=100 seed=5")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    assert await books.reserved() == RESERVED
    await alice.http.post(f"/api/v1/replies/{reply}/cancel")
    ended = await talk.ended(reply)
    (entry,) = await books.entries()
    assert (entry["status"], entry["estimated"]) == ("stopped", True)
    assert entry["output_tokens"] == -(-len(visible_text(ended)) // 4) > 0
    await books.nothing_reserved()
    await books.balanced()


@pytest.mark.parametrize(("fault", "counted"), [("500", False), ("die_at:20", True)])
async def test_a_failed_reply_is_counted_by_what_it_showed(
    talk: Talk, alice: Account, books: Books, fault: str, *, counted: bool
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send(f"{PLAN} fail={fault}")
    ended = await talk.ended(reply)
    assert ended["status"] == "failed"
    (entry,) = await books.entries()
    assert (entry["status"], entry["error"], entry["cost"] > 0) == ("failed", "provider_unavailable", counted)
    await books.nothing_reserved()
    await books.balanced()


async def test_every_attempt_has_a_row_and_a_fallback_its_own_price(talk: Talk, alice: Account, books: Books) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send(PLAN, model="patient")
    assert (await talk.ended(reply))["status"] == "completed"
    entries = await books.entries()
    assert [(row["model"], row["attempt"], row["status"]) for row in entries][-1] == ("gpt", len(entries), "completed")
    assert {(row["model"], row["status"]) for row in entries[:-1]} == {("patient", "failed")}
    assert sum(row["cost"] for row in entries[:-1]) == 0 < entries[-1]["cost"]
    await books.nothing_reserved()
    await books.balanced()


async def test_a_waiting_reply_gives_back_what_it_reserved_when_it_is_cancelled(
    talk: Talk, alice: Account, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, running = await talk.send("deltas=1000 rate=100")
    _, waiting = await talk.send(PLAN)
    assert await books.reserved() == 2 * RESERVED
    await alice.http.post(f"/api/v1/replies/{waiting}/cancel")
    assert await books.reserved() == RESERVED
    assert (await talk.message(waiting))["usage"] is None
    await alice.http.post(f"/api/v1/replies/{running}/cancel")
    await talk.ended(running)
    await books.nothing_reserved()
    await books.balanced()


async def test_a_deleted_conversation_gives_back_what_it_reserved_and_stays_in_the_ledger(
    talk: Talk, alice: Account, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, running = await talk.send("deltas=1000 rate=100")
    await talk.send(PLAN)
    await talk.when(running, lambda message: len(visible_text(message)) > 20)
    assert (await alice.http.delete(f"/api/v1/conversations/{talk.id}")).status_code == 204
    assert await books.reserved() <= RESERVED
    await books.nothing_reserved()
    (entry,) = await books.entries()
    assert (entry["message_id"], entry["status"]) == (running, "stopped")
    assert entry["cost"] > 0
    assert [row["spent"] for row in await books.counters()] == [entry["cost"]]


async def test_a_deleted_workspace_takes_everything_with_it(
    talk: Talk, alice: Account, books: Books, app: FastAPI
) -> None:
    await alice.http.post("/api/v1/workspaces", json={"name": "Another"})
    await set_budgets(alice, workspace_budget("1"))
    await talk.send("deltas=1000 rate=100")
    assert (await alice.http.delete(f"/api/v1/workspaces/{alice.workspace_id}")).status_code == 204

    async def ended() -> bool:
        return bool(app.state.chat.running == 0)

    await until(ended)
    assert (await books.entries(), await books.counters(), await books.reservations()) == ([], [], 0)


async def test_a_used_up_budget_refuses_every_way_of_asking(talk: Talk, alice: Account, books: Books) -> None:
    _, reply = await talk.send(PLAN)
    await talk.ended(reply)
    # It begins with what the ledger has of this month.
    (budget,) = await set_budgets(alice, workspace_budget("0.0001", "month"))
    assert Decimal(budget["spent"]) == await books.spent() > Decimal("0.0001")
    assert (budget["remaining"], budget["reserved"]) == ("0.00000000", "0.00000000")
    for path in (f"replies/{reply}/continue", f"replies/{reply}/regenerate"):
        answer = await alice.http.post(f"/api/v1/{path}")
        assert (answer.status_code, answer.json()["error"]) == (429, "over_budget")
    answer = await try_to_send(talk, PLAN)
    assert answer.json()["details"] == {"subject": "workspace", "period": "month"}
    assert int(answer.headers["Retry-After"]) <= 31 * 86_400
    await set_budgets(alice, workspace_budget("1", "month"))
    _, again = await talk.send(PLAN)
    assert (await talk.ended(again))["status"] == "completed"


async def test_over_budget_on_the_socket(settings: Settings, app: FastAPI, books: Books) -> None:
    del app  # the same database, another server
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url) as http:
        body = {"email": "carol@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        session = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]
        http.headers["Authorization"] = f"Bearer {session['access_token']}"
        answer = await http.put("/api/v1/budgets", json={"budgets": [workspace_budget("0")]})
        assert answer.status_code == 200, answer.text
        conversation = (await http.post("/api/v1/conversations", json={})).json()["data"]["id"]
        async with await greet(server, session["access_token"]) as socket:
            await socket.send(
                t="chat.send", id=1, ch=f"conversation:{conversation}", cid="0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
                parts=[{"type": "text", "text": "hello"}],
            )  # fmt: skip
            err = await socket.of_type("err")
            assert (err["id"], err["code"]) == (1, "over_budget")
    assert await books.reservations() == 0


async def test_budgets_of_a_user_and_of_a_key_bind_only_them(
    alice: Account, app: FastAPI, sign_up: SignUp, books: Books
) -> None:
    key_id, key = await key_of(alice)
    await set_budgets(
        alice,
        workspace_budget("1"),
        {"subject": "api_key", "subject_id": str(key_id), "period": "day", "limit": "0.0001"},
        {"subject": "user", "subject_id": str(alice.user_id), "period": "month", "limit": "0.0012"},
    )
    talk = await start_talk(alice)
    with_key = Talk(
        Account(
            httpx.AsyncClient(transport=alice.http._transport, base_url=alice.http.base_url), alice.email,
            alice.user_id, alice.workspace_id, key, "",
        ),
        talk.id,
    )  # fmt: skip
    with_key.owner.http.headers["Authorization"] = f"Bearer {key}"
    _, reply = await with_key.send(PLAN)
    await talk.ended(reply)
    (entry,) = await books.entries()
    assert (entry["user_id"], entry["key_id"]) == (alice.user_id, key_id)
    answer = await try_to_send(with_key, PLAN)
    assert (answer.status_code, answer.json()["details"]) == (429, {"subject": "api_key", "period": "day"})
    # The person has two more calls, and then none.
    for _ in range(2):
        _, reply = await talk.send(PLAN)
        await talk.ended(reply)
    answer = await try_to_send(talk, PLAN)
    assert (answer.status_code, answer.json()["details"]) == (429, {"subject": "user", "period": "month"})
    await with_key.owner.http.aclose()
    spent = {row["spent"] for row in await books.counters()}
    assert spent == {await books.spent(), entry["cost"]}
    await books.nothing_reserved()


async def test_a_reply_with_tools_ends_when_the_budget_does(
    talk: Talk, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("0.00000001"))
    _, reply = await talk.send('tool=add_task:{"title":"milk"} deltas=5 rate=0', model="large")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"], ended["error"]["retryable"]) == ("failed", "over_budget", False)
    # The step that was paid for stands, and the tool that it called.
    assert [(part["type"], part.get("state")) for part in ended["parts"]][-1] == ("tool", "done")
    assert len(provider.generations()) == 1
    (entry,) = await books.entries()
    assert Decimal(ended["cost"]) == entry["cost"] > 0
    await books.nothing_reserved()
    await books.balanced()


async def test_each_step_of_a_reply_with_tools_is_in_the_ledger(
    talk: Talk, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send('tool=add_task:{"title":"milk"} deltas=5 rate=0', model="large")
    assert (await talk.ended(reply))["status"] == "completed"
    entries = await books.entries(message_id=reply)
    assert [row["status"] for row in entries] == ["completed", "completed"]
    served = provider.served()
    assert sum(row["input_tokens"] for row in entries) == served.input_tokens
    assert sum(row["output_tokens"] for row in entries) == served.output_tokens
    await books.nothing_reserved()
    await books.balanced()


# -- processes that are lost ---------------------------------------------------------------------------------------

NOBODY = 123_456


async def lose(admin: asyncpg.Connection, reply: UUID) -> None:
    """Take a reply away from its process, as if that were gone."""
    await admin.execute("UPDATE replies SET owner = $2 WHERE id = $1", reply, NOBODY)


async def test_a_lost_attempt_that_is_begun_anew_is_in_the_ledger(
    talk: Talk, alice: Account, provider: FakeProvider, admin: asyncpg.Connection, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send("deltas=5 rate=0 ttft=2")
    await provider.until(lambda: len(provider.requests) == 1, 10)
    await lose(admin, reply)
    assert (await talk.ended(reply))["status"] == "completed"
    lost, whole = await books.entries(message_id=reply)
    assert (lost["status"], lost["estimated"], lost["error"], lost["output_tokens"]) == ("lost", True, "worker_lost", 0)
    assert lost["input_tokens"] > 0
    assert (whole["status"], whole["estimated"], whole["output_tokens"]) == ("completed", False, 5)
    await books.nothing_reserved()
    await books.balanced()


async def test_a_lost_attempt_that_is_gone_on_with_is_in_the_ledger(
    talk: Talk, alice: Account, admin: asyncpg.Connection, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send("deltas=90 rate=50 seed=5", model="begun")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert ended["status"] == "completed"
    entries = await books.entries(message_id=reply)
    assert sorted(row["status"] for row in entries) == ["completed", "lost"]
    (lost,) = [row for row in entries if row["status"] == "lost"]
    assert 0 < lost["output_tokens"] <= -(-len(visible_text(ended)) // 4)
    await books.nothing_reserved()
    await books.balanced()


async def test_a_lost_attempt_that_nobody_can_go_on_with_is_in_the_ledger(
    talk: Talk, alice: Account, admin: asyncpg.Connection, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send("deltas=1000 rate=100 seed=5")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert ended["error"]["code"] == "worker_lost"
    (lost,) = await books.entries(message_id=reply)
    assert (lost["status"], lost["output_tokens"]) == ("lost", -(-len(visible_text(ended)) // 4))
    await books.nothing_reserved()
    await books.balanced()


async def test_a_lost_reply_that_was_cancelled_is_in_the_ledger(
    talk: Talk, alice: Account, admin: asyncpg.Connection, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    _, reply = await talk.send("deltas=5 rate=0 ttft=5")
    await provider.until(lambda: len(provider.requests) == 1, 10)
    await admin.execute(
        "UPDATE replies SET owner = $2, cancel_requested = true, cancelled_by = user_id WHERE id = $1", reply, NOBODY
    )
    assert (await talk.ended(reply))["status"] == "cancelled"
    (lost,) = await books.entries(message_id=reply)
    assert (lost["status"], lost["input_tokens"] > 0) == ("lost", True)
    await books.nothing_reserved()
    await books.balanced()
