"""A workspace's own keys of providers: who may set them, where they go, and where they never stand."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from benchmarks.fake_provider import FakeProvider
from parley.cli.doctor import check_provider_keys
from parley.core import http as outgoing_http
from parley.core.db import DatabaseUrls
from parley.core.ids import new_id
from parley.core.personal_data import Person
from parley.core.scope import Role, Scope
from parley.core.settings import LlmSettings, OutgoingSettings, Settings
from parley.llm.errors import AddressRefused, ModelError, ModelNotUsable
from parley.llm.personal_data import ProviderKeyData
from parley.llm.ports import TextChunk
from parley.llm.provider_keys import MOVED, UNREADABLE, URL_NOT_ALLOWED
from parley.llm.registry import ModelRegistry
from parley.usage.bills import Estimate
from parley.usage.service import UsageService
from tests.canaries import PROVIDER_KEY, secrets_in, secrets_in_tables
from tests.conftest import Account, SignUp, make_settings, running
from tests.llm.calls import asking

KEYS = "/api/v1/provider-keys"
KEY = f"{PROVIDER_KEY}5d1c0b77aa"
OTHER_KEY = f"{PROVIDER_KEY}9e8f7a6b55"
OPERATORS_KEY = "operators-key-000"
OPERATORS_HEADER = "operators-header-000"

REGISTRY = """
providers:
  openai:
    kind: openai
    base_url: "{url}/v1"
    api_key: operators-key-000
    headers: {{x-operator: operators-header-000}}
    workspace_urls: true
  fixed: {{kind: openai, base_url: "{url}/v1", api_key: operators-key-000}}
  keyless: {{kind: anthropic, base_url: "{url}", api_key: "${{NO_SUCH_KEY:-}}"}}
  homeless: {{kind: openai, base_url: "${{NO_SUCH_URL:-}}", workspace_urls: true}}
  closed: {{kind: openai, base_url: "{url}/v1", api_key: operators-key-000, workspace_keys: false}}
  open: {{kind: openai, base_url: "{url}/v1", workspace_urls: true}}
  demo: {{kind: demo}}
models:
  gpt: {{provider: openai, name: fake, retries: 0}}
  gpt-too: {{provider: openai, name: fake, retries: 0}}
  fixed: {{provider: fixed, name: fake, retries: 0}}
  claude: {{provider: keyless, name: fake, retries: 0}}
  own: {{provider: homeless, name: fake, retries: 0}}
  closed: {{provider: closed, name: fake, retries: 0}}
  open: {{provider: open, name: fake, retries: 0}}
  demo: {{provider: demo, name: demo}}
aliases:
  default: [claude, gpt]
"""


@pytest.fixture
async def operators() -> AsyncIterator[FakeProvider]:
    """The provider that the operator's registry names."""
    async with FakeProvider() as made:
        yield made


@pytest.fixture
async def own() -> AsyncIterator[FakeProvider]:
    """A server of a workspace's own."""
    async with FakeProvider() as made:
        yield made


@pytest.fixture
async def inner() -> AsyncIterator[FakeProvider]:
    """A server that no workspace may reach."""
    async with FakeProvider() as made:
        yield made
        assert list(made.requests) == []


@pytest.fixture
def registry_file(tmp_path: Path, operators: FakeProvider) -> Path:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=operators.url))
    return path


@pytest.fixture
def settings(tmp_path: Path, urls: DatabaseUrls, registry_file: Path, own: FakeProvider) -> Settings:
    return settings_of(tmp_path, urls, registry_file, own)


def settings_of(data_dir: Path, urls: DatabaseUrls, registry: Path, own: FakeProvider, **more: Any) -> Settings:
    allow = f"http://127.0.0.1:{own.port},http://models.example.com:{own.port}"
    return make_settings(
        data_dir, urls, llm=LlmSettings(registry=registry), outgoing=OutgoingSettings(allow=allow), **more
    )


@dataclass(frozen=True)
class Caller:
    """Someone whose workspace calls models."""

    account: Account
    app: FastAPI

    @property
    def scope(self) -> Scope:
        return Scope(self.account.workspace_id, self.account.user_id, Role.OWNER)

    @property
    def usage(self) -> UsageService:
        usage: UsageService = self.app.state.usage
        return usage

    async def put(self, provider: str, key: str = KEY, **more: Any) -> httpx.Response:
        return await self.account.http.put(f"{KEYS}/{provider}", json={"key": key, **more})

    async def set(self, provider: str, key: str = KEY, **more: Any) -> dict[str, Any]:
        answer = await self.put(provider, key, **more)
        assert answer.status_code == 200, answer.text
        data: dict[str, Any] = answer.json()["data"]
        return data

    async def delete(self, provider: str) -> None:
        answer = await self.account.http.delete(f"{KEYS}/{provider}")
        assert answer.status_code == 204, answer.text

    async def listed(self, provider: str) -> dict[str, Any]:
        answer = await self.account.http.get(KEYS)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = next(one for one in answer.json()["data"] if one["provider"] == provider)
        return found

    async def models(self) -> dict[str, str | None]:
        """Return why each model cannot be used; None where it can."""
        answer = await self.account.http.get("/api/v1/models")
        return {model["id"]: model["reason"] for model in answer.json()["data"]}

    async def ask(self, model: str | None, text: str = "deltas=3") -> str:
        async with self.usage.stream(asking(text), model, scope=self.scope) as call:
            return "".join([item.text async for item in call if isinstance(item, TextChunk)])


@pytest.fixture
def alices(alice: Account, app: FastAPI) -> Caller:
    return Caller(alice, app)


@pytest.fixture
def bobs(bob: Account, app: FastAPI) -> Caller:
    return Caller(bob, app)


def read_again(path: Path, text: str) -> ModelRegistry:
    """Change the registry's file; return what it says now."""
    path.write_text(text)
    return ModelRegistry.load(path, {})


def told(provider: FakeProvider) -> list[str]:
    """Return the credential of each call."""
    return [
        record.headers.get("authorization", "").removeprefix("Bearer ") or record.headers.get("x-api-key", "")
        for record in provider.requests
    ]


def heads(provider: FakeProvider) -> str:
    return repr([record.headers for record in provider.requests])


# -- over HTTP ---------------------------------------------------------------------------------------------------------


async def test_a_key_is_written_and_never_read(alices: Caller, admin: asyncpg.Connection) -> None:
    made = await alices.set("openai")

    assert (made["is_set"], made["last_four"], made["base_url"], made["problem"]) == (True, "77aa", None, None)
    assert made["created_by"] == str(alices.account.user_id)
    answer = await alices.account.http.get(KEYS)
    assert answer.headers["cache-control"] == "no-store"
    assert secrets_in(answer.text) == []
    assert "sealed" not in answer.text
    assert [one["provider"] for one in answer.json()["data"]] == ["fixed", "homeless", "keyless", "open", "openai"]
    assert await secrets_in_tables(admin) == []


async def test_what_was_done_is_in_the_audit_log_without_the_key(alices: Caller, own: FakeProvider) -> None:
    await alices.set("openai", base_url=f"{own.url}/v1/a-path")
    await alices.delete("openai")

    answer = await alices.account.http.get("/api/v1/audit")
    events = [one for one in answer.json()["data"] if one["action"].startswith("provider_key.")]
    assert [(one["action"], one["target"], one["actor"]) for one in events] == [
        ("provider_key.deleted", "openai", "user"),
        ("provider_key.set", "openai", "user"),
    ]
    assert events[1]["details"] == {"last_four": "77aa", "host": f"127.0.0.1:{own.port}"}
    assert secrets_in(answer.text) == []


async def test_of_a_short_key_nothing_is_shown(alices: Caller) -> None:
    assert (await alices.set("openai", "12345678"))["last_four"] == ""


@pytest.mark.parametrize("key", ["", "short", "with a space", "line\nfeed-12345", "ünïcödé-12345", "nul\0-12345678"])
async def test_a_key_that_cannot_stand_in_a_header_is_refused_and_not_told_again(alices: Caller, key: str) -> None:
    answer = await alices.put("openai", key)

    assert answer.status_code == 422, answer.text
    assert not key or key not in answer.text
    assert not (await alices.listed("openai"))["is_set"]


@pytest.mark.parametrize(
    "body", [{}, {"base_url": "https://models.example.com/v1"}, {"key": 5}, {"key": KEY, "provider": "x"}]
)
async def test_the_key_always_comes_with_the_url(alices: Caller, body: dict[str, Any]) -> None:
    answer = await alices.account.http.put(f"{KEYS}/openai", json=body)

    assert answer.status_code == 422
    assert secrets_in(answer.text) == []


@pytest.mark.parametrize("provider", ["closed", "demo", "nobody", "gpt", "x" * 100])
async def test_there_are_keys_only_for_providers_that_the_operator_opens(alices: Caller, provider: str) -> None:
    assert (await alices.put(provider)).status_code == 404
    assert (await alices.account.http.delete(f"{KEYS}/{provider}")).status_code == 404


@pytest.mark.parametrize("provider", ["%00", "open%00ai", "x" * 101, "%F0%9F%98%80", "a%2Fb", "..%2F..%2Fme"])
async def test_no_name_of_a_provider_is_a_fault_of_ours(alices: Caller, provider: str) -> None:
    assert (await alices.put(provider)).status_code in {404, 422}
    assert (await alices.account.http.delete(f"{KEYS}/{provider}")).status_code in {404, 422}


async def test_what_is_not_set_cannot_be_removed(alices: Caller, bobs: Caller) -> None:
    await alices.set("openai")

    assert (await bobs.account.http.delete(f"{KEYS}/openai")).status_code == 404
    assert not (await bobs.listed("openai"))["is_set"]
    assert (await alices.listed("openai"))["is_set"]


@pytest.mark.parametrize("role", ["member", "viewer"])
async def test_only_admins_see_and_set_them(
    sign_up: SignUp, alice: Account, admin: asyncpg.Connection, role: str
) -> None:
    someone = await sign_up()
    await admin.execute("UPDATE memberships SET role = $2 WHERE user_id = $1", someone.user_id, role)
    session = await someone.http.post("/api/v1/auth/refresh", json={"refresh_token": someone.refresh_token})
    someone.http.headers["Authorization"] = f"Bearer {session.json()['data']['access_token']}"

    for answer in (
        await someone.http.get(KEYS),
        await someone.http.put(f"{KEYS}/openai", json={"key": KEY}),
        await someone.http.delete(f"{KEYS}/openai"),
    ):
        assert answer.status_code == 403


async def test_an_api_key_has_no_right_to_them(alices: Caller) -> None:
    made = await alices.account.http.post("/api/v1/api-keys", json={"name": "All"})
    headers = {"Authorization": f"Bearer {made.json()['data']['key']}"}

    assert (await alices.account.http.get(KEYS, headers=headers)).status_code == 403
    assert (await alices.account.http.put(f"{KEYS}/openai", json={"key": KEY}, headers=headers)).status_code == 403


# -- where a key goes --------------------------------------------------------------------------------------------------


async def test_a_workspaces_key_takes_the_place_of_the_operators(
    alices: Caller, bobs: Caller, operators: FakeProvider
) -> None:
    await alices.set("openai")
    await alices.ask("gpt")
    await bobs.ask("gpt")
    await alices.ask("fixed")
    await alices.delete("openai")
    await alices.ask("gpt")

    assert told(operators) == [KEY, OPERATORS_KEY, OPERATORS_KEY, OPERATORS_KEY]


async def test_a_provider_becomes_usable_by_a_workspaces_key(
    alices: Caller, bobs: Caller, operators: FakeProvider
) -> None:
    assert (await alices.models())["claude"] == "NO_SUCH_KEY is not set"
    await alices.set("keyless")

    assert (await alices.models())["claude"] is None
    assert (await bobs.models())["claude"] == "NO_SUCH_KEY is not set"
    # The first usable one of an alias is now another.
    assert alices.usage.models(alices.scope).resolve("default").id == "claude"
    assert bobs.usage.models(bobs.scope).resolve("default").id == "gpt"
    await alices.ask("claude")
    assert told(operators) == [KEY]
    with pytest.raises(ModelNotUsable):
        await bobs.ask("claude")

    await alices.delete("keyless")
    assert (await alices.models())["claude"] == "NO_SUCH_KEY is not set"


async def test_a_reply_is_written_with_the_workspaces_key(alices: Caller, operators: FakeProvider) -> None:
    await alices.set("keyless")
    http = alices.account.http
    conversation = (await http.post("/api/v1/conversations", json={"model": "claude"})).json()["data"]["id"]
    sent = await http.post(
        f"/api/v1/conversations/{conversation}/messages",
        json={"text": "deltas=3"},
        headers={"Accept": "text/event-stream"},
    )

    assert "event: reply.completed" in sent.text
    assert set(told(operators)) == {KEY}


async def test_a_url_of_ones_own_is_told_ones_own_key_and_nothing_of_the_operators(
    alices: Caller, bobs: Caller, operators: FakeProvider, own: FakeProvider
) -> None:
    made = await alices.set("openai", base_url=f"{own.url}/v1/")
    assert made["base_url"] == f"{own.url}/v1"
    for model in ("gpt", "gpt-too"):
        await alices.ask(model)
    await bobs.ask("gpt")

    assert told(own) == [KEY, KEY]
    assert told(operators) == [OPERATORS_KEY]
    assert OPERATORS_KEY not in heads(own)
    assert OPERATORS_HEADER not in heads(own)
    assert OPERATORS_HEADER in heads(operators)
    assert KEY not in heads(operators)


async def test_a_provider_without_an_address_has_the_workspaces(alices: Caller, own: FakeProvider) -> None:
    refused = await alices.put("homeless")
    assert (refused.status_code, refused.json()["details"]) == (422, {"field": "base_url"})

    await alices.set("homeless", base_url=f"{own.url}/v1")
    await alices.ask("own")
    assert told(own) == [KEY]


async def test_a_key_never_goes_to_a_url_that_it_was_not_given_for(
    alices: Caller, operators: FakeProvider, own: FakeProvider
) -> None:
    await alices.set("openai", KEY, base_url=f"{own.url}/v1")
    # Without the key the URL is not changed, and with another key the former one is gone.
    changed = await alices.account.http.put(f"{KEYS}/openai", json={"base_url": f"{operators.url}/v1"})
    assert changed.status_code == 422
    await alices.ask("gpt")
    await alices.set("openai", OTHER_KEY)
    await alices.ask("gpt")

    assert told(own) == [KEY]
    assert told(operators) == [OTHER_KEY]


async def test_a_key_that_was_given_for_the_operators_url_does_not_follow_it(
    alices: Caller, operators: FakeProvider, own: FakeProvider, registry_file: Path
) -> None:
    await alices.set("fixed")
    alices.usage.registry.replace(read_again(registry_file, REGISTRY.format(url=own.url)))

    with pytest.raises(ModelNotUsable):
        await alices.ask("fixed")
    assert (await alices.models())["fixed"] == MOVED
    assert (await alices.listed("fixed"))["problem"] == MOVED
    # Set again, it is given for the new one.
    await alices.set("fixed", OTHER_KEY)
    await alices.ask("fixed")
    assert (told(operators), told(own)) == ([], [OTHER_KEY])


async def test_a_row_that_was_given_another_url_by_hand_is_not_used(
    alices: Caller, own: FakeProvider, admin: asyncpg.Connection
) -> None:
    await alices.set("openai", base_url=f"http://models.example.com:{own.port}/v1")
    await admin.execute(
        "UPDATE provider_keys SET base_url = $1, given_for = $1 WHERE provider = 'openai'", f"{own.url}/v1"
    )
    await admin.execute("SELECT pg_notify('parley_revoked', $1)", f"provider_keys:{alices.account.workspace_id}:")

    await until(lambda: problem_of(alices, "gpt") == UNREADABLE)
    assert told(own) == []


async def test_a_row_that_was_moved_to_another_workspace_is_not_used(
    alices: Caller, bobs: Caller, operators: FakeProvider, admin: asyncpg.Connection
) -> None:
    await alices.set("openai")
    await admin.execute("UPDATE provider_keys SET workspace_id = $1", bobs.account.workspace_id)
    await admin.execute("SELECT pg_notify('parley_revoked', $1)", f"provider_keys:{bobs.account.workspace_id}:")

    await until(lambda: problem_of(bobs, "gpt") == UNREADABLE)
    with pytest.raises(ModelNotUsable):
        await bobs.ask("gpt")
    assert told(operators) == []


def problem_of(caller: Caller, model: str) -> str | None:
    entries = caller.usage.models(caller.scope).entries()
    return next(entry.unusable for entry in entries if entry.id == model)


async def until(holds: Callable[[], bool], *, timeout_s: float = 20) -> float:
    """Wait until it holds; return how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() < began + timeout_s, "it did not happen in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


# -- URLs that are refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["fixed", "keyless"])
async def test_there_are_urls_only_where_the_operator_allows_them(
    alices: Caller, own: FakeProvider, provider: str
) -> None:
    answer = await alices.put(provider, base_url=f"{own.url}/v1")

    assert (answer.status_code, answer.json()["details"]) == (422, {"field": "base_url"})
    assert secrets_in(answer.text) == []


async def test_a_url_that_leads_inside_is_refused_when_it_is_set(alices: Caller, inner: FakeProvider) -> None:
    for url in (
        inner.url,
        f"https://127.0.0.1:{inner.port}",
        "https://localhost/v1",
        "https://2130706433/v1",
        "https://[::ffff:127.0.0.1]/v1",
        "http://169.254.169.254/latest/",
        "https://[fd00:ec2::254]/",
        "https://metadata.google.internal/",
        "http://models.example.com/v1",
        "https://models.example.com:22/v1",
        "https://user:word@models.example.com/v1",
        "https://models.example.com/v1?key=1",
        "https://models.example.com/v1#x",
        "not a url",
    ):
        answer = await alices.put("openai", base_url=url)
        assert answer.status_code == 422, url
        assert answer.json()["details"] == {"field": "base_url"}
    assert not (await alices.listed("openai"))["is_set"]


async def test_a_url_whose_name_leads_inside_is_refused_when_it_is_asked(
    alices: Caller, inner: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing_http._GuardedResolver, "_find", _found("127.0.0.1"))
    await alices.set("openai", base_url="https://models.example.com/v1")

    with pytest.raises(AddressRefused) as refused:
        await alices.ask("gpt")
    assert (refused.value.code, refused.value.retryable) == ("provider_unavailable", False)
    assert "public" in refused.value.detail
    assert "127.0.0.1" not in refused.value.detail


def _found(address: str) -> Any:
    async def find(*_: object) -> list[tuple[int, str]]:
        return [(AF_INET, address)]

    return find


async def test_a_redirect_of_ones_own_server_is_not_followed(
    alices: Caller, own: FakeProvider, inner: FakeProvider
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 307 X\r\nlocation: {inner.url}/v1\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    port = own.port
    await own.__aexit__()
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    try:
        await alices.set("openai", base_url=f"http://127.0.0.1:{port}/v1")
        with pytest.raises(AddressRefused, match="redirect"):
            await alices.ask("gpt")
    finally:
        server.close()
        await server.wait_closed()
        await own.__aenter__()


async def test_a_url_that_is_not_allowed_any_more_is_not_asked(
    alices: Caller, own: FakeProvider, operators: FakeProvider, registry_file: Path
) -> None:
    await alices.set("openai", base_url=f"{own.url}/v1")
    text = REGISTRY.format(url=operators.url).replace("workspace_urls: true", "workspace_urls: false")
    alices.usage.registry.replace(read_again(registry_file, text))

    assert (await alices.models())["gpt"] == URL_NOT_ALLOWED
    with pytest.raises(ModelNotUsable):
        await alices.ask("gpt")
    # Nor is the operator's key spent in silence instead.
    assert (told(own), told(operators)) == ([], [])


# -- one workspace's fault is not the others' --------------------------------------------------------------------------


async def test_a_workspaces_failing_server_opens_nobody_elses_breaker(
    alices: Caller, bobs: Caller, own: FakeProvider
) -> None:
    await alices.set("openai", base_url=f"{own.url}/v1")
    for _ in range(6):
        with pytest.raises(ModelError):
            await alices.ask("gpt", "deltas=3 fail=503")

    assert alices.usage.models(alices.scope).paused(alices.usage.models(alices.scope).resolve("gpt")) is not None
    assert bobs.usage.models(bobs.scope).paused(bobs.usage.models(bobs.scope).resolve("gpt")) is None
    assert await bobs.ask("gpt")


# -- several processes -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def other_process(settings: Settings) -> AsyncIterator[FastAPI]:
    async with running(settings) as app:
        yield app


async def test_every_process_follows_within_two_seconds(alices: Caller, settings: Settings) -> None:
    async with other_process(settings) as app:
        there = Caller(alices.account, app)
        assert problem_of(there, "claude") is not None
        await alices.set("keyless")
        assert await until(lambda: problem_of(there, "claude") is None) < 2
        await alices.delete("keyless")
        assert await until(lambda: problem_of(there, "claude") is not None) < 2


async def test_a_process_that_did_not_hear_looks_at_everything(
    alices: Caller, settings: Settings, admin: asyncpg.Connection
) -> None:
    async with other_process(settings) as app:
        there = Caller(alices.account, app)
        # As if nobody had been told: the rows are written past the service, then the connections are cut.
        await alices.set("openai")
        await until(lambda: owner_of(there, "gpt") is not None)
        await admin.execute("DELETE FROM provider_keys")
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ILIKE 'listen%' OR query = 'SELECT 1'"
        )
        await until(lambda: owner_of(there, "gpt") is None)
        await until(lambda: owner_of(alices, "gpt") is None)


def owner_of(caller: Caller, model: str) -> UUID | None:
    return caller.usage.models(caller.scope).resolve(model).owner


async def test_a_process_that_starts_knows_the_keys(
    alices: Caller, settings: Settings, operators: FakeProvider
) -> None:
    await alices.set("openai")
    async with other_process(settings) as app:
        await Caller(alices.account, app).ask("gpt")
    assert told(operators) == [KEY]


async def test_workspaces_without_keys_have_the_operators_registry_itself(alices: Caller, bobs: Caller) -> None:
    await alices.set("openai")

    assert bobs.usage.models(bobs.scope) is bobs.usage.registry
    assert alices.usage.models(alices.scope) is alices.usage.models(alices.scope)
    assert alices.usage.models(alices.scope) is not alices.usage.registry


# -- secrets that rotate -----------------------------------------------------------------------------------------------


def secrets(*texts: str) -> list[SecretStr]:
    return [SecretStr(f"{text}-secret-0123456789abcdefghijklmnop") for text in texts]


async def test_keys_outlive_a_secret_and_are_sealed_anew(
    tmp_path: Path, urls: DatabaseUrls, registry_file: Path, own: FakeProvider, operators: FakeProvider,
    sign_up: SignUp, admin: asyncpg.Connection,
) -> None:  # fmt: skip
    def settings(*texts: str) -> Settings:
        return settings_of(tmp_path, urls, registry_file, own, secret_key=secrets(*texts))

    async def findings(*texts: str) -> list[tuple[str, str]]:
        return [(one.level, one.message) async for one in check_provider_keys(urls, settings(*texts))]

    assert await findings("first") == []
    async with running(settings("first")) as app:
        caller = Caller(await sign_up("rita@example.com", app=app), app)
        await caller.set("openai")
        assert await findings("first") == [("ok", "1 of workspaces, all readable")]
        assert [level for level, _ in await findings("second", "first")] == ["warning", "ok"]
    sealed = await admin.fetchval("SELECT sealed FROM provider_keys")

    async with running(settings("second", "first")) as app:
        await Caller(caller.account, app).ask("gpt")
    assert await admin.fetchval("SELECT sealed FROM provider_keys") != sealed

    async with running(settings("second")) as app:
        await Caller(caller.account, app).ask("gpt")
    assert told(operators) == [KEY, KEY]

    async with running(settings("third")) as app:
        lost = Caller(caller.account, app)
        assert problem_of(lost, "gpt") == UNREADABLE
        with pytest.raises(ModelNotUsable, match="an admin has to set it again"):
            await lost.ask("gpt")
        # Nor is the operator's key spent in silence instead.
        assert told(operators) == [KEY, KEY]
    found = await findings("third")
    assert [level for level, _ in found] == ["problem"]
    assert str(caller.account.workspace_id) in found[0][1]


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_keys_go_with_their_workspace(alices: Caller, admin: asyncpg.Connection) -> None:
    await alices.set("openai")
    await admin.execute("DELETE FROM workspaces WHERE id = $1", alices.account.workspace_id)

    assert await admin.fetchval("SELECT count(*) FROM provider_keys") == 0


async def test_of_a_person_only_that_they_set_one_is_kept(alices: Caller, admin: asyncpg.Connection) -> None:
    await alices.set("openai")
    account, database = alices.account, alices.app.state.database
    person = Person(account.user_id, (account.workspace_id, new_id()))
    data = ProviderKeyData()

    records = [record async for record in data.export(database, person)]
    assert [record.entry for record in records] == [f"workspaces/{account.workspace_id}/provider_keys.json"]
    assert '"provider":"openai"' in records[0].json
    assert secrets_in(records[0].json) == []
    for word in ("sealed", "77aa", "base_url"):
        assert word not in records[0].json

    await data.erase(database, person)
    rows = await admin.fetch("SELECT provider, created_by FROM provider_keys")
    # The workspace's calls go on.
    assert [tuple(row) for row in rows] == [("openai", None)]


@pytest.mark.parametrize(
    ("provider", "model", "url", "paid"),
    [
        ("openai", "gpt", False, True),
        ("openai", "gpt", True, True),
        ("keyless", "claude", False, True),
        ("open", "open", False, False),
        ("open", "open", True, True),
    ],
)
async def test_who_pays_for_calls_with_a_workspaces_key(
    alices: Caller, own: FakeProvider, provider: str, model: str, url: bool, paid: bool
) -> None:
    """A server that the operator asks without a key takes any: what it costs is the operator's all the same."""
    await alices.set(provider, **({"base_url": f"{own.url}/v1"} if url else {}))
    async with alices.usage.stream(asking("deltas=3"), model, scope=alices.scope) as call:
        assert [item async for item in call]
    assert [record.own_key for record in call.records] == [paid]
    assert Estimate.of_request(call.entries, asking("deltas=3")).by_operator is not paid
    await alices.delete(provider)
    assert not alices.usage.models(alices.scope).entries()[0].own_key
