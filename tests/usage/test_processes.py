"""Budgets when server processes are killed: nothing stays reserved, and nothing is left out of the ledger."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.ids import new_id
from parley.core.settings import DatabaseSettings
from parley.usage.sweeping import UnscopedLedger
from tests.chat.books import Books, workspace_budget
from tests.chat.conftest import until
from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
models:
  gpt: {{provider: openai, name: fake, context: 1000, max_output_tokens: 100, retries: 0, price: {{input: 1, output: 10}}}}
aliases:
  default: [gpt]
"""
RESERVED = Decimal("0.002")
PASSWORD = "correct horse 1"


@pytest.fixture
def servers(tmp_path: Path, urls: DatabaseUrls, provider: FakeProvider) -> Iterator[list[ServerProcess]]:
    """Two processes on one database."""
    registry = tmp_path / "registry.yaml"
    registry.write_text(REGISTRY.format(url=provider.url))
    with ExitStack() as stack:
        made = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir(mode=0o700)
            made.append(
                stack.enter_context(
                    server_process(
                        tmp_path / name,
                        PARLEY_ENV="testing",
                        PARLEY_DATABASE_URL=urls.app,
                        PARLEY_DATABASE_SYSTEM_URL=urls.system,
                        PARLEY_DATABASE_OWNER_URL=urls.owner,
                        PARLEY_SECRET_KEY="one key for both of the processes, long enough",
                        PARLEY_RATE_LIMITS="off",
                        PARLEY_LLM_REGISTRY=str(registry),
                    )
                )
            )
        yield made


class Client:
    """A person who asks either server."""

    def __init__(self, servers: list[ServerProcess]) -> None:
        self.http = [httpx.AsyncClient(base_url=f"{server.url}/api/v1", timeout=60) for server in servers]

    async def sign_up(self) -> None:
        body = {"email": "ada@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
        answer = await self.http[0].post("/auth/signup", json=body)
        assert answer.status_code == 201, answer.text
        for http in self.http:
            http.headers["Authorization"] = f"Bearer {answer.json()['data']['access_token']}"

    async def call(self, which: int, method: str, path: str, body: Any) -> Any:
        answer = await self.http[which].request(method, path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json()["data"]

    async def send(self, which: int, conversation: str, text: str) -> int:
        """Send; return the status, 0 when the server was killed meanwhile."""
        path, key = f"/conversations/{conversation}/messages", {"Idempotency-Key": str(new_id())}
        while True:
            try:
                answer = await self.http[which].post(path, json={"text": text}, headers=key)
            except httpx.TransportError:
                return 0
            # A machine that is slow has a busy database.
            if answer.status_code != 503:
                break
        assert answer.status_code in {202, 429}, answer.text
        assert answer.status_code == 202 or answer.json()["error"] == "over_budget"
        return answer.status_code


@pytest.fixture
async def ada(servers: list[ServerProcess]) -> AsyncIterator[Client]:
    client = Client(servers)
    await client.sign_up()
    yield client
    for http in client.http:
        await http.aclose()


async def test_two_hundred_sends_while_a_process_is_killed(
    servers: list[ServerProcess], ada: Client, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    books = Books(admin)
    limit = 10 * RESERVED
    await ada.call(0, "PUT", "/budgets", {"budgets": [workspace_budget(f"{limit:f}")]})
    talks = [(await ada.call(0, "POST", "/conversations", {}))["id"] for _ in range(200)]

    # Half of what is admitted is silent for a while, half speaks at once; half of the sends go to each process.
    plans = ["deltas=60 rate=20 ttft=3", "deltas=60 rate=20"]
    sends = [
        asyncio.create_task(ada.send(n % 2, talk, f"{plans[n // 2 % 2]} seed={n}")) for n, talk in enumerate(talks)
    ]
    await provider.until(lambda: len(provider.requests) >= 10 and sum(r.deltas_sent > 5 for r in provider.requests), 60)
    servers[0].kill()
    statuses = await asyncio.gather(*sends)
    assert set(statuses) <= {0, 202, 429}

    async def none_open() -> bool:
        return not await admin.fetchval("SELECT count(*) FROM replies WHERE status IN ('queued', 'streaming')")

    await until(none_open, timeout_s=90)
    await books.nothing_reserved()
    await books.balanced()
    lost = 0
    for n, talk in enumerate(talks):
        rows = await books.entries(conversation_id=UUID(talk))
        calls = [record for record in provider.requests if f"seed={n} " in f"{record.asked} "]
        exact = [row for row in rows if not row["estimated"]]
        # Each call is there: to the token, or, if its process was killed before it had stored it, as a guess.
        assert len(rows) >= len(calls)
        assert [row["status"] for row in rows if row["estimated"]] == ["lost"] * (len(rows) - len(exact))
        counted = [(row["input_tokens"], row["cached_tokens"], row["output_tokens"]) for row in exact]
        whole = [(r.input_tokens, r.cached_tokens, r.output_tokens) for r in calls if r.completed]
        assert not Counter(counted) - Counter(whole)
        lost += len(rows) - len(exact)
    assert lost > 0, "nothing was being written by the process that was killed"
    assert await books.spent() <= limit + RESERVED
    assert [row["spent"] for row in await books.counters()] == [await books.spent()]


async def test_calls_that_are_no_replies_are_ended_by_whoever_is_left(
    servers: list[ServerProcess], ada: Client, provider: FakeProvider, admin: asyncpg.Connection, urls: DatabaseUrls
) -> None:
    books = Books(admin)
    await ada.call(0, "PUT", "/budgets", {"budgets": [workspace_budget("1")]})
    scopes = ["models:call", "models:read"]
    key = (await ada.call(0, "POST", "/api-keys", {"name": "k", "scopes": scopes}))["key"]
    body = {"model": "gpt", "messages": [{"role": "user", "content": "deltas=100 rate=5"}], "stream": True}
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        async with http.stream("POST", f"{servers[0].url}/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            await provider.until(lambda: provider.requests and provider.requests[0].deltas_sent > 3, 30)
            servers[0].kill()
    assert await books.reserved() > 0
    database = Database(urls, DatabaseSettings())
    try:
        # What any process does each minute, when the longest that the call could take has gone by.
        with clock.shifted(3600):
            assert await UnscopedLedger(database).end_expired() == 1
    finally:
        await database.close()
    await books.nothing_reserved()
    (entry,) = await books.entries()
    assert (entry["status"], entry["purpose"], entry["estimated"]) == ("lost", "dialect", True)
    assert entry["key_id"] is not None
    assert [row["spent"] for row in await books.counters()] == [entry["cost"]]
    assert entry["cost"] > 0
