"""Calls that are not replies: reserved before anything is sent, settled however they are left."""

import asyncio
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider
from parley.core import clock
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.core.settings import LlmSettings, Settings
from parley.llm.errors import ModelError, UnknownModel
from parley.llm.ports import Finish, FinishReason, TextChunk
from parley.usage.bills import Bill, Estimate
from parley.usage.errors import OverBudget
from parley.usage.ledger import CallStatus, Purpose
from parley.usage.service import UsageService
from tests.chat.books import Books, set_budgets, workspace_budget
from tests.chat.conftest import until
from tests.conftest import Account, make_settings
from tests.llm.calls import asking, text_of

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
  gone: {{kind: openai, base_url: "{url}/gone", api_key: test-key}}
models:
  gpt: {{provider: openai, name: fake, retries: 0, price: {{input: 1, output: 10}}}}
  patient: {{provider: gone, name: fake, retries: 0, price: {{input: 5, output: 1}}, fallbacks: [gpt]}}
aliases:
  default: [gpt]
"""


@pytest.fixture
def settings(tmp_path: Path, urls: Any, provider: FakeProvider) -> Settings:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return make_settings(tmp_path, urls, llm=LlmSettings(registry=path))


async def test_a_call_is_reserved_and_settled(
    usage: UsageService, scope: Scope, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    conversation = new_id()
    request = asking("deltas=20 some words", max_output_tokens=1000)
    async with usage.metered(scope, request, purpose=Purpose.TITLE, conversation_id=conversation) as call:
        # The answer's bound at the price of output, and a little for the question.
        assert Decimal("0.01") < await books.reserved() < Decimal("0.0102")
        text = text_of([item async for item in call])
        (record,) = call.records
    assert text
    assert await books.reserved() == await books.reservations() == 0
    (entry,) = await books.entries()
    served = provider.served()
    assert (entry["id"], entry["purpose"], entry["conversation_id"]) == (record.id, "title", conversation)
    assert (entry["input_tokens"], entry["cached_tokens"], entry["output_tokens"]) == (
        served.input_tokens, served.cached_tokens, served.output_tokens,
    )  # fmt: skip
    assert [row["spent"] for row in await books.counters()] == [entry["cost"]]


async def test_what_is_reserved_is_for_the_dearest_that_may_answer(
    usage: UsageService, scope: Scope, alice: Account, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    # Its input is dearer, the output of its fallback is: the one that costs more for this request counts.
    async with usage.metered(scope, asking("x", max_output_tokens=1000), "patient", purpose=Purpose.DIALECT) as call:
        assert await books.reserved() > Decimal("0.01")
        _ = [item async for item in call]
    assert [(row["model"], row["status"]) for row in await books.entries()] == [
        ("patient", "failed"), ("gpt", "completed"),
    ]  # fmt: skip


async def test_nothing_is_sent_over_budget(
    usage: UsageService, scope: Scope, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("0"))
    with pytest.raises(OverBudget) as refused:
        async with usage.metered(scope, asking("deltas=2"), purpose=Purpose.STRUCTURED):
            raise AssertionError
    assert refused.value.retry_after_s
    assert not provider.requests
    assert (await books.entries(), await books.reservations()) == ([], 0)


async def test_an_unknown_model_is_told_before_anything_is_reserved(usage: UsageService, scope: Scope) -> None:
    with pytest.raises(UnknownModel):
        usage.metered(scope, asking("x"), "nobody", purpose=Purpose.DIALECT)


async def test_a_call_that_is_left_early_is_settled(
    usage: UsageService, scope: Scope, alice: Account, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    async with usage.metered(scope, asking("deltas=1000 rate=100"), purpose=Purpose.TOOL) as call:
        async for item in call:
            if isinstance(item, TextChunk):
                break
    await provider.ended(provider.requests[0], 5)
    (entry,) = await books.entries()
    assert (entry["status"], entry["estimated"], entry["cost"] > 0) == ("stopped", True, True)
    await books.nothing_reserved()


async def test_a_call_that_fails_is_settled(usage: UsageService, scope: Scope, alice: Account, books: Books) -> None:
    await set_budgets(alice, workspace_budget("1"))
    with pytest.raises(ModelError):
        async with usage.metered(scope, asking("fail=401"), purpose=Purpose.MARKING) as call:
            _ = [item async for item in call]
    (entry,) = await books.entries()
    assert (entry["status"], entry["error"], entry["cost"]) == ("failed", "provider_auth", 0)
    await books.nothing_reserved()


async def test_a_call_whose_caller_is_cancelled_is_settled(
    usage: UsageService, scope: Scope, alice: Account, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    shown = asyncio.Event()

    async def read() -> None:
        async with usage.metered(scope, asking("deltas=1000 rate=100"), purpose=Purpose.TRADING) as call:
            async for item in call:
                if isinstance(item, TextChunk):
                    shown.set()

    task = asyncio.create_task(read())
    await shown.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await books.nothing_reserved()
    assert [row["status"] for row in await books.entries()] == ["stopped"]


async def test_a_call_whose_caller_is_cancelled_while_it_settles_is_settled(
    usage: UsageService, scope: Scope, alice: Account, admin: asyncpg.Connection, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    inside, leave = asyncio.Event(), asyncio.Event()

    async def ask() -> None:
        async with usage.metered(scope, asking("deltas=2"), purpose=Purpose.DIALECT) as call:
            _ = [item async for item in call]
            inside.set()
            await leave.wait()

    task = asyncio.create_task(ask())
    await asyncio.wait_for(inside.wait(), 10)
    async with admin.transaction():
        await admin.execute("SELECT 1 FROM budget_counters FOR UPDATE")
        leave.set()
        # It waits for the counter; whoever waits for it does not.
        await until(partial(waiting_for_a_lock, admin))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await books.nothing_reserved()
    assert [row["status"] for row in await books.entries()] == ["completed"]


async def waiting_for_a_lock(admin: asyncpg.Connection) -> bool:
    return bool(await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_two_hundred_calls_at_once_pass_a_budget_by_less_than_one(
    usage: UsageService, scope: Scope, alice: Account, provider: FakeProvider, books: Books
) -> None:
    request = asking("deltas=20", max_output_tokens=20)

    async def ask() -> bool:
        try:
            async with usage.metered(scope, request, purpose=Purpose.DIALECT) as call:
                return [item async for item in call][-1] == Finish(FinishReason.STOP)
        except OverBudget:
            return False

    assert await ask()
    one = await books.spent()
    limit = 10 * one
    await set_budgets(alice, workspace_budget(f"{limit:f}"))
    while any(await asyncio.gather(*(ask() for _ in range(200)))):
        pass
    assert limit <= await books.spent() < limit + one
    entries = await books.entries()
    served = provider.served()
    assert len(entries) == served.calls
    assert sum(row["input_tokens"] for row in entries) == served.input_tokens
    assert sum(row["output_tokens"] for row in entries) == served.output_tokens
    assert {row["status"] for row in entries} == {CallStatus.COMPLETED}
    assert [row["spent"] for row in await books.counters()] == [await books.spent()]
    await books.nothing_reserved()


async def test_a_reservation_whose_caller_is_cancelled_meanwhile_is_given_back(
    usage: UsageService, scope: Scope, alice: Account, admin: asyncpg.Connection, provider: FakeProvider, books: Books
) -> None:
    await set_budgets(alice, workspace_budget("1"))
    async with usage.metered(scope, asking("deltas=2"), purpose=Purpose.DIALECT) as call:
        _ = [item async for item in call]

    async def ask() -> None:
        async with usage.metered(scope, asking("deltas=2"), purpose=Purpose.DIALECT):
            raise AssertionError

    async with admin.transaction():
        await admin.execute("SELECT 1 FROM budget_counters FOR UPDATE")
        task = asyncio.create_task(ask())
        await until(partial(waiting_for_a_lock, admin))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await usage.accounts.close()  # type: ignore[union-attr]  # the application has them
    await books.nothing_reserved()
    assert len(provider.requests) == len(await books.entries()) == 1


async def test_the_application_itself_ends_what_a_lost_process_left_reserved(
    app: FastAPI, usage: UsageService, scope: Scope, books: Books
) -> None:
    assert usage.accounts is not None
    estimate = Estimate("gpt", "openai", Decimal(4), input_tokens=7, input_cost=Decimal("0.5"))
    async with app.state.database.unit_of_work(scope) as unit:
        bill = Bill.of(new_id(), scope, Purpose.STRUCTURED)
        await usage.accounts.reserve(unit, bill, estimate, expires_in=timedelta(seconds=60))
    assert await books.reservations() == 1
    with clock.shifted(121):
        await books.nothing_reserved()
    assert [row["status"] for row in await books.entries()] == ["lost"]
