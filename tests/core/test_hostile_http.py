"""What no honest client sends over HTTP: always the envelope, never a 500, never the value back."""

import asyncio
import json
import re
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parley.core.db import DatabaseUrls
from parley.core.settings import Environment, Settings
from tests.conftest import Account, TestDatabases, http_client, make_settings, running
from tests.held import held
from tests.realtime.conftest import LiveServer, Serve, serve_with

__all__ = ["serve_with"]

CANARY = "canary-5d02e7"
MAX_BODY = 1024 * 1024


def assert_envelope(answer: httpx.Response, *statuses: int, canary: str = CANARY) -> dict[str, Any]:
    """Fail unless this is a refusal as the contract writes it."""
    assert answer.status_code < 500, (answer.status_code, answer.text[:500])
    if statuses:
        assert answer.status_code in statuses, (answer.status_code, answer.text[:500])
    assert answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"
    assert canary not in answer.text
    assert "Traceback" not in answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) == {"data", "meta", "error", "message", "details", "errors"}, body
    assert body["data"] is None
    assert body["meta"] == {"request_id": answer.headers["x-request-id"]}
    assert body["errors"]
    first = body["errors"][0]
    assert {name: body[name] for name in ("error", "message", "details")} == first
    for item in body["errors"]:
        assert set(item) == {"error", "message", "details"}
        assert isinstance(item["error"], str)
        assert isinstance(item["message"], str)
        assert isinstance(item["details"], dict)
    if answer.status_code == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")
    return body


def operations(app: FastAPI, *, with_body: bool | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and operation of every documented route."""
    for path, item in app.openapi()["paths"].items():
        for method, operation in item.items():
            # Not those whose body is a file: tests/chat has what is hostile in one.
            has_body = "application/json" in operation.get("requestBody", {}).get("content", {})
            if with_body is None or with_body == has_body:
                yield method.upper(), path, operation


def filled(path: str, account: Account) -> str:
    """Return a path with ids that fit."""
    own = path.replace("{user_id}", str(account.user_id)).replace("{channel}", "user:me")
    own = own.replace("{workspace_id}", str(account.workspace_id))
    return re.sub(r"\{\w+\}", lambda _: str(uuid4()), own)


def hostile_bodies() -> dict[str, tuple[bytes, int]]:
    """Return bodies that no schema takes, and the status that each must have."""
    deep = b"[" * 100_000 + b"]" * 100_000
    return {
        "half an object": (b'{"title": "' + CANARY.encode(), 400),
        "nothing but a word": (CANARY.encode(), 400),
        "no UTF-8": (b'{"title": "\xff\xfe"}', 400),
        "UTF-16": (json.dumps({"unknown": CANARY}).encode("utf-16"), 0),
        "a NUL byte": (b'{"title": "\x00"}', 400),
        "100,000 deep": (deep, 400),
        "100,000 deep inside": (b'{"title": ' + deep + b"}", 400),
        "objects 50,000 deep": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        "a number of 5,000 digits": (b'{"title": ' + b"9" * 5000 + b"}", 400),
        "two values": (b"{} {}", 400),
        "NaN": (b'{"title": NaN}', 0),
        "Infinity": (b'{"zzz": -Infinity}', 0),
        "a list": (json.dumps([CANARY]).encode(), 422),
        "a string": (json.dumps(CANARY).encode(), 422),
        "a number": (b"5", 422),
        "null": (b"null", 0),
        "true": (b"true", 422),
        "a key that is half an emoji": (b'{"\\ud83d": 1}', 422),
        "a key with a NUL": (b'{"\\u0000": 1}', 422),
        "an unknown key": (json.dumps({"unknown": CANARY}).encode(), 422),
        "a huge key": (json.dumps({"k" * 100_000: CANARY}).encode(), 422),
        "10,000 unknown keys": (json.dumps({f"k{n}": CANARY for n in range(10_000)}).encode(), 422),
    }


@pytest.fixture(scope="module")
async def app(databases: TestDatabases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FastAPI]:
    """One application for all of this: nothing that is refused leaves anything behind."""
    urls = await databases.create()
    async with held(running(make_settings(tmp_path_factory.mktemp("app"), urls))) as application:
        yield application
    await databases.drop(urls)


@pytest.fixture(scope="module")
async def alice(app: FastAPI) -> AsyncIterator[Account]:
    """A user of it."""
    async with http_client(app) as client:
        body = {"email": "alice@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        data = (await client.post("/api/v1/auth/signup", json=body)).json()["data"]
        client.headers["Authorization"] = f"Bearer {data['access_token']}"
        yield Account(
            http=client,
            email="alice@example.com",
            user_id=UUID(data["user"]["id"]),
            workspace_id=UUID(data["workspace"]["id"]),
            access_token=data["access_token"],
            refresh_token=data["refresh_token"],
        )


Ask = Callable[..., Awaitable[httpx.Response]]
ENDS_SESSIONS = ("DELETE", "/api/v1/auth/sessions")


def sign_up_body() -> dict[str, str]:
    return {"email": f"{uuid4()}@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}


@pytest.fixture(scope="module")
async def ask(app: FastAPI, alice: Account) -> AsyncIterator[Ask]:
    """Send to a documented path: as Alice, and as nobody where nobody is asked for."""
    document = app.openapi()["paths"]
    async with http_client(app) as nobody:

        async def send(method: str, path: str, **options: Any) -> httpx.Response:
            asks = document.get(path, {}).get(method.lower(), {}).get("security") == [{"bearer": []}]
            # A sign-out takes a token too, and would end all the rest.
            client = alice.http if (asks and not path.endswith("/signout")) or "/auth/" not in path else nobody
            if (method, path) == ENDS_SESSIONS:
                # All the rest would be refused after it.
                own = await nobody.post("/api/v1/auth/signup", json=sign_up_body())
                headers = {
                    **options.pop("headers", {}),
                    "Authorization": f"Bearer {own.json()['data']['access_token']}",
                }
                return await nobody.request(method, path, headers=headers, **options)
            return await client.request(method, filled(path, alice), **options)

        yield send


@pytest.fixture(scope="module")
def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every route that takes a body."""
    return [(method, path) for method, path, _ in operations(app, with_body=True)]


async def test_there_are_routes_to_try(routes: list[tuple[str, str]]) -> None:
    assert len(routes) >= 12


@pytest.mark.parametrize("name", hostile_bodies())
async def test_a_hostile_body_is_refused_everywhere(
    alice: Account, routes: list[tuple[str, str]], name: str, ask: Ask
) -> None:
    body, status = hostile_bodies()[name]
    headers = {"Content-Type": "application/json"}
    for method, path in routes:
        answer = await ask(method, path, content=body, headers=headers)
        if status == 0:
            assert answer.status_code < 500, (method, path, answer.text[:500])
            assert CANARY not in answer.text, (method, path)
            continue
        # An absent row may be told before the body is looked at, but nothing else may.
        assert_envelope(answer, status, 404)
        assert len(answer.content) < 64 * 1024, (method, path, len(answer.content))


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "",
        "x" * 500,
    ],
)
async def test_another_content_type_is_refused(
    alice: Account, routes: list[tuple[str, str]], kind: str, ask: Ask
) -> None:
    for method, path in routes:
        if path.endswith("signout"):
            continue
        answer = await ask(method, path, content=f'{{"title":"{CANARY}"}}', headers={"Content-Type": kind})
        assert_envelope(answer, 400, 404, 415, 422)


async def test_a_text_is_measured_in_characters(alice: Account) -> None:
    made = await alice.http.post("/api/v1/conversations", json={})
    answer = await alice.http.post(
        f"/api/v1/conversations/{made.json()['data']['id']}/messages", json={"text": "x" * 32_001}
    )
    assert answer.json()["message"] == "text: String should have at most 32000 characters"


async def test_duplicate_keys_never_hurt(alice: Account) -> None:
    answer = await alice.http.post(
        "/api/v1/tasks", content=b'{"title":"a","title":"b"}', headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["data"]["title"]) == (201, "b")


ODD: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, "", " ", "\x00", "a\x00b", "\ud83d", "\udc00x",
    "\u2028", "\x1b[31m", "é" * 201, CANARY * 3000, "9" * 400, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
    "now", [], {}, [[]], [None] * 65, {"type": "text"}, [{"type": "text", "text": "\x00"}], [{"type": "\ud83d"}],
    [{"type": CANARY}], [{"type": {"a": CANARY}}],
]  # fmt: skip


async def test_every_field_of_every_body_takes_or_refuses_every_odd_value(
    app: FastAPI, alice: Account, ask: Ask
) -> None:
    components = app.openapi()["components"]["schemas"]
    conversation = (await alice.http.post("/api/v1/conversations", json={})).json()["data"]["id"]
    task = (await alice.http.post("/api/v1/tasks", json={"title": "x"})).json()["data"]["id"]
    tried = 0
    for method, path, operation in operations(app, with_body=True):
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        names = [item["$ref"].rsplit("/", 1)[1] for item in [schema, *schema.get("anyOf", [])] if "$ref" in item]
        example = next(iter(components[names[0]].get("examples", [{}])))
        if path.endswith("/signup"):
            # Hashing is slow on purpose: an odd password beside a mail address that is refused costs nothing.
            example = {**example, "email": "nobody"}
        url = filled(path.replace("{conversation_id}", conversation).replace("{task_id}", task), alice)
        for field in components[names[0]]["properties"]:
            for value in ODD:
                body = json.dumps({**example, field: value})
                answer = await ask(method, url, content=body, headers={"Content-Type": "application/json"})
                tried += 1
                where = (method, path, field, ascii(value)[:50], answer.text[:300])
                assert answer.status_code < 500 or (answer.status_code, field) == (503, "model"), where
                if answer.status_code >= 400:
                    assert CANARY not in answer.text, where
                    assert answer.json()["error"], where
                if value is not None and answer.status_code == 400:
                    raise AssertionError(("JSON that parses is not unparsable", where))
    assert tried > 500


_text = st.text(st.characters(exclude_categories=[]), max_size=30)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=10,
)
_names = st.sampled_from(
    ["title", "description", "completed", "due_at", "text", "parts", "model", "parent", "on_active", "assistant",
     "archived", "name", "refresh_token", "type", "id"]
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.dictionaries(_names | _text, _json, max_size=5) | _json, at=st.integers(min_value=0))
async def test_random_json_is_never_a_500(
    alice: Account, routes: list[tuple[str, str]], body: Any, at: int, ask: Ask
) -> None:
    slow = ("/auth/signup", "/auth/signin")
    able = [route for route in routes if not route[1].endswith(slow)]
    method, path = able[at % len(able)]
    answer = await ask(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, (method, path, answer.text[:500])
    if answer.status_code >= 400:
        assert_envelope(answer)


@pytest.mark.parametrize(
    "bad",
    ["x", "5", "%00", "%ff", "..%2f..", "%F0%9F%98%80", "null", "0" * 1000, "00000000-0000-0000-0000-00000000000g",
     "%0d%0aSet-Cookie:x", "'%20OR%201=1--", CANARY],
)  # fmt: skip
async def test_a_malformed_id_is_422_or_404(app: FastAPI, alice: Account, bad: str) -> None:
    for method, path, operation in operations(app):
        for parameter in operation.get("parameters", []):
            if parameter["in"] != "path":
                continue
            url = filled(path.replace(f"{{{parameter['name']}}}", bad), alice)
            body: dict[str, Any] | None = {"title": "x"} if "requestBody" in operation else None
            answer = await alice.http.request(method, url, json=body)
            # The path of another user is refused before anything in it is looked at.
            other_user = parameter["name"] == "user_id" and path.startswith("/api/{user_id}")
            assert_envelope(answer, 401 if other_user else 422, 404, 405)


@pytest.mark.parametrize("value", ["0", "-1", "x", "", "1e3", "9" * 40, "\x00", "%ff", "1.5", "NaN", CANARY])
async def test_a_malformed_query_is_422(app: FastAPI, alice: Account, value: str, ask: Ask) -> None:
    tried = 0
    for method, path, operation in operations(app):
        for parameter in operation.get("parameters", []):
            # A stream without a position is a good request; bad positions have a test of their own.
            if parameter["in"] != "query" or parameter["name"] == "since":
                continue
            tried += 1
            answer = await ask(method, path, params={parameter["name"]: value})
            if answer.status_code >= 400:
                assert_envelope(answer, 404, 422)
    assert tried >= 8


@pytest.mark.parametrize(
    "since", ["x", ":", "x:", "x:y", "x:-2", "x:1.5", "x:" + "9" * 60, "x:²", "x:٣", "x:--1", "x:+1", "x: 1", "x:1 "]
)
async def test_a_malformed_position_is_422_before_the_stream(alice: Account, since: str) -> None:
    answer = await alice.http.get("/api/v1/channels/user:me/events", params={"since": since})
    assert_envelope(answer, 422)


@pytest.mark.parametrize(
    "channel",
    ["x", "user:", "user:you", "user", "user:me:me", "tasks:", "tasks:x", "conversation:", "conversation:x",
     f"conversation:{uuid4()}", "a" * 201, "%00", "conversation:%00", "%F0%9F%98%80", ":", "exams:1"],
)  # fmt: skip
async def test_a_channel_that_is_not_there_is_404_before_the_stream(alice: Account, channel: str) -> None:
    assert_envelope(await alice.http.get(f"/api/v1/channels/{channel}/events"), 404)


FORGED = {
    "nothing": None,
    "no scheme": CANARY,
    "another scheme": f"Basic {CANARY}",
    "no token": "Bearer",
    "an empty token": "Bearer ",
    "a word": f"Bearer {CANARY}",
    "two dots": "Bearer a.b.c",
    "alg none": "Bearer eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0.eyJzdWIiOiJ4In0.",
    "very long": "Bearer " + "a" * 60_000,
    "not ASCII": "Bearer é.é.é",
    "a control character": "Bearer \x01",
}


@pytest.mark.parametrize("name", FORGED)
async def test_without_a_good_token_every_route_is_401(app: FastAPI, alice: Account, name: str) -> None:
    value = FORGED[name]
    headers = [(b"Authorization", value.encode("latin-1"))] if value is not None else []
    async with http_client(app) as client:
        for method, path, operation in operations(app):
            if "security" not in operation or path.endswith("/signout"):
                continue
            body: Any = {"title": "x"} if "requestBody" in operation else None
            answer = await client.request(method, filled(path, alice), json=body, headers=headers)
            assert_envelope(answer, 401)


async def test_a_changed_and_an_expired_token_are_401(app: FastAPI, alice: Account) -> None:
    from parley.core import clock

    head, claims, signature = alice.access_token.split(".")
    async with http_client(app) as client:
        for token in (
            f"{head}.{claims}.{signature[::-1]}", f"{head}.{claims[:-2]}xx.{signature}", f"{head}..{signature}",
            alice.access_token + "x", alice.access_token.upper(), alice.refresh_token,
        ):  # fmt: skip
            answer = await client.get("/api/v1/me", headers={"Authorization": f"Bearer {token}"})
            body = assert_envelope(answer, 401)
            assert body["error"] == "token_invalid"
            assert token not in answer.text
        with clock.shifted(15 * 60 + 1):
            answer = await client.get("/api/v1/me", headers={"Authorization": f"Bearer {alice.access_token}"})
            assert assert_envelope(answer, 401)["error"] == "token_expired"


async def test_unknown_paths_and_methods_have_the_envelope_too(app: FastAPI, alice: Account, ask: Ask) -> None:
    for path in ("/nowhere", f"/api/v1/{CANARY}", "/api/v1", "/api", "/v1/auth/x", "//", "/%00", "/%ff", "/api/v1/realtime",
                 "/docs/assets/../../x", "/docs/assets/%00", "/docs/assets/" + "a" * 5000, "/" + "a/" * 2000):  # fmt: skip
        for method in ("GET", "POST", "HEAD", "DELETE", "OPTIONS", "TRACE", "BREW", CANARY.upper()):
            answer = await alice.http.request(method, path)
            if answer.status_code >= 400 and method != "HEAD":
                assert_envelope(answer, 404, 405)
    seen = 0
    for _, path, _ in operations(app):
        for method in ("PUT", "TRACE", "HEAD", "BREW", "OPTIONS"):
            answer = await ask(method, path)
            if answer.status_code == 405:
                if method != "HEAD":
                    assert_envelope(answer, 405)
                assert answer.headers["allow"]
                seen += 1
    assert seen > 40


# -- large ---------------------------------------------------------------------------------------------------------


async def chunks(megabytes: int) -> AsyncIterator[bytes]:
    """Yield a body piece by piece."""
    for _ in range(megabytes * 16):
        yield b"x" * 64 * 1024


async def test_a_body_over_the_limit_is_413(alice: Account, routes: list[tuple[str, str]]) -> None:
    for method, path in routes:
        url = filled(path, alice)
        for content in (b'{"title":"' + b"x" * MAX_BODY + b'"}', chunks(2)):
            answer = await alice.http.request(
                method, url, content=content, headers={"Content-Type": "application/json"}
            )
            assert_envelope(answer, 413)
    fits = b'{"title":"x"' + b" " * (MAX_BODY - 13) + b"}"
    assert len(fits) == MAX_BODY
    answer = await alice.http.post("/api/v1/tasks", content=fits, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201
    answer = await alice.http.post("/api/v1/tasks", content=fits + b" ", headers={"Content-Type": "application/json"})
    assert_envelope(answer, 413)


def resident_bytes() -> int:
    """How much memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module")
async def live(serve_with: Serve) -> AsyncIterator[LiveServer]:
    """A real server, for what only bytes on a connection can show."""
    async with held(serve_with()) as server:
        yield server


@pytest.mark.parametrize("how", ["Content-Length: 62914560", "Transfer-Encoding: chunked"])
async def test_60_mb_are_refused_at_once_and_not_kept(live: LiveServer, how: str) -> None:
    before, began = resident_bytes(), time.monotonic()
    block = b"x" * 65536
    piece = b"10000\r\n" + block + b"\r\n" if "chunked" in how else block

    async def send(writer: asyncio.StreamWriter) -> None:
        for _ in range(960):
            writer.write(piece)
            await writer.drain()

    async with live.bytes() as (reader, writer):
        head = f"POST /api/v1/auth/signin HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{how}\r\n\r\n"
        writer.write(head.encode())
        sending = asyncio.create_task(send(writer))
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert time.monotonic() - began < 1
        assert answer.startswith(b"HTTP/1.1 413 "), answer
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert resident_bytes() - before < 16 * 1024 * 1024
    async with httpx.AsyncClient(base_url=live.base) as client:
        assert (await client.get("/health/live")).status_code == 200


RAW = {
    "a bare line feed in a header": b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-A: b\nc\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n",
    "two lengths": b"POST /api/v1/auth/signin HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a length and chunks": b"POST /api/v1/auth/signin HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a negative length": b"POST /api/v1/auth/signin HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "a length that is no number": b"POST /api/v1/auth/signin HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
    "a chunk of no size": b"POST /api/v1/auth/signin HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a NUL in the path": b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "an unknown method": b"BREW /api/v1/tasks HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
async def test_what_is_not_http_is_400_and_the_server_lives(live: LiveServer, name: str) -> None:
    async with live.bytes() as (reader, writer):
        writer.write(RAW[name])
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(65536), 5)
    status = answer.split(b" ", 2)[1] if answer else b""
    assert status in {b"", b"400", b"404", b"405"}, answer
    async with httpx.AsyncClient(base_url=live.base) as client:
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abcdefgh", True), ("A.b_c-0123456789", True), ("x" * 64, True), ("x" * 65, False), ("x" * 10_000, False),
        ("short", False), ("", False), ("a b c d e f", False), ("abc;defgh", False),
        ("éééééééé", False), ("abcdefgh%0a", False), ("<script>x", False),
    ],
)  # fmt: skip
async def test_a_request_id_is_kept_when_it_is_one(live: LiveServer, sent: str, kept: bool) -> None:
    async with httpx.AsyncClient(base_url=live.base) as client:
        answer = await client.get("/nowhere", headers=[(b"X-Request-ID", sent.encode("latin-1"))])
    found = answer.headers.get_list("x-request-id")
    assert len(found) == 1
    assert (found[0] == sent) == kept
    assert answer.json()["meta"]["request_id"] == found[0]


async def test_a_header_too_many_is_refused(live: LiveServer) -> None:
    answer = b""
    async with live.bytes() as (reader, writer):
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
        for _ in range(100):
            writer.write(b"X-A: " + b"x" * 60_000 + b"\r\n")
        writer.write(b"\r\n")
        with suppress(ConnectionError):
            answer = await asyncio.wait_for(reader.read(1000), 5)
    assert answer.split(b" ", 2)[1:2] in ([b"400"], [b"431"], []), answer


# -- browsers ------------------------------------------------------------------------------------------------------

RunningApp = Callable[[Settings], AbstractAsyncContextManager[FastAPI]]
_PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def production(tmp_path: Path, urls: DatabaseUrls, **overrides: Any) -> Settings:
    """Settings that production takes."""
    return make_settings(
        tmp_path,
        urls,
        env=Environment.PRODUCTION,
        secret_key=["k3Jd8sPq0ZbN1xVw7uTy5rGc2mHf9aLe4oXi6B"],
        public_url="https://app.example.com",
        cors_origins=["https://good.example"],
        rate_limits="on",
        **overrides,
    )


EVIL = [
    "https://evil.example", "null", "https://sub.good.example", "https://good.example.evil.example",
    "http://good.example", "https://good.example:8443", "https://GOOD.example/", "http://localhost:3000",
    "http://127.0.0.1", "https://evilgood.example", "*", "https://good.example\x00",
]  # fmt: skip


async def test_cors_is_strict_in_production(tmp_path: Path, urls: DatabaseUrls, running_app: RunningApp) -> None:
    async with running_app(production(tmp_path, urls)) as app, http_client(app) as client:
        for origin in EVIL:
            for answer in (
                await client.options("/api/v1/tasks", headers={"Origin": origin, **_PREFLIGHT}),
                await client.get("/health/live", headers={"Origin": origin}),
            ):
                assert "access-control-allow-origin" not in answer.headers, origin
        answer = await client.options("/api/v1/tasks", headers={"Origin": "https://good.example", **_PREFLIGHT})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "Origin" in answer.headers["vary"]
        answer = await client.get("/health/live", headers={"Origin": "https://good.example"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "Origin" in answer.headers["vary"]


async def test_a_refused_preflight_has_the_envelope(
    tmp_path: Path, urls: DatabaseUrls, running_app: RunningApp
) -> None:
    async with running_app(production(tmp_path, urls)) as app, http_client(app) as client:
        answer = await client.options("/api/v1/tasks", headers={"Origin": "https://evil.example", **_PREFLIGHT})
        assert_envelope(answer, 400, 403)


async def test_production_shows_no_documents(tmp_path: Path, urls: DatabaseUrls, running_app: RunningApp) -> None:
    async with running_app(production(tmp_path, urls)) as app, http_client(app) as client:
        for path in ("/docs", "/redoc", "/openapi.json", "/asyncapi.json", "/docs/assets/swagger-ui.css"):
            assert_envelope(await client.get(path), 404)


async def test_loopback_pages_may_call_in_development(client: httpx.AsyncClient) -> None:
    for origin in ("http://localhost:5173", "http://127.0.0.1:3000", "https://localhost", "http://[::1]:8080"):
        answer = await client.get("/health/live", headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example:80",
                   "http://localhost:3000@evil.example", "http://evil.example#http://localhost"):  # fmt: skip
        answer = await client.get("/health/live", headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers, origin


async def test_a_page_elsewhere_can_read_every_refusal(app: FastAPI, alice: Account) -> None:
    """An error without the CORS headers is, to a page, a network failure."""
    headers = {"Origin": "http://localhost:5173", "Content-Type": "application/json"}
    answers = [
        await alice.http.get("/nowhere", headers=headers),
        await alice.http.post("/api/v1/tasks", content=b"{", headers=headers),
        await alice.http.post("/api/v1/tasks", content=b"x" * (MAX_BODY + 1), headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [404, 400, 413]
    assert [answer.headers.get("access-control-allow-origin") for answer in answers] == ["http://localhost:5173"] * 3


async def test_answers_carry_the_security_headers(alice: Account, client: httpx.AsyncClient) -> None:
    for answer in (
        await alice.http.get("/api/v1/me"), await client.get("/api/v1/me"), await client.get("/"),
        await client.get("/docs"), await client.get("/nowhere"), await alice.http.post("/api/v1/tasks", content=b"{"),
    ):  # fmt: skip
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        assert "server" not in answer.headers
    answer = await alice.http.post("/api/v1/realtime/tickets")
    assert answer.headers["cache-control"] == "no-store"


async def test_no_connection_leaves_this_machine(client: httpx.AsyncClient) -> None:
    for path in ("/", "/docs", "/redoc"):
        page = (await client.get(path)).text
        for mark in ("https://cdn", "https://fonts", "http://cdn", "unpkg", "jsdelivr", "googleapis"):
            assert mark not in page, (path, mark)
    with pytest.raises(PermissionError), socket.socket() as outside:
        outside.connect(("192.0.2.1", 80))
