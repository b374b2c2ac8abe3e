"""A real server whose models are the fake provider's, and people with API keys."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import asyncpg
import httpx
import orjson
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, Settings
from tests.chat.conftest import until
from tests.conftest import make_settings
from tests.held import held
from tests.live import LiveServer, live

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: test-key}}
  away: {{kind: openai, base_url: "{url}/v1", api_key: ""}}
  demo: {{kind: demo}}
models:
  gpt:
    provider: openai
    name: fake
    retries: 0
    max_output_tokens: 1000
    price: {{input: 1, output: 2}}
    capabilities: [tools, json_schema, images]
  safe: {{provider: openai, name: fake, retries: 0, fallbacks: [other], capabilities: [tools]}}
  begun: {{provider: openai, name: fake, retries: 0, fallbacks: [goes-on]}}
  other: {{provider: anthropic, name: fake, retries: 0, capabilities: [tools]}}
  goes-on: {{provider: openai, name: fake, retries: 0, prefill: prefix}}
  plain: {{provider: anthropic, name: fake, retries: 0}}
  absent: {{provider: away, name: fake}}
  demo: {{provider: demo, name: demo, capabilities: [tools], parameters: {{delay_ms: 0}}}}
aliases:
  default: [gpt]
  fast: [absent, demo]
  nothing: [absent]
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


MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings_with(tmp_path: Path, urls: DatabaseUrls, registry_file: Path) -> MakeSettings:
    """Make settings with that registry, and others."""
    return lambda **more: make_settings(tmp_path, urls, llm=LlmSettings(registry=registry_file), **more)


@pytest.fixture
async def server(settings_with: MakeSettings) -> AsyncIterator[LiveServer]:
    """A server with that registry."""
    async with held(live(settings_with())) as made:
        yield made


@dataclass
class Person:
    """Someone who is signed up on a server, with an API key."""

    url: str
    token: str
    user_id: UUID
    workspace_id: UUID
    key: str
    key_id: UUID

    def http(self, credential: str | None = None, **options: Any) -> httpx.AsyncClient:
        """Return a client of the API with a credential, the key if none is given."""
        headers = {"Authorization": f"Bearer {credential or self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    async def manage(self, method: str, path: str, **options: Any) -> Any:
        """Ask our own API, with the access token."""
        async with self.http(self.token) as http:
            answer = await http.request(method, f"/api/v1/{path}", **options)
        assert answer.is_success, answer.text
        return answer.json()["data"] if answer.content else None

    async def make_key(self, **body: Any) -> dict[str, Any]:
        """Make another API key."""
        made: dict[str, Any] = await self.manage("POST", "api-keys", json={"name": "a key", **body})
        return made

    async def complete(self, text: str, *, credential: str | None = None, **body: Any) -> httpx.Response:
        """Ask for a completion of one message."""
        asked = {"model": "gpt", "messages": [{"role": "user", "content": text}], **body}
        async with self.http(credential) as http:
            return await http.post("/v1/chat/completions", json=asked)


SignUp = Callable[..., Awaitable[Person]]


async def sign_up_on(server: LiveServer, name: str) -> Person:
    """Sign someone up, and make a key."""
    body = {"email": f"{name}@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        answer = await http.post("/api/v1/auth/signup", json=body)
    assert answer.status_code == 201, answer.text
    data = answer.json()["data"]
    person = Person(
        server.url, data["access_token"], UUID(data["user"]["id"]), UUID(data["workspace"]["id"]), "", UUID(int=0)
    )
    made = await person.make_key()
    person.key, person.key_id = made["key"], UUID(made["id"])
    return person


@pytest.fixture
async def alice(server: LiveServer) -> Person:
    """Someone with a key."""
    return await sign_up_on(server, "alice")


def events_of(text: str) -> list[Any]:
    """Return the events of a stream; comments are left out, `[DONE]` stays as it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else orjson.loads(item) for item in data]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of an answer, which has OpenAI's shape and nothing else."""
    body = answer.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    assert error["message"]
    return error


class Ledger(Protocol):
    """Reads the ledger as it is stored, oldest first; with `rows`, once it has so many."""

    async def __call__(self, *, rows: int = 0) -> list[dict[str, Any]]: ...


@pytest.fixture
def ledger(admin: asyncpg.Connection) -> Ledger:
    """Read the ledger."""

    async def read(*, rows: int = 0) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        async def look() -> bool:
            found[:] = map(dict, await admin.fetch("SELECT * FROM usage_entries ORDER BY started_at, id"))
            return len(found) >= rows

        await until(look, timeout_s=30)
        return found

    return read
