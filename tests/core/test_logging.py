"""Logs: one JSON object per line whatever is in it, and no secret whatever happens (O-01, O-02)."""

import base64
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from websockets.exceptions import InvalidStatus

from parley.core.logging import (
    ConsoleFormatter,
    JsonFormatter,
    bind_log_context,
    configure_logging,
    current_request_id,
    log_context,
    mask,
)
from parley.core.settings import LogSettings, Settings, load_settings
from tests.conftest import Account, TestDatabases
from tests.core.test_hostile_http import filled, operations
from tests.realtime.conftest import LiveServer, Serve, conversation_of, serve_with

__all__ = ["serve_with"]

# What ends a line, moves a cursor, colours a terminal or turns text around.
HOSTILE = [
    "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1b[31m", "\x1b]0;x\x07", "\x9b31m", "\x85", "\u2028", "\u2029", "\x00", "\x7f",
    "\x08", "\u202e", "\ud83d", '"', "\\", '","level":"FAKE',
]  # fmt: skip
FORGED = '{"level": "CRITICAL", "message": "forged"}'


class Odd(Exception):
    """An error whose text a stranger wrote."""


def record_of(text: str) -> logging.LogRecord:
    """Return a record that has the text everywhere."""
    try:
        raise Odd(text)
    except Odd:
        record = logging.LogRecord(
            f"parley.{text}", logging.ERROR, __file__, 1, f"before{text}after %s", (text,), sys.exc_info()
        )
    record.__dict__.update({"path": text, "user_agent": [text, {text: text}], f"key{text}": text, "nothing": None})
    return record


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_line_is_one_json_object_whatever_is_in_it(text: str) -> None:
    with log_context(request_id=text):
        line = JsonFormatter().format(record_of(f"a{text}{FORGED}"))
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    found = json.loads(line)
    assert found["level"] == "ERROR"
    assert found["message"].startswith("before")
    assert found["path"] == f"a{text}{FORGED}"
    assert "Odd" in found["exception"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_the_console_shows_control_characters_and_obeys_none(text: str) -> None:
    record = record_of(text)
    record.exc_info = None
    shown = ConsoleFormatter().format(record)
    assert len(shown.splitlines()) == 1
    assert shown.isprintable()


@pytest.mark.parametrize("text", [t for t in HOSTILE if t != "\n"], ids=ascii)
def test_the_console_obeys_nothing_in_an_exception_either(text: str) -> None:
    shown = ConsoleFormatter().format(record_of(text))
    # The lines of a trace are lines; what stands in them is shown.
    assert all(line.isprintable() for line in shown.split("\n")), ascii(shown)


def test_what_cannot_be_written_does_not_stop_the_writer() -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise ValueError

        __repr__ = __str__

    record = logging.LogRecord("parley.x", logging.INFO, __file__, 1, "number %d", (5,), None)
    record.__dict__["count"] = 5
    record.__dict__["when"] = {1: {2: b"\xff"}}
    assert json.loads(JsonFormatter().format(record))["count"] == 5


def test_context_is_of_the_block_that_bound_it() -> None:
    assert current_request_id() == ""
    with log_context(request_id="one", reply_id="r"):
        assert current_request_id() == "one"
        with log_context(request_id="two"):
            bind_log_context(user_id="u")
            line = json.loads(JsonFormatter().format(record_of("x")))
            assert (line["request_id"], line["reply_id"], line["user_id"]) == ("two", "r", "u")
        assert current_request_id() == "one"
    assert current_request_id() == ""


# -- masking -------------------------------------------------------------------------------------------------------

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlLWNhbmFyeQ"
SECRET_TEXTS = [
    JWT, "sk-canary0123456789", "sk-ant-api03-canary_x-0123456789", "parley_rt_canaryAAAAAAAA", "parley_sk_canaryAAAAAAAA",
    "tk_canaryAAAAAAAAAAAA==", "Bearer canary.opaque/token+x", "bearer   canaryopaquetoken", "Authorization: Basic Y2FuYXJ5OmNhbmFyeQ==",
    "postgresql://parley_app:canary-password@db:5432/parley", "redis://:canary-password@cache:6379/0",
    "https://user:canary-password@example.com/x", "?token=canary-token-x&x=1", "password=canary-pass-x", "api_key=canary-key-x",
    '{"password": "canary-pass-x"}', "'refresh_token': 'canary-token-x'", "Cookie: parley_rt=canary-cookie; x=1",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_what_looks_like_a_secret_is_masked(text: str) -> None:
    assert "canary" not in mask(text)
    assert "Y2FuYXJ5" not in mask(text)
    record = logging.LogRecord("parley.x", logging.INFO, __file__, 1, "%s", (text,), None)
    record.__dict__["detail"] = {"inner": [text]}
    for formatter in (JsonFormatter(), ConsoleFormatter()):
        shown = formatter.format(record)
        assert "canary" not in shown
        assert "Y2FuYXJ5" not in shown


@pytest.mark.parametrize(
    "key",
    ["password", "passwd", "new_password", "confirmPassword", "secret", "client_secret", "SECRET_KEY", "token", "access_token",
     "refresh_token", "Authorization", "cookie", "Set-Cookie", "api_key", "apiKey", "api-key", "x-api-key", "ticket", "credentials"],
)  # fmt: skip
def test_what_is_called_a_secret_is_masked(key: str) -> None:
    record = logging.LogRecord("parley.x", logging.INFO, __file__, 1, "x", (), None)
    record.__dict__[key] = "plain-canary"
    record.__dict__["headers"] = {key: "plain-canary", "deep": [{key: ["plain-canary"]}]}
    for formatter in (JsonFormatter(), ConsoleFormatter()):
        assert "plain-canary" not in formatter.format(record)


def test_addresses_are_masked_in_part_and_counts_not_at_all() -> None:
    record = logging.LogRecord(
        "parley.x", logging.INFO, __file__, 1, "of %s", ("ada.lovelace+x@mail.example.com",), None
    )
    record.__dict__.update({"input_tokens": 5, "output_tokens": 7, "cached_tokens": 0})
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "of a***@mail.example.com"
    assert (line["input_tokens"], line["output_tokens"], line["cached_tokens"]) == (5, 7, 0)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_000,
        "eyJ" + "a." * 15_000,
        "eyJaaaaaaaa." * 5000,
        "a@" * 30_000,
        "bearer " * 9000,
        "a." * 30_000,
        "a-" * 30_000,
    ],
)
def test_masking_is_quick_on_what_is_made_to_be_slow(text: str) -> None:
    began = time.process_time()
    mask(text)
    assert time.process_time() - began < 0.1


# -- where lines go ------------------------------------------------------------------------------------------------


@contextmanager
def own_logging(settings: Settings, stream: io.StringIO) -> Iterator[None]:
    """Configure the process's logging for the length of the block, its console in a buffer."""
    root = logging.getLogger()
    # The peers of these tests log in this process too; `websockets.client` is no part of a server.
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "httpcore", "websockets.client")
    named = [logging.getLogger(name) for name in names]
    handlers, level = root.handlers[:], root.level
    levels = [logger.level for logger in named]
    for handler in handlers:
        root.removeHandler(handler)
    stderr, sys.stderr = sys.stderr, stream
    try:
        configure_logging(settings)
        logging.getLogger("websockets.client").setLevel(logging.WARNING)
        yield
    finally:
        sys.stderr = stderr
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
        for logger, before in zip(named, levels, strict=True):
            logger.setLevel(before)


def settings_of(directory: Path, **log: Any) -> Settings:
    """Return settings whose logs go below a directory."""
    return load_settings(directory, env="testing", data_dir=directory, log=LogSettings(**log))


def test_each_area_has_its_file_and_errors_stand_in_one_more(tmp_path: Path) -> None:
    stream = io.StringIO()
    with own_logging(settings_of(tmp_path, console="json"), stream):
        for name in ("parley.chat.turns", "parley.llm.retry", "parley.core.db", "uvicorn.error", "other"):
            logging.getLogger(name).error("of %s", name)
            logging.getLogger(name).info("also of %s", name)
    files = {path.name: path.read_text().splitlines() for path in (tmp_path / "logs").iterdir()}
    assert {name: [json.loads(line)["logger"] for line in lines] for name, lines in files.items()} == {
        "app.log": ["parley.core.db"] * 2 + ["uvicorn.error"] * 2 + ["other"] * 2,
        "chat.log": ["parley.chat.turns"] * 2,
        "llm.log": ["parley.llm.retry"] * 2,
        "errors.log": ["parley.chat.turns", "parley.llm.retry", "parley.core.db", "uvicorn.error", "other"],
    }
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0
    assert len(stream.getvalue().splitlines()) == 10
    assert all(json.loads(line)["at"].endswith("+00:00") for line in stream.getvalue().splitlines())


# -- canaries through the whole service ----------------------------------------------------------------------------


class Canaries:
    """Values that must never be seen in a log."""

    def __init__(self) -> None:
        self.planted: dict[str, str] = {}

    def plant(self, name: str, value: str) -> str:
        self.planted[name] = value
        return value

    def found_in(self, text: str) -> list[str]:
        return [name for name, value in self.planted.items() if value in text]


def test_the_search_finds_what_is_there() -> None:
    canaries = Canaries()
    canaries.plant("password", "x1")
    assert canaries.found_in("an x1 in the log") == ["password"]


async def speak(server: LiveServer, account: Account, canaries: Canaries) -> None:
    """Send secrets to every place that takes something, well and badly."""
    plant = canaries.plant
    plant("access token", account.access_token)
    plant("its signature", account.access_token.rsplit(".", 1)[1])
    plant("refresh token", account.refresh_token)
    password = plant("password", "canary-Passw0rd-71")
    message = plant("message text", "canary-message-text-71")
    title = plant("title", "canary-title-71")
    opaque = plant("opaque credential", "canary-opaque-71")
    basic = plant("basic credential", base64.b64encode(b"canary:canary-71").decode())
    async with httpx.AsyncClient(base_url=server.base) as client:
        email = plant("e-mail address", "canary.person.71@example.com")
        body = {"email": email, "password": password, "confirmPassword": password}
        data = (await client.post("/api/v1/auth/signup", json=body)).json()["data"]
        plant("second access token", data["access_token"])
        plant("second refresh token", data["refresh_token"])
        await client.post("/api/v1/auth/signin", json={"email": email, "password": password})
        await client.post("/api/v1/auth/signin", json={"email": email, "password": password + "x"})
        await client.post("/api/v1/auth/signin", json={"email": email, "password": [password]})
        await client.post("/api/v1/auth/signin", content=f'{{"password": "{password}"')
        rotated = await client.post("/api/v1/auth/refresh", json={"refresh_token": data["refresh_token"]})
        plant("third refresh token", rotated.json()["data"]["refresh_token"])
        await client.post("/api/v1/auth/refresh", json={"refresh_token": data["refresh_token"] + "x"})
        for value in (f"Bearer {opaque}", f"Basic {basic}", opaque, f"Bearer {account.access_token}x"):
            for name in ("Authorization", "X-Api-Key", "Cookie", "User-Agent", "X-Forwarded-For", "Origin", "Referer"):
                await client.get("/api/v1/me", headers={name: value})
        for name in ("token", "access_token", "api_key", "password", "ticket"):
            await client.get("/api/v1/me", params={name: opaque})
            await client.get("/nowhere", params={name: opaque})
            for query in (f"?{name}={opaque}", f"?x=1&{name}={account.access_token}"):
                async with server.open(query=query) as peer:
                    await peer.send("hello", v=1, auth={"token": opaque})
                    assert await peer.code() == 4401
    for method, path, operation in operations(server.app):
        if path.endswith(("/events", "/signout")):
            continue
        for content in ({"title": title, "text": message, "password": password, "zzz": opaque}, [opaque], opaque):
            if "requestBody" in operation:
                await account.http.request(method, filled(path, account), json=content)
    ticket = (await account.http.post("/api/v1/realtime/tickets")).json()["data"]["ticket"]
    plant("ticket", ticket)
    channel = await conversation_of(account, title=title)
    await account.http.post("/api/v1/tasks", json={"title": title, "description": message})
    async with server.open() as peer:
        await peer.send("hello", v=1, auth={"ticket": ticket})
        await peer.read()
        await peer.sub(channel)
        sent = await peer.say(channel, f"{message} " * 3)
        await peer.event("reply.completed", reply=sent["reply"])
        await peer.say(channel, f"add task {title} again")
        await peer.ask("auth", auth={"token": account.access_token})
        await peer.raw(f'{{"t": "{opaque}", "token": "{account.access_token}"')
        await peer.send("sub", id=1, ch=opaque)
        await peer.ask("auth", auth={"token": opaque})
        await peer.code()
    with pytest.raises(InvalidStatus):
        async with server.open(origin=f"https://{opaque}.example"):
            pass


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
async def test_no_canary_is_ever_logged(serve_with: Serve, tmp_path: Path, level: str) -> None:
    stream = io.StringIO()
    canaries = Canaries()
    with own_logging(settings_of(tmp_path, level=level, console="json"), stream):
        async with serve_with() as server, server.sign_up() as account:
            await speak(server, account, canaries)
    files = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert stream.getvalue()
    for text in (stream.getvalue(), files):
        for line in text.splitlines():
            assert isinstance(json.loads(line), dict)
        assert canaries.found_in(text) == [], [line[:400] for line in text.splitlines() if canaries.found_in(line)][:5]


async def test_a_statement_that_fails_is_logged_without_its_values(
    serve_with: Serve, tmp_path: Path, databases: TestDatabases
) -> None:
    """A database error carries the statement's parameters: password hashes, tokens, what people wrote."""
    stream = io.StringIO()
    canaries = Canaries()
    async with serve_with() as server, server.sign_up() as account:
        with own_logging(settings_of(tmp_path, level="INFO", console="json"), stream):
            title = canaries.plant("title", "canary-title-in-a-statement")
            name = canaries.plant("name", "canary-name-in-a-statement")
            email = canaries.plant("e-mail address", "canary.statement@example.com")
            canaries.plant("password hash", "$argon2id$")
            admin = await asyncpg.connect(databases.postgres.admin_url(server.urls.name))
            try:
                for table in ("tasks", "conversations", "credentials", "users"):
                    await admin.execute(
                        f"CREATE FUNCTION refuse_{table}() RETURNS trigger LANGUAGE plpgsql AS"
                        " $$BEGIN RAISE EXCEPTION 'refused by a trigger'; END$$"
                    )
                    await admin.execute(
                        f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_{table}()"
                    )
                    async with httpx.AsyncClient(base_url=server.base) as client:
                        answers = [
                            await account.http.post("/api/v1/tasks", json={"title": title}),
                            await account.http.post("/api/v1/conversations", json={"title": title}),
                            await account.http.patch("/api/v1/me", json={"name": name}),
                            await client.post(
                                "/api/v1/auth/signup",
                                json={"email": f"{uuid4().hex[:5]}{email}", "password": "correct horse 1",
                                      "confirmPassword": "correct horse 1", "name": name},
                            ),
                        ]  # fmt: skip
                    assert any(answer.status_code == 500 for answer in answers), table
                    for answer in answers:
                        assert "trigger" not in answer.text
                    await admin.execute(f"DROP TRIGGER refuse ON {table}")
            finally:
                await admin.close()
    assert "unexpected error" in stream.getvalue()
    assert canaries.found_in(stream.getvalue()) == [], stream.getvalue()[:3000]


async def test_a_hostile_request_is_one_line_each(serve_with: Serve, tmp_path: Path) -> None:
    stream = io.StringIO()
    with own_logging(settings_of(tmp_path, level="DEBUG", console="json"), stream):
        async with serve_with() as server:
            async with httpx.AsyncClient(base_url=server.base) as client:
                for raw in ("%0a", "%0d%0a%7b%7d", "%1b[31m", "%e2%80%a8", "%c2%85", "%00", "%ff"):
                    await client.get(f"/x{raw}y")
                    await client.get(
                        "/x",
                        headers=[
                            (b"User-Agent", b"a\xe2\x80\xa8b\x85\x9b31m"),
                            (b"X-Request-ID", b"abcdefgh\xe2\x80\xa8"),
                        ],
                    )
                    async with server.bytes() as (reader, writer):
                        writer.write(
                            f"GET /api/v1/realtime?x={raw} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
                            f"Sec-WebSocket-Protocol: parley.v1\r\nOrigin: http://evil{raw}\r\n\r\n".encode()
                        )
                        await reader.read(1000)
    text = stream.getvalue()
    assert "/x\\ny" in text, "the paths are in the log"
    for line in text.split("\n")[:-1]:
        assert line.isascii()
        assert line.isprintable()
        assert isinstance(json.loads(line), dict)
