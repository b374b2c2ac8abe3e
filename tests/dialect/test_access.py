"""Who may call, how much, and how a refusal looks: always as OpenAI's."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.core import clock
from parley.core.settings import LimitSettings
from parley.tenancy.permissions import KEY_SCOPES, Permission
from tests.chat.conftest import until
from tests.dialect.conftest import (
    Ledger,
    MakeSettings,
    Person,
    error_of,
    events_of,
    sign_up_on,
)
from tests.held import held
from tests.live import LiveServer, live

PATHS = [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/gpt")]
HELLO: dict[str, Any] = {"model": "gpt", "messages": [{"role": "user", "content": "deltas=2"}]}


def _mistyped(key: str) -> str:
    return key[:-1] + ("x" if key[-1] != "x" else "y")


async def ask(person: Person, method: str, path: str, credential: str) -> httpx.Response:
    async with person.http(credential) as http:
        return await http.request(method, path, json=HELLO if method == "POST" else None)


# -- credentials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_credential_is_needed(alice: Person, provider: FakeProvider, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-not-ours"}, {"Authorization": f"Bearer {_mistyped(alice.key)}"}):
        async with httpx.AsyncClient(base_url=alice.url, headers=headers, timeout=30, trust_env=False) as http:
            answer = await http.request(method, path, json=HELLO if method == "POST" else None)

        assert answer.status_code == 401
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert not provider.requests


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_revoked_key_ends_at_once(alice: Person, provider: FakeProvider, method: str, path: str) -> None:
    assert (await ask(alice, method, path, alice.key)).status_code == 200
    await alice.manage("DELETE", f"api-keys/{alice.key_id}")

    answer = await ask(alice, method, path, alice.key)

    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")


async def test_an_expired_key(alice: Person, provider: FakeProvider) -> None:
    made = await alice.make_key(expires_at=(clock.now() + timedelta(minutes=1)).isoformat())
    assert (await alice.complete("deltas=1", credential=made["key"])).status_code == 200
    with clock.shifted(61):
        answer = await alice.complete("deltas=1", credential=made["key"])

    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert len(provider.requests) == 1


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_key_needs_the_scope(alice: Person, provider: FakeProvider, method: str, path: str) -> None:
    rest = sorted(KEY_SCOPES - {Permission.MODELS_CALL})
    without = await alice.make_key(scopes=rest)
    only = await alice.make_key(scopes=["models:call"])

    answer = await ask(alice, method, path, without["key"])
    assert answer.status_code == 403
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "missing_scope")
    assert "models:call" in error["message"]
    assert not provider.requests
    assert (await ask(alice, method, path, only["key"])).status_code == 200


async def test_a_key_that_only_calls_models_does_nothing_else(alice: Person) -> None:
    only = await alice.make_key(scopes=["models:call"])
    async with alice.http(only["key"]) as http:
        for path in ("conversations", "tasks", "models", "me"):
            assert (await http.get(f"/api/v1/{path}")).status_code == 403


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_viewers_key_calls_nothing(
    alice: Person, server: LiveServer, admin: asyncpg.Connection, provider: FakeProvider, method: str, path: str
) -> None:
    await admin.execute("UPDATE memberships SET role = 'viewer' WHERE user_id = $1", alice.user_id)
    server.app.state.api_keys._standings.forget_all()

    answer = await ask(alice, method, path, alice.key)

    assert (answer.status_code, error_of(answer)["code"]) == (403, "missing_scope")
    assert not provider.requests


async def answering(provider: FakeProvider, *, deltas: int) -> None:
    """Return once the provider has been asked, and has sent so many deltas."""

    async def begun() -> bool:
        return bool(provider.requests) and provider.requests[0].deltas_sent >= deltas

    await until(begun, timeout_s=30)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["key", "session", "membership", "viewer"])
async def test_a_credential_that_ends_takes_its_calls_with_it(
    alice: Person, server: LiveServer, admin: asyncpg.Connection, provider: FakeProvider, ledger: Ledger, what: str, *,
    stream: bool,
) -> None:  # fmt: skip
    credential = alice.token if what == "session" else alice.key
    plan = "ttft=60" if what == "viewer" else "rate=50 deltas=5000"
    task = asyncio.create_task(alice.complete(plan, credential=credential, stream=stream))
    await answering(provider, deltas=0 if "ttft" in plan else 3)
    match what:
        case "key":
            await alice.manage("DELETE", f"api-keys/{alice.key_id}")
        case "session":
            await alice.manage("DELETE", "auth/sessions")
        case "membership":
            await admin.execute("DELETE FROM memberships WHERE user_id = $1", alice.user_id)
        case "viewer":
            await admin.execute("UPDATE memberships SET role = 'viewer' WHERE user_id = $1", alice.user_id)
    if what in {"membership", "viewer"}:
        told = f"membership:{alice.workspace_id}:{alice.user_id}"
        await admin.execute("SELECT pg_notify('parley_revoked', $1)", told)

    async with asyncio.timeout(30):
        answer = await task

    (call,) = provider.requests
    assert call.closed_early
    if stream and "ttft" not in plan:
        assert events_of(answer.text)[-1]["error"]["code"] == "invalid_api_key"
    else:
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert [row["status"] for row in await ledger(rows=1)] == ["stopped"]


async def test_a_membership_that_still_holds_lets_calls_go_on(
    alice: Person, admin: asyncpg.Connection, provider: FakeProvider
) -> None:
    task = asyncio.create_task(alice.complete("rate=50 deltas=60"))
    await answering(provider, deltas=3)
    await admin.execute("SELECT pg_notify('parley_revoked', $1)", f"membership:{alice.workspace_id}:{alice.user_id}")

    async with asyncio.timeout(60):
        assert (await task).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_stops_counts_what_it_ends(
    settings_with: MakeSettings, provider: FakeProvider, ledger: Ledger, *, stream: bool
) -> None:
    async with held(live(settings_with())) as server:
        ada = await sign_up_on(server, "ada")
        task = asyncio.create_task(ada.complete("rate=50 deltas=5000", stream=stream))
        await answering(provider, deltas=3)
    await asyncio.wait([task])

    assert [row["status"] for row in await ledger()] == ["stopped"]
    (call,) = provider.requests
    assert call.closed_early


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_leaves_lets_calls_end_and_takes_no_more(
    alice: Person, server: LiveServer, provider: FakeProvider, ledger: Ledger, *, stream: bool
) -> None:
    short = asyncio.create_task(alice.complete("short rate=50 deltas=30", stream=stream))
    await answering(provider, deltas=3)
    long = asyncio.create_task(alice.complete("rate=50 deltas=5000", stream=stream))
    await provider.until(lambda: len(provider.requests) == 2, within_s=30)
    leaving = asyncio.create_task(server.app.state.dialect.running.drain(3600))
    assert (await short).status_code == 200
    assert not long.done()

    late = await alice.complete("deltas=1")
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    assert error_of(late)["code"] == "unavailable"
    leaving.cancel()
    await server.app.state.dialect.running.drain(0)
    async with asyncio.timeout(30):
        answer = await long
    if stream:
        assert events_of(answer.text)[-1]["error"]["code"] == "unavailable"
    else:
        assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
    assert [row["status"] for row in await ledger()] == ["completed", "stopped"]


# -- budgets -----------------------------------------------------------------------------------------------------------


async def set_budget(admin: asyncpg.Connection, person: Person, subject: str, ceiling: str) -> None:
    """Give someone a budget for this month."""
    await admin.execute(
        "INSERT INTO budgets (workspace_id, id, user_id, key_id, period, ceiling, alert_at)"
        " VALUES ($1, $2, $3, $4, 'month', $5::text::numeric, 0.8)",
        person.workspace_id,
        uuid4(),
        person.user_id if subject == "user" else None,
        person.key_id if subject == "api_key" else None,
        ceiling,
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("subject", ["workspace", "user", "api_key"])
async def test_a_budget_that_is_used_up(
    alice: Person, admin: asyncpg.Connection, provider: FakeProvider, ledger: Ledger, subject: str, *, stream: bool
) -> None:
    # Two tokens in, two out cost more than this, so the first call is the last one.
    await set_budget(admin, alice, subject, "0.000001")
    assert (await alice.complete("deltas=2", stream=stream)).status_code == 200
    assert [row["status"] for row in await ledger()] == ["completed"]

    answer = await alice.complete("deltas=2", stream=stream)

    assert answer.status_code == 429
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert "budget" in error["message"]
    # Clients repeat what is 429, unless they are told that it makes no sense.
    assert answer.headers["x-should-retry"] == "false"
    assert int(answer.headers["retry-after"]) > 0
    assert len(provider.requests) == 1
    assert len(await ledger()) == 1
    assert await admin.fetchval("SELECT count(*) FROM usage_reservations") == 0
    # Another key is nobody's concern but the user's and the workspace's.
    other = await alice.make_key()
    again = await alice.complete("deltas=2", credential=other["key"])
    assert again.status_code == (200 if subject == "api_key" else 429)


async def test_what_is_refused_leaves_nothing_reserved(
    alice: Person, admin: asyncpg.Connection, provider: FakeProvider
) -> None:
    await set_budget(admin, alice, "workspace", "1")
    for body in ({"fail": "503"}, {"fail": "400ctx"}, {"deltas": "2"}, {"fail": "die_at:1"}):
        ((name, value),) = body.items()
        await alice.complete(f"{name}={value}", stream=True)

    async def nothing_reserved() -> bool:
        rows = await admin.fetch("SELECT reserved FROM budget_counters")
        return [row["reserved"] for row in rows] == [0] and not await admin.fetchval(
            "SELECT count(*) FROM usage_reservations"
        )

    await until(nothing_reserved, timeout_s=30)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def strict(settings_with: MakeSettings) -> AsyncIterator[LiveServer]:
    """A server on which a user has two calls at once, and a key ten requests a minute."""
    limits = LimitSettings(running_calls=2, key_per_minute=10)
    async with held(live(settings_with(rate_limits="on", limits=limits, dialect_body_bytes=4096))) as made:
        yield made


async def test_calls_at_once_are_bounded_by_user(strict: LiveServer, provider: FakeProvider) -> None:
    ada, bob = await sign_up_on(strict, "ada"), await sign_up_on(strict, "bob")
    other_key = (await ada.make_key())["key"]
    running = [
        asyncio.create_task(ada.complete("ttft=60", stream=stream, credential=credential))
        for stream, credential in ((True, None), (False, other_key))
    ]
    await provider.until(lambda: len(provider.requests) == 2, within_s=30)

    refused = await ada.complete("deltas=1", credential=other_key)

    assert refused.status_code == 429
    assert (error_of(refused)["code"], refused.headers["retry-after"]) == ("rate_limit_exceeded", "1")
    assert "x-should-retry" not in refused.headers
    assert (await bob.complete("deltas=1")).status_code == 200
    for task in running:
        task.cancel()
    await asyncio.wait(running)

    async def free() -> bool:
        return (await ada.complete("deltas=1")).status_code == 200

    await until(free, timeout_s=30)
    assert strict.app.state.dialect.running.total == 0


async def test_requests_are_limited_and_told_as_openai_tells_them(strict: LiveServer) -> None:
    ada = await sign_up_on(strict, "ada")
    async with ada.http() as http:
        answers = [await http.get("/v1/models") for _ in range(11)]

    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["10"] * 11
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == [
        *map(str, range(9, -1, -1)),
        "0",
    ]
    for answer in answers:
        assert 0 < int(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert "ratelimit" in answer.headers
    error = error_of(answers[-1])
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert int(answers[-1].headers["retry-after"]) > 0


async def test_the_body_is_bounded(strict: LiveServer, server: LiveServer, provider: FakeProvider) -> None:
    ada = await sign_up_on(strict, "ada")

    for answer in (await ada.complete("x" * 5000), await _in_pieces(ada, 5000)):
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "too_large"
    assert not provider.requests


async def _in_pieces(person: Person, size: int) -> httpx.Response:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(size // 100):
            yield b" " * 100

    async with person.http() as http:
        return await http.post("/v1/chat/completions", content=body())


async def test_it_takes_more_than_other_paths_do(alice: Person, provider: FakeProvider) -> None:
    assert (await alice.complete("deltas=1", something_new="x" * 2_000_000)).status_code == 200
    assert "something_new" not in provider.requests[0].body
    async with alice.http() as http:
        assert (await http.post("/v1/models", content=b" " * 2_000_000)).status_code == 413


async def test_a_stranger_does_not_make_us_hold_a_body(server: LiveServer) -> None:
    """Who has no credential is refused before the body is read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 20000000\r\n\r\n{"
    )
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401")
    writer.close()


# -- the shape of every refusal ----------------------------------------------------------------------------------------


async def test_unknown_and_unusable_models(alice: Person) -> None:
    unknown = await alice.complete("?", model="gpt-99")
    assert unknown.status_code == 404
    error = error_of(unknown)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
    for name in ("absent", "nothing"):
        unusable = await alice.complete("?", model=name)
        assert (unusable.status_code, error_of(unusable)["code"]) == (503, "model_not_usable")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "param", "code"),
    [
        ("POST", "chat/completions", b"{", 400, None, "bad_request"),
        ("POST", "chat/completions", b"", 400, None, "bad_request"),
        ("POST", "chat/completions", b"{}", 400, "model", "missing_required_parameter"),
        ("POST", "chat/completions", b'{"model":"gpt","messages":5}', 400, "messages", "invalid_value"),
        ("GET", "chat/completions", None, 405, None, "method_not_allowed"),
        ("DELETE", "models/gpt", None, 405, None, "method_not_allowed"),
        ("GET", "models/none", None, 404, "model", "model_not_found"),
        ("POST", "embeddings", b"{}", 404, None, "unknown_url"),
        ("POST", "responses", b"{}", 404, None, "unknown_url"),
        ("GET", "", None, 404, None, "unknown_url"),
    ],
)
async def test_every_refusal_has_openais_shape(
    alice: Person, method: str, path: str, content: bytes | None, status: int, param: str | None, code: str
) -> None:
    async with alice.http() as http:
        answer = await http.request(method, f"/v1/{path}", content=content, headers={"X-Request-ID": "from-the-caller"})

    assert answer.status_code == status
    error = error_of(answer)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert answer.headers["x-request-id"] == "from-the-caller"


CANARY = "canary-77aa"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"model":"gpt","messages":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"model":"gpt","seed":' + b"9" * 5000 + b',"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"gpt","seed":1e999,"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"\\u0000","messages":[{"role":"user","content":"x"}]}',
        b'{"model":"\\ud83d","messages":[{"role":"user","content":"x"}]}',
        b'{"model":"gpt","messages":[{"role":"canary-77aa","content":"x"}]}',
        b'{"model":"gpt","messages":[{"role":"user","content":[{"type":"canary-77aa"}]}]}',
        b'{"model":"gpt","messages":[{"role":"user","content":"x"}],"tool_choice":"canary-77aa"}',
        b'{"model":"gpt","messages":[{"role":"user","content":"x"}],"stop":{"canary-77aa":1}}',
        b'{"model":"canary-77aa","messages":[{"role":"user","content":"x"}]}',
        b'{"model":"gpt","messages":[{"role":"user","content":"x"}],"temperature":"canary-77aa"}',
        b'{"model":"gpt","messages":[{"role":"user","content":"x"}],"logit_bias":{"a":"canary-77aa"}}',
        "{}".encode("utf-16"),
        b"\xff\xfe",
        b"NaN",
    ],
)
async def test_hostile_bodies_are_refused_without_an_echo(alice: Person, provider: FakeProvider, body: bytes) -> None:
    async with alice.http() as http:
        for content_type in ("application/json", "text/plain"):
            answer = await http.post("/v1/chat/completions", content=body, headers={"Content-Type": content_type})

            assert answer.status_code in {400, 404}, answer.text
            error_of(answer)
            assert CANARY not in answer.text
    assert not provider.requests


async def test_a_fault_of_ours_tells_nothing(
    alice: Person, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(server.app.state.dialect, "models", broken)
    async with alice.http() as http:
        answer = await http.get("/v1/models")

    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "hunter2" not in answer.text


async def test_our_own_paths_keep_our_own_shape(alice: Person) -> None:
    async with alice.http("nonsense") as http:
        for method, path in (("GET", "/api/v1/models"), ("POST", "/v1/auth/signin"), ("GET", "/v2/models")):
            answer = await http.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code >= 400
            assert set(answer.json()) >= {"data", "meta", "errors"}


# -- models ------------------------------------------------------------------------------------------------------------


async def test_the_models_and_aliases_that_can_be_called(alice: Person) -> None:
    async with alice.http() as http:
        answer = (await http.get("/v1/models")).json()
        one = (await http.get("/v1/models/goes-on")).json()

    assert answer["object"] == "list"
    found = {model["id"]: model for model in answer["data"]}
    assert list(found) == ["default", "fast", "gpt", "safe", "begun", "other", "goes-on", "plain", "demo"]
    for model in found.values():
        assert set(model) == {"id", "object", "created", "owned_by"}
        assert (model["object"], type(model["created"])) == ("model", int)
    assert [found[name]["owned_by"] for name in ("default", "gpt", "other")] == ["parley", "openai", "anthropic"]
    assert one == found["goes-on"]
    for name in ("default", "fast"):
        assert (await alice.complete("deltas=1", model=name)).status_code == 200


async def test_none_of_it_is_in_our_own_document(server: LiveServer) -> None:
    paths = server.app.openapi()["paths"]

    assert "/api/v1/models" in paths
    assert not [path for path in paths if path.startswith("/v1/")]


async def test_another_workspaces_calls_are_its_own(server: LiveServer, alice: Person, ledger: Ledger) -> None:
    bob = await sign_up_on(server, "bob")
    assert (await alice.complete("deltas=1", user=str(bob.user_id), workspace_id=str(bob.workspace_id))).is_success
    assert events_of((await bob.complete("deltas=1", stream=True)).text)

    found: list[tuple[UUID, UUID]] = [(row["workspace_id"], row["key_id"]) for row in await ledger()]
    assert found == [(alice.workspace_id, alice.key_id), (bob.workspace_id, bob.key_id)]
