"""A repeated creating request gets the first answer again, and has one effect."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from sqlmodel.ext.asyncio.session import AsyncSession

from parley.core import clock, db
from parley.core.db import Database
from parley.core.idempotency import (
    KEPT_FOR,
    IdempotencyKeyReused,
    Once,
    Replay,
    RequestInFlight,
    RequestOnce,
    _digest,
    _Presented,
    clean_idempotency_keys,
)
from parley.core.ids import new_id
from parley.core.scope import Role, Scope
from parley.core.settings import load_settings
from parley.main import create_app
from tests.conftest import Account, http_client

API = "/api/v1"
ONCE = {"Idempotency-Key": "nightly-import-1"}
BODY = {"title": "Buy milk"}


async def tasks_of(admin: asyncpg.Connection) -> int:
    count: int = await admin.fetchval("SELECT count(*) FROM tasks")
    return count


async def create(account: Account, path: str = f"{API}/tasks", **options: Any) -> httpx.Response:
    """Create something with the key."""
    return await account.http.post(path, **{"json": BODY, "headers": ONCE, **options})


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["error"]) == (status, code), answer.text
    details: dict[str, Any] = answer.json()["details"]
    return details


def paths_of(account: Account) -> list[str]:
    """Return the paths of what a title alone creates."""
    return [f"{API}/tasks", f"/api/{account.user_id}/tasks", f"{API}/conversations"]


# -- the same again ----------------------------------------------------------------------------------------------------


async def test_the_first_answer_comes_again(alice: Account, admin: asyncpg.Connection) -> None:
    for path in paths_of(alice):
        first = await create(alice, path)
        again = await create(alice, path)

        assert first.status_code == 201
        assert "idempotent-replayed" not in first.headers
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert again.headers["location"] == first.headers["location"]
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert await tasks_of(admin) == 2
    assert await admin.fetchval("SELECT count(*) FROM conversations") == 1


async def test_without_a_key_each_request_has_its_effect(alice: Account, admin: asyncpg.Connection) -> None:
    for _ in range(2):
        assert (await create(alice, headers={})).status_code == 201

    assert await tasks_of(admin) == 2
    assert await admin.fetchval("SELECT count(*) FROM idempotency_keys") == 0


async def test_another_body_is_refused(alice: Account, admin: asyncpg.Connection) -> None:
    await create(alice)

    other = await create(alice, json={"title": "Buy tea"})
    invalid = await create(alice, json={"title": ""})
    query = await create(alice, f"{API}/tasks?x=1")

    for answer in (other, invalid, query):
        assert refused(answer, 422, "idempotency_key_reused")["field"] == "Idempotency-Key"
    assert await tasks_of(admin) == 1


async def test_failures_are_not_kept(alice: Account, admin: asyncpg.Connection) -> None:
    refused(await create(alice, json={"title": ""}), 422, "validation_error")
    await admin.execute("ALTER TABLE channel_events RENAME TO elsewhere")
    refused(await create(alice), 500, "internal")
    await admin.execute("ALTER TABLE elsewhere RENAME TO channel_events")

    assert (await create(alice)).status_code == 201
    assert await tasks_of(admin) == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "caf\xe9", "tab\tbed"])
async def test_a_key_that_is_none_is_refused(alice: Account, admin: asyncpg.Connection, key: str) -> None:
    answer = await create(alice, headers={"Idempotency-Key": key.encode("latin-1")})

    assert refused(answer, 422, "validation_error")["field"] == "Idempotency-Key"
    assert await tasks_of(admin) == 0


async def test_two_keys_are_refused(alice: Account, admin: asyncpg.Connection) -> None:
    answer = await create(alice, headers=[("Idempotency-Key", "one"), ("Idempotency-Key", "two")])

    assert refused(answer, 422, "validation_error") == {"field": "Idempotency-Key", "constraint": "single"}
    assert await tasks_of(admin) == 0


async def test_the_key_itself_is_not_stored(alice: Account, admin: asyncpg.Connection) -> None:
    await create(alice)

    (row,) = await admin.fetch("SELECT to_jsonb(k)::text AS text, hash FROM idempotency_keys k")
    assert ONCE["Idempotency-Key"] not in row["text"]
    assert ONCE["Idempotency-Key"].encode().hex() not in row["text"]
    assert len(row["hash"]) == 32


# -- whose it is -------------------------------------------------------------------------------------------------------


async def test_each_user_and_each_path_has_keys_of_its_own(
    alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    answers = [await create(account, path) for account in (alice, bob) for path in paths_of(account)]

    assert {answer.status_code for answer in answers} == {201}
    assert not any("idempotent-replayed" in answer.headers for answer in answers)
    assert await tasks_of(admin) == 4


async def moved(alice: Account, admin: asyncpg.Connection, workspace_id: UUID) -> Account:
    """Give alice a place in a workspace and sign her in there."""
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'member') ON CONFLICT DO NOTHING",
        workspace_id,
        alice.user_id,
    )
    await admin.execute("UPDATE sessions SET workspace_id = $1 WHERE user_id = $2", workspace_id, alice.user_id)
    answer = await alice.http.post(f"{API}/auth/refresh", json={"refresh_token": alice.refresh_token})
    assert answer.json()["data"]["workspace"]["id"] == str(workspace_id)
    alice.http.headers["Authorization"] = f"Bearer {answer.json()['data']['access_token']}"
    return alice


async def test_each_workspace_has_keys_of_its_own(alice: Account, bob: Account, admin: asyncpg.Connection) -> None:
    await create(alice)
    there = await create(await moved(alice, admin, bob.workspace_id))

    assert there.status_code == 201
    assert "idempotent-replayed" not in there.headers
    rows = await admin.fetch("SELECT workspace_id FROM tasks ORDER BY id")
    assert [row["workspace_id"] for row in rows] == [alice.workspace_id, bob.workspace_id]


async def test_a_retry_may_come_after_signing_in_again(alice: Account, admin: asyncpg.Connection) -> None:
    first = await create(alice)
    answer = await alice.http.post(
        f"{API}/auth/signin", json={"email": alice.email, "password": "correct horse 1"}, headers={"Authorization": ""}
    )
    alice.http.headers["Authorization"] = f"Bearer {answer.json()['data']['access_token']}"

    assert (await create(alice)).content == first.content
    assert await tasks_of(admin) == 1


async def test_each_credential_has_keys_of_its_own(app: FastAPI, alice: Account, admin: asyncpg.Connection) -> None:
    made = [(await alice.http.post(f"{API}/api-keys", json={"name": name})).json()["data"]["key"] for name in "ab"]
    answers = [await create(alice)]
    for key in made:
        async with http_client(app, headers={"Authorization": f"Bearer {key}"}) as http:
            answers += [await http.post(f"{API}/tasks", json=BODY, headers=ONCE) for _ in range(2)]

    assert len({answer.content for answer in answers}) == 3
    assert await tasks_of(admin) == 3


# -- at once -----------------------------------------------------------------------------------------------------------


async def test_of_twenty_at_once_one_has_an_effect(alice: Account, admin: asyncpg.Connection) -> None:
    answers = await asyncio.gather(*(create(alice) for _ in range(20)))

    created = {answer.content for answer in answers if answer.status_code == 201}
    assert len(created) == 1
    for answer in answers:
        if answer.status_code != 201:
            refused(answer, 409, "request_in_flight")
            assert int(answer.headers["retry-after"]) > 0
    assert (await create(alice)).content in created
    assert await tasks_of(admin) == 1


async def test_while_the_first_is_answered_the_second_is_told_to_wait(
    alice: Account, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, keep = asyncio.Event(), asyncio.Event(), Once.keep

    async def waiting(once: Once, response: Response, **options: Any) -> Response:
        begun.set()
        await goes_on.wait()
        return await keep(once, response, **options)

    monkeypatch.setattr(Once, "keep", waiting)
    first = asyncio.create_task(create(alice))
    await begun.wait()
    second = await create(alice)
    goes_on.set()

    assert (await first).status_code == 201
    refused(second, 409, "request_in_flight")
    assert second.headers["retry-after"] == "1"
    assert (await create(alice)).content == (await first).content
    assert await tasks_of(admin) == 1


async def test_one_that_saw_no_first_answer_takes_its_effect_back(
    alice: Account, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock may become free between the look-up's snapshot and its try."""
    await create(alice)

    async def blind(once: Once, unit: db.UnitOfWork) -> None:
        once._unit = unit

    with monkeypatch.context() as patch:
        patch.setattr(Once, "begin", blind)
        refused(await create(alice), 409, "request_in_flight")

    assert await tasks_of(admin) == 1


# -- what goes wrong on the way ----------------------------------------------------------------------------------------


class LostAnswers(httpx.AsyncBaseTransport):
    """Takes every request to the application, and loses what comes back."""

    def __init__(self, app: FastAPI) -> None:
        self._transport = httpx.ASGITransport(app=app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._transport.handle_async_request(request)
        assert answer.status_code == 201
        raise httpx.ReadError("cut off", request=request)


async def test_an_answer_that_was_lost_comes_with_the_retry(
    app: FastAPI, alice: Account, admin: asyncpg.Connection
) -> None:
    async with httpx.AsyncClient(
        transport=LostAnswers(app), base_url="http://parley.test", headers=alice.http.headers
    ) as http:
        with pytest.raises(httpx.ReadError):
            await http.post(f"{API}/tasks", json=BODY, headers=ONCE)

    again = await create(alice)

    assert again.status_code == 201
    assert again.json()["data"]["id"] == str(await admin.fetchval("SELECT id FROM tasks"))
    assert again.headers["idempotent-replayed"] == "true"


Cut = Callable[[AsyncSession, asyncpg.Connection, Callable[[], Awaitable[None]]], Awaitable[None]]


async def before_it_counts(
    session: AsyncSession, admin: asyncpg.Connection, commit: Callable[[], Awaitable[None]]
) -> None:
    """End the connection on the server, then commit."""
    raw: Any = await (await session.connection()).get_raw_connection()
    await admin.execute("SELECT pg_terminate_backend($1, 5000)", raw.driver_connection.get_server_pid())
    await commit()


async def after_it_counts(
    _session: AsyncSession, _admin: asyncpg.Connection, commit: Callable[[], Awaitable[None]]
) -> None:
    """Commit, and lose the connection before the server's word arrives."""
    await commit()
    raise ConnectionResetError


@pytest.mark.parametrize(("cut", "replayed"), [(before_it_counts, False), (after_it_counts, True)])
async def test_after_a_commit_of_unknown_outcome_a_retry_makes_it_one_effect(
    alice: Account, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, cut: Cut, *, replayed: bool
) -> None:
    commit = AsyncSession.commit

    async def cut_off(session: AsyncSession) -> None:
        async def real() -> None:
            await commit(session)

        await (cut(session, admin, real) if session.info.get("scope") else real())

    with monkeypatch.context() as patch:
        patch.setattr(AsyncSession, "commit", cut_off)
        unknown = await create(alice)
    retried = await create(alice)

    refused(unknown, 503, "outcome_unknown")
    assert retried.status_code == 201
    assert ("idempotent-replayed" in retried.headers) is replayed
    assert await tasks_of(admin) == 1
    assert retried.json()["data"]["id"] == str(await admin.fetchval("SELECT id FROM tasks"))


# -- how long ----------------------------------------------------------------------------------------------------------


async def renewed(account: Account) -> Account:
    answer = await account.http.post(f"{API}/auth/refresh", json={"refresh_token": account.refresh_token})
    account.http.headers["Authorization"] = f"Bearer {answer.json()['data']['access_token']}"
    return account


async def test_a_key_is_kept_for_a_day(alice: Account, bob: Account, admin: asyncpg.Connection) -> None:
    day = KEPT_FOR.total_seconds()
    firsts = [await create(account) for account in (alice, bob)]
    with clock.shifted(day - 60):
        again = await create(await renewed(alice))
    with clock.shifted(day + 60):
        later = await create(await renewed(bob))
        later_again = await create(bob)

    assert (again.content, again.headers["idempotent-replayed"]) == (firsts[0].content, "true")
    assert "idempotent-replayed" not in later.headers
    assert (later_again.content, later_again.headers["idempotent-replayed"]) == (later.content, "true")
    assert await tasks_of(admin) == 3


# -- units of a service's own, without an application: its hourly job would clean too ---------------------------------


@pytest.fixture
async def scope(admin: asyncpg.Connection) -> Scope:
    workspace_id = new_id()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'A workspace', true)", workspace_id)
    return Scope(workspace_id, new_id(), Role.OWNER)


def presented(scope: Scope, body: bytes = b"{}", key: bytes = b"a key") -> Once:
    hashed = _digest(scope.workspace_id.bytes, scope.user_id.bytes, key)
    return Once(_Presented(scope.workspace_id, scope.user_id, hashed, _digest(body)))


async def test_what_has_expired_is_cleaned_a_bounded_number_at_a_time(
    database: Database, scope: Scope, admin: asyncpg.Connection
) -> None:
    for number in range(3):
        await answer_in_system_unit(database, presented(scope, key=b"key-%d" % number), b"first")
    with clock.shifted(KEPT_FOR.total_seconds() - 60):
        assert await clean_idempotency_keys(database, 2) == 0
    with clock.shifted(KEPT_FOR.total_seconds() + 60):
        # One of them is used again, and is a new one.
        await answer_in_system_unit(database, presented(scope, key=b"key-0"), b"second")
        removed = [await clean_idempotency_keys(database, 1) for _ in range(3)]

    assert removed == [1, 1, 0]
    assert [bytes(row["body"]) for row in await admin.fetch("SELECT body FROM idempotency_keys")] == [b"second"]


async def answer_in_system_unit(database: Database, once: Once, text: bytes) -> Response:
    async with database.system_unit_of_work() as unit:
        await once.begin(unit)
        return await once.keep(Response(text, status_code=201))


async def test_a_service_keeps_answers_in_a_unit_of_the_system(database: Database, scope: Scope) -> None:
    await answer_in_system_unit(database, presented(scope), b"first")

    with pytest.raises(Replay) as replay:
        await answer_in_system_unit(database, presented(scope), b"second")
    with pytest.raises(IdempotencyKeyReused):
        await answer_in_system_unit(database, presented(scope, b"other"), b"third")
    assert (replay.value.response.status_code, replay.value.response.body) == (201, b"first")


async def settle(database: Database, once: Once, result: bytes) -> Response:
    async with database.system_unit_of_work() as unit:
        await once.begin(unit)
        await once.settle(result)
    return once.response


async def test_a_service_settles_results_and_the_route_says_how_they_are_answered(
    database: Database, scope: Scope
) -> None:
    def make(result: bytes) -> Response:
        return Response(result, status_code=202)

    first = await settle(database, presented(scope).answering(make), b"first")
    with pytest.raises(Replay) as replay:
        await settle(database, presented(scope).answering(make), b"second")
    keyless = await settle(database, Once().answering(make), b"third")

    assert [answer.body for answer in (first, replay.value.response, keyless)] == [b"first", b"first", b"third"]
    with pytest.raises(RuntimeError):
        await settle(database, Once(), b"nobody says how")


async def answer_while_another_does(database: Database, scope: Scope) -> None:
    async with database.unit_of_work(scope) as unit:
        await presented(scope).begin(unit)
        await answer_in_system_unit(database, presented(scope), b"second")


async def test_units_of_both_roles_hold_one_lock(database: Database, scope: Scope) -> None:
    with pytest.raises(RequestInFlight):
        await answer_while_another_does(database, scope)


async def test_an_answer_before_the_beginning_is_a_fault_of_ours(scope: Scope) -> None:
    with pytest.raises(RuntimeError):
        await presented(scope).keep(Response())


async def test_parts_of_a_digest_do_not_run_together() -> None:
    assert _digest(b"ab", b"c") != _digest(b"a", b"bc")


# -- every route -------------------------------------------------------------------------------------------------------

# POSTs that take no key, by the beginning of their paths, and why.
NO_KEY = {
    "/api/v1/auth/": "before there is a scope, or with a token that is its own key",
    "/api/v1/realtime/tickets": "a ticket is good once, and is not to be given out again",
    "/api/v1/replies/{reply_id}/cancel": "the same twice",
    "/api/v1/tool-calls/{call_id}/approve": "the same twice; the other answer is refused",
    "/api/v1/invitations/accept": "the token is its own key",
    "/api/v1/webhooks/clerk": "messages carry an id of their own",
}


def without_key(document: dict[str, Any]) -> set[str]:
    """Return the paths of POSTs that do not declare the header and are not on the list."""
    return {
        path
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method == "post"
        and not path.startswith(tuple(NO_KEY))
        and not any(
            parameter["in"] == "header" and parameter["name"].lower() == "idempotency-key"
            for parameter in operation.get("parameters", ())
        )
    }


@pytest.fixture
def whole(tmp_path: Path) -> FastAPI:
    """The application as it is served, not started."""
    return create_app(load_settings(tmp_path, env="testing"))


def test_every_post_takes_a_key_or_is_on_the_list(whole: FastAPI) -> None:
    assert without_key(whole.openapi()) == set()


def test_a_post_without_a_key_is_noticed(whole: FastAPI) -> None:
    router = APIRouter()

    @router.post("/things")
    async def create_thing() -> UUID:
        return new_id()

    @router.post("/others")
    async def create_other(once: RequestOnce) -> Response:
        return await once.keep(Response())

    whole.include_router(router)
    whole.openapi_schema = None

    assert without_key(whole.openapi()) == {"/things"}
