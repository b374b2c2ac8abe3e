"""What callers hear when something fails on our side: an envelope or a frame, never a trace, and the log has it once."""

import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from parley.chat.service import ConversationService
from parley.core import errors
from parley.core.db import Database, DatabaseUrls
from parley.core.error_handlers import CATEGORIES, category, describe, translate
from parley.core.settings import DatabaseSettings
from tests.conftest import Account
from tests.core.test_hostile_http import filled, operations
from tests.realtime.conftest import ERR_CODES, LiveServer, Serve, conversation_of, serve_with

__all__ = ["serve_with"]

CANARY = "canary-71ce"


def assert_server_fault(answer: httpx.Response, status: int, code: str) -> None:
    """Fail unless this is a fault of ours as the contract writes it."""
    assert answer.status_code == status, answer.text[:500]
    body = answer.json()
    assert set(body) == {"data", "meta", "error", "message", "details", "errors"}
    assert (body["data"], body["error"]) == (None, code)
    assert body["errors"] == [{"error": code, "message": body["message"], "details": body["details"]}]
    assert body["meta"]["request_id"] == answer.headers["x-request-id"]
    for word in ("Traceback", "File ", "asyncpg", "sqlalchemy", "SELECT", "INSERT", "psycopg", CANARY, "postgresql"):
        assert word not in answer.text


async def test_an_unforeseen_error_is_500_without_a_trace_and_logged_once(
    alice: Account, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{CANARY} SELECT * FROM users")

    monkeypatch.setattr(ConversationService, "page", fail)
    monkeypatch.setattr(ConversationService, "start", fail)
    for method in ("GET", "POST"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            answer = await alice.http.request(
                method, "/api/v1/conversations", json={} if method == "POST" else None,
                headers={"Origin": "http://localhost:5173"},
            )  # fmt: skip
        assert_server_fault(answer, 500, "internal")
        assert answer.headers["access-control-allow-origin"] == "http://localhost:5173", (
            "a page must be able to read it"
        )
        logged = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert [record.getMessage() for record in logged] == ["unexpected error"]
        assert logged[0].exc_info is not None
    assert (await alice.http.get("/api/v1/me")).status_code == 200


async def test_an_error_after_the_answer_began_is_logged_and_cuts_the_answer(
    serve_with: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parley.realtime.cursor import Cursor

    async with serve_with() as server, server.sign_up() as account:

        async def fail(*_: object, **__: object) -> None:
            raise RuntimeError(CANARY)

        async with account.http.stream("GET", "/api/v1/channels/user:me/events") as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            await anext(lines)
            with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
                patch.setattr(Cursor, "read", fail)
                await conversation_of(account)
                with pytest.raises(httpx.RemoteProtocolError):
                    async for line in lines:
                        assert CANARY not in line
        assert (await account.http.get("/api/v1/me")).status_code == 200


async def test_an_unforeseen_error_in_a_frame_is_that_frames(
    serve_with: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:

        async def fail(*_: object, **__: object) -> None:
            raise RuntimeError(f"{CANARY} SELECT")

        monkeypatch.setattr(server.realtime.channels, "authorise", fail)
        with caplog.at_level(logging.WARNING):
            answer = await peer.ask("sub", ch="tasks")
        assert (answer["t"], answer["code"], answer["retry"], answer["ch"]) == ("err", "internal", "backoff", "tasks")
        assert CANARY not in answer["msg"]
        assert len(caplog.records) == 1
        monkeypatch.undo()
        assert (await peer.sub("tasks"))["t"] == "subbed"


# -- the database is away ------------------------------------------------------------------------------------------


def dead(kind: str, directory: Path) -> DatabaseUrls:
    """Return addresses that nobody answers at."""
    if kind == "tcp":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            where = f"postgresql://u:{CANARY}@127.0.0.1:{unused.getsockname()[1]}/x"
    else:
        where = f"postgresql://u:{CANARY}@/x?host={directory}&port=5432"
    return DatabaseUrls(app=where, system=where, owner=where, direct=where)


_REQUIRED = {"/api/v1/search": {"q": "sky"}, "/api/v1/attachments": {"name": "a.txt"}}


@contextmanager
def outage(database: Database, urls: DatabaseUrls) -> Iterator[None]:
    """Take the database away for the length of the block."""
    away = Database(urls, DatabaseSettings(connect_timeout_s=1))
    held = database.app, database.system
    database.app, database.system = away.app, away.system
    try:
        yield
    finally:
        database.app, database.system = held


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_without_the_database_every_route_is_503_with_retry_after(
    app: FastAPI, alice: Account, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tried = 0
    conversation = (await alice.http.post("/api/v1/conversations", json={})).json()["data"]["id"]
    components = app.openapi()["components"]["schemas"]
    with outage(app.state.database, dead(kind, tmp_path)), caplog.at_level(logging.WARNING):
        for method, path, operation in operations(app):
            # Three answer from memory. The last ones refuse what the examples have before they ask.
            if path.startswith("/health/live") or path.endswith(
                ("/models", "/providers", "/prompts", "/signout", "/refresh", "/accept", "/clerk")
            ):
                continue
            sent: dict[str, Any] = {}
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]
                if "application/json" in content and "$ref" in content["application/json"]["schema"]:
                    name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                    sent["json"] = next(iter(components[name].get("examples", [{}])))
                else:
                    sent["content"] = b"[]"
            known = path.replace("{conversation_id}", conversation).replace("{provider}", "openai")
            url = filled(known, alice)
            answer = await alice.http.request(method, url, params=_REQUIRED.get(path), **sent)
            assert answer.status_code == 503, (method, path, answer.text[:300])
            assert int(answer.headers["retry-after"]) >= 1
            if path.startswith("/health/ready"):
                continue
            assert_server_fault(answer, 503, "unavailable")
            tried += 1
    assert tried > 15
    assert CANARY not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    # And it is over when it is over.
    assert (await alice.http.get("/api/v1/conversations")).status_code == 200


async def test_without_the_database_liveness_holds_and_readiness_does_not(
    app: FastAPI, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    with outage(app.state.database, dead("tcp", tmp_path)):
        assert (await client.get("/health/live")).status_code == 200
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert answer.json()["data"]["status"] == "not_ready"
        assert CANARY not in answer.text
    assert (await client.get("/health/ready")).status_code == 200


@pytest.fixture
async def server(serve_with: Serve) -> AsyncIterator[LiveServer]:
    """A real server."""
    async with serve_with() as made:
        yield made


async def test_without_the_database_frames_are_unavailable_and_the_socket_stays(
    serve_with: Serve, tmp_path: Path
) -> None:
    async with serve_with() as server, server.sign_up() as account, server.sign_up() as late:
        channel = await conversation_of(account)
        async with server.join(account) as peer:
            await peer.sub(channel)
            with outage(server.app.state.database, dead("tcp", tmp_path)):
                for t, fields in (
                    ("sub", {"ch": "tasks"}), ("reply.cancel", {"reply": str(uuid4())}),
                    ("chat.send", {"ch": channel, "cid": str(uuid4()), "parts": [{"type": "text", "text": "x"}]}),
                ):  # fmt: skip
                    answer = await peer.ask(t, **fields)
                    assert (answer["t"], answer["code"], answer["retry"]) == ("err", "unavailable", "backoff"), answer
                    assert answer["retry_after_ms"] > 0
                async with server.open() as other:
                    server.app.state.authenticator._kinds[-1]._standings.forget_all()
                    await other.send("hello", v=1, auth={"token": late.access_token})
                    answer = await other.read()
                    assert (answer["code"], answer["retry"]) == ("unavailable", "backoff")
                    assert await other.code() == 1013
            sent = await peer.say(channel, "hello")
            await peer.event("reply.completed", reply=sent["reply"])


# -- the table -----------------------------------------------------------------------------------------------------


def every_error(kind: type[errors.AppError] = errors.AppError) -> Iterator[type[errors.AppError]]:
    """Yield every kind of error that is declared anywhere."""
    yield kind
    for inner in kind.__subclasses__():
        yield from every_error(inner)


def test_every_declared_error_has_a_status_and_a_code_of_the_protocol() -> None:
    import parley.main  # noqa: F401 - declares them all

    kinds = set(every_error())
    assert len(kinds) > 30
    for kind in kinds:
        if not kind.__module__.startswith("parley."):
            continue
        status, code, retry = next(CATEGORIES[k] for k in kind.__mro__ if k in CATEGORIES)
        assert 400 <= status < 600
        assert (kind.frame_code or code) in ERR_CODES, kind
        assert retry in {"never", "now", "backoff"}
        assert kind.code.islower()
        assert kind.message.endswith(".") or " " in kind.message


def test_what_a_category_means() -> None:
    found = {kind.__name__: category(kind())[0] for kind in CATEGORIES}
    assert found == {
        "BadRequest": 400, "Unauthenticated": 401, "Forbidden": 403, "NotFound": 404, "Conflict": 409, "TooLarge": 413,
        "Invalid": 422, "RateLimited": 429, "ProviderFailed": 502, "Unavailable": 503, "AppError": 500,
    }  # fmt: skip
    assert category(errors.OutcomeUnknown())[0] == 503
    assert describe(errors.NotFound()) == {"error": "not_found", "message": "Not found.", "details": {}}


TRANSIENT = [
    asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError,
    asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.CannotConnectNowError, asyncpg.TooManyConnectionsError,
    asyncpg.ConnectionDoesNotExistError,
]  # fmt: skip


@pytest.mark.parametrize("kind", TRANSIENT, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_may_go_better_the_next_time_is_unavailable(kind: type[asyncpg.PostgresError], wrapped: bool) -> None:
    """Whether it came through SQLAlchemy or from the driver itself, which the chat's own SQL uses."""
    error: Exception = kind(CANARY)
    if wrapped:
        error = DBAPIError("SELECT 1", {}, kind(CANARY))
    known = translate(error)
    assert isinstance(known, errors.Unavailable)
    assert known.retry_after_s
    assert CANARY not in known.detail


@pytest.mark.parametrize(
    "kind",
    [asyncpg.CharacterNotInRepertoireError, asyncpg.NumericValueOutOfRangeError, asyncpg.UntranslatableCharacterError,
     asyncpg.StringDataRightTruncationError],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_value_that_no_column_holds_is_invalid(kind: type[asyncpg.PostgresError], wrapped: bool) -> None:
    error: Exception = DBAPIError("SELECT 1", {}, kind(CANARY)) if wrapped else kind(CANARY)
    known = translate(error)
    assert isinstance(known, errors.Invalid)
    assert CANARY not in known.detail


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), asyncpg.UndefinedTableError("x"), RuntimeError("x")])
def test_a_fault_of_ours_is_not_taken_for_anything_else(error: Exception) -> None:
    assert translate(error) is None


def test_a_full_pool_is_unavailable() -> None:
    assert isinstance(translate(PoolTimeout()), errors.Unavailable)
