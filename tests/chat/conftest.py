"""An application whose models are the fake provider's, in both dialects."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, Settings
from tests.conftest import Account, make_settings

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: test-key}}
  responses: {{kind: openai_responses, base_url: "{url}/v1", api_key: test-key}}
  demo: {{kind: demo}}
models:
  gpt: {{provider: openai, name: fake, retries: 0, price: {{input: 1, output: 2}}, capabilities: [tools]}}
  claude: {{provider: anthropic, name: fake, retries: 0, price: {{input: 1, output: 2}}, capabilities: [tools]}}
  beginning: {{provider: openai, name: fake, retries: 0, price: {{input: 1, output: 2}}, prefill: prefix, capabilities: [tools]}}
  background: {{provider: responses, name: fake, retries: 0, price: {{input: 1, output: 2}}, capabilities: [tools]}}
  demo: {{provider: demo, name: demo}}
aliases:
  default: [gpt]
"""


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    """A provider that does what the prompt says."""
    async with FakeProvider() as made:
        yield made


@pytest.fixture
def registry_file(tmp_path: Path, provider: FakeProvider) -> Path:
    """A registry that names the fake provider."""
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return path


@pytest.fixture
def settings(tmp_path: Path, urls: DatabaseUrls, registry_file: Path) -> Settings:
    """Settings with that registry."""
    return make_settings(tmp_path, urls, llm=LlmSettings(registry=registry_file))


@dataclass(frozen=True)
class Talk:
    """A conversation, as its owner uses it over HTTP."""

    owner: Account
    id: UUID

    @property
    def path(self) -> str:
        return f"/api/v1/conversations/{self.id}/messages"

    async def send(self, text: str, *, cid: UUID | None = None, **body: Any) -> tuple[UUID, UUID]:
        """Send; return the ids of question and reply."""
        headers = {"Idempotency-Key": str(cid)} if cid else {}
        answer = await self.owner.http.post(self.path, json={"text": text, **body}, headers=headers)
        assert answer.status_code == 202, answer.text
        data = answer.json()["data"]
        return UUID(data["message"]["id"]), UUID(data["reply"]["id"])

    async def messages(self) -> list[dict[str, Any]]:
        """Return the newest messages."""
        answer = await self.owner.http.get(self.path, params={"limit": 100})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]
        return found

    async def message(self, id: UUID) -> dict[str, Any]:
        """Return one message."""
        return next(message for message in await self.messages() if message["id"] == str(id))

    async def ended(self, id: UUID) -> dict[str, Any]:
        """Return a reply once it has ended."""
        return await self.when(id, lambda message: message["status"] in {"completed", "failed", "cancelled"})

    async def when(self, id: UUID, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return a message once something holds of it."""
        found: dict[str, Any] = {}

        async def look() -> bool:
            found.update(await self.message(id))
            return holds(found)

        await until(look)
        return found


async def until(holds: Callable[[], Awaitable[bool]], *, timeout_s: float = 10) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + timeout_s
    while not await holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def start_talk(owner: Account) -> Talk:
    """Make a conversation."""
    answer = await owner.http.post("/api/v1/conversations", json={})
    assert answer.status_code == 201, answer.text
    return Talk(owner, UUID(answer.json()["data"]["id"]))


@pytest.fixture
async def talk(alice: Account) -> Talk:
    """Alice's conversation."""
    return await start_talk(alice)


@pytest.fixture
def log_of(admin: asyncpg.Connection) -> Callable[[UUID], Awaitable[list[tuple[int, str, dict[str, Any]]]]]:
    """Read a conversation's log as it is stored."""
    import orjson

    async def read(conversation_id: UUID) -> list[tuple[int, str, dict[str, Any]]]:
        rows = await admin.fetch(
            "SELECT seq, e, d::text AS d FROM channel_events WHERE channel = $1 ORDER BY seq",
            f"conversation:{conversation_id}",
        )
        return [(row["seq"], row["e"], orjson.loads(row["d"])) for row in rows]

    return read


@pytest.fixture
def writer(app: FastAPI) -> Any:
    """The tick writer of the application."""
    return app.state.chat.writer
