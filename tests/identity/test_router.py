import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.db import DatabaseUrls
from parley.core.secrets import key_ring
from parley.core.settings import AuthSettings, Settings
from parley.identity.schemas import MeRead, TokenAnswer
from tests.conftest import Account, SignUp, http_client, make_settings

PASSWORD = "correct horse 1"
SIGN_UP = {"email": "ada@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
API = "/api/v1"


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def assert_refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["error"]) == (status, code), answer.text
    assert body["data"] is None
    assert body["errors"][0] == {name: body[name] for name in ("error", "message", "details")}
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    return body


@pytest.mark.parametrize("prefix", [API, "/v1"])
async def test_sign_up_sign_in_refresh_and_out(client: httpx.AsyncClient, prefix: str) -> None:
    answer = await client.post(f"{prefix}/auth/signup", json={**SIGN_UP, "name": "Ada"})
    assert answer.status_code == 201
    data = answer.json()["data"]
    assert set(data) == {"user", "workspace", "access_token", "token_type", "expires_in", "refresh_token"}
    assert without(data["user"], "id") == {"email": "ada@example.com", "name": "Ada", "email_verified": False}
    assert without(data["workspace"], "id") == {"name": "Ada's workspace", "role": "owner"}
    assert (data["token_type"], data["expires_in"]) == ("bearer", 900)
    for path, body in (
        ("signin", without(SIGN_UP, "confirmPassword")),
        ("refresh", {"refresh_token": data["refresh_token"]}),
    ):
        answer = await client.post(f"{prefix}/auth/{path}", json=body)
        assert answer.status_code == 200, answer.text
        again = TokenAnswer.model_validate(answer.json()["data"]).model_dump(mode="json")
        assert again == answer.json()["data"]
        assert (again["user"], again["workspace"]) == (data["user"], data["workspace"])
        assert answer.headers["Cache-Control"] == "no-store"
    bearer = {"Authorization": f"bEaReR {again['access_token']}"}
    assert (await client.get(f"{API}/me", headers=bearer)).status_code == 200
    for _ in range(2):
        answer = await client.post(f"{prefix}/auth/signout", headers=bearer)
        assert (answer.status_code, answer.content) == (204, b"")
    assert_refused(await client.get(f"{API}/me", headers=bearer), 401, "session_revoked")


async def test_confirm_password_in_either_spelling(client: httpx.AsyncClient) -> None:
    body = without(SIGN_UP, "confirmPassword") | {"confirm_password": PASSWORD}
    assert (await client.post(f"{API}/auth/signup", json=body)).status_code == 201


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"confirmPassword": "other horse 1"}, "confirmPassword"),
        ({"confirmPassword": None}, "confirmPassword"),
        ({"email": "ada"}, "email"),
        ({"email": 7}, "email"),
        ({"email": "x" * 400}, "email"),
        ({"email": "ada\x00@example.com"}, "email"),
        ({"password": "short1", "confirmPassword": "short1"}, "password"),
        ({"password": "no digits here", "confirmPassword": "no digits here"}, "password"),
        ({"password": "1234567890", "confirmPassword": "1234567890"}, "password"),
        ({"password": "password1", "confirmPassword": "password1"}, "password"),
        ({"password": "aa11" * 33, "confirmPassword": "aa11" * 33}, "password"),
        ({"password": "abcdefz1\x00", "confirmPassword": "abcdefz1\x00"}, "password"),
        ({"password": ["abcdefz1"]}, "password"),
        ({"name": "x" * 201}, "name"),
        ({"name": {"first": "Ada"}}, "name"),
        ({"role": "admin"}, "role"),
        ({"email_verified": True}, "email_verified"),
        ({"workspace_id": str(uuid4())}, "workspace_id"),
    ],
)
async def test_a_sign_up_that_does_not_hold_says_where_and_repeats_nothing(
    client: httpx.AsyncClient, change: dict[str, Any], field: str
) -> None:
    body = {**SIGN_UP, **change}
    answer = await client.post(f"{API}/auth/signup", json=body)
    refused = assert_refused(answer, 422, "validation_error")
    assert refused["details"]["field"] == field
    for value in ("short1", "no digits", "other horse", PASSWORD, "1234567890", "abcdefz1", "aa11aa11", "xxxx"):
        assert value not in answer.text


@pytest.mark.parametrize("field", ["email", "password", "confirmPassword"])
async def test_each_field_of_a_sign_up_is_required(client: httpx.AsyncClient, field: str) -> None:
    refused = assert_refused(
        await client.post(f"{API}/auth/signup", json=without(SIGN_UP, field)), 422, "validation_error"
    )
    assert refused["details"]["field"] == field


async def test_lone_surrogates_are_refused_everywhere(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    for path, body in (
        ("signup", r'{"email":"a\ud800@example.com","password":"abcdefz1","confirmPassword":"abcdefz1"}'),
        ("signup", r'{"email":"a@example.com","password":"abcdefz1\ud800","confirmPassword":"abcdefz1\ud800"}'),
        ("signin", r'{"email":"a@example.com","password":"\udfff"}'),
        ("refresh", r'{"refresh_token":"\ud800"}'),
        ("signout", r'{"refresh_token":"\ud800"}'),
    ):
        answer = await client.post(f"{API}/auth/{path}", content=body, headers=headers)
        assert answer.status_code in {400, 422}, answer.text


async def test_of_sign_ups_at_once_one_wins(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(client.post(f"{API}/auth/signup", json=SIGN_UP) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
    assert_refused(next(answer for answer in answers if answer.status_code == 409), 409, "email_taken")


async def test_unknown_and_known_accounts_answer_alike(client: httpx.AsyncClient, alice: Account) -> None:
    seen = []
    for email in (alice.email, "nobody@example.com", "not an address"):
        answer = await client.post(f"{API}/auth/signin", json={"email": email, "password": "wrong horse 1"})
        body = assert_refused(answer, 401, "invalid_credentials")
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        seen.append((without(body, "meta"), headers))
    assert seen[0] == seen[1] == seen[2]


async def test_a_sign_in_with_a_password_too_long_for_any_is_422_for_everyone(
    client: httpx.AsyncClient, alice: Account
) -> None:
    for email in (alice.email, "nobody@example.com"):
        answer = await client.post(f"{API}/auth/signin", json={"email": email, "password": "x" * 129})
        assert_refused(answer, 422, "validation_error")


async def test_me(alice: Account, bob: Account) -> None:
    answer = await alice.http.get(f"{API}/me")
    data = answer.json()["data"]
    assert MeRead.model_validate(data).model_dump(mode="json") == data
    assert data["workspace"]["id"] == str(alice.workspace_id)
    answer = await alice.http.patch(f"{API}/me", json={"name": "  Alice "})
    assert answer.json()["data"] == {**data, "name": "Alice"}
    assert (await bob.http.get(f"{API}/me")).json()["data"]["name"] is None
    for empty in (None, "", "  "):
        assert (await alice.http.patch(f"{API}/me", json={"name": empty})).json()["data"]["name"] is None


@pytest.mark.parametrize(
    "body",
    [{}, {"name": 7}, {"name": "x" * 201}, {"name": "a\x00"}, {"email": "x@example.com"}, {"name": "A", "id": 1}, []],
)
async def test_what_me_does_not_take(alice: Account, body: object) -> None:
    assert_refused(await alice.http.patch(f"{API}/me", json=body), 422, "validation_error")


async def test_signing_out(client: httpx.AsyncClient, sign_up: SignUp) -> None:
    assert_refused(await client.post(f"{API}/auth/signout"), 401, "unauthenticated")
    assert_refused(await client.post(f"{API}/auth/signout", json={}), 401, "unauthenticated")
    assert_refused(await client.post(f"{API}/auth/signout", json={"refresh_token": "x"}), 401, "refresh_invalid")
    assert_refused(
        await client.post(f"{API}/auth/signout", headers={"Authorization": "Bearer x"}), 401, "token_invalid"
    )
    ada = await sign_up()
    for _ in range(2):
        answer = await client.post(f"{API}/auth/signout", json={"refresh_token": ada.refresh_token})
        assert answer.status_code == 204
    assert_refused(await ada.http.get(f"{API}/me"), 401, "session_revoked")
    answer = await client.post(f"{API}/auth/refresh", json={"refresh_token": ada.refresh_token})
    assert_refused(answer, 401, "session_revoked")


async def test_an_expired_access_token_says_so(alice: Account) -> None:
    with clock.shifted(901):
        assert_refused(await alice.http.get(f"{API}/me"), 401, "token_expired")


async def test_every_kind_of_token_holds_for_its_own_use_only(client: httpx.AsyncClient, alice: Account) -> None:
    ticket = (await alice.http.post(f"{API}/realtime/tickets")).json()["data"]["ticket"]
    for token in (alice.refresh_token, ticket):
        answer = await client.get(f"{API}/me", headers={"Authorization": f"Bearer {token}"})
        assert_refused(answer, 401, "token_invalid")
    for token in (alice.access_token, ticket):
        answer = await client.post(f"{API}/auth/refresh", json={"refresh_token": token})
        assert_refused(answer, 401, "refresh_invalid")


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "only the scheme": b"Bearer",
    "scheme and spaces": b"Bearer    ",
    "basic": b"Basic YTpi",
    "no scheme": b"eyJhbGciOiJIUzI1NiJ9.e30.x",
    "two tokens": b"Bearer a b",
    "latin-1": b"Bearer \xff\xfe\xe9",
    "UTF-8": "Bearer 🙂".encode(),
    "dots": b"Bearer ...",
    "100k characters": b"Bearer " + b"A" * 100_000,
    "deep header": b"Bearer " + base64.urlsafe_b64encode(b"[" * 200_000) + b".e30.x",
    "alg none": b"Bearer " + base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=") + b".e30.",
    "tab": b"Bearer\tabc",
    "control": b"Bearer \x01\x02",
    "NUL": b"Bearer \x00",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
async def test_any_malformed_authorization_is_401(client: httpx.AsyncClient, header: bytes) -> None:
    for method, path in (("GET", "/me"), ("POST", "/auth/signout")):
        answer = await client.request(method, API + path, headers={b"Authorization": header})
        assert answer.status_code == 401, answer.text
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_key_that_a_token_points_to_is_never_fetched(
    client: httpx.AsyncClient, alice: Account, settings: Settings
) -> None:
    hits = 0

    async def hit(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hits
        hits += 1
        writer.close()

    canary = await asyncio.start_server(hit, "127.0.0.1", 0)
    port = canary.sockets[0].getsockname()[1]
    secret = (settings.data_dir / "secret_key").read_text().strip()
    key = key_ring((secret,), "access-token").active
    _, body, _ = alice.access_token.split(".")
    for name in ("jku", "x5u"):
        head = {"alg": "HS256", "kid": key.kid, "typ": "at+jwt", name: f"http://127.0.0.1:{port}/keys"}
        text = base64.urlsafe_b64encode(json.dumps(head).encode()).rstrip(b"=").decode() + "." + body
        mac = base64.urlsafe_b64encode(hmac.new(key.value, text.encode(), hashlib.sha256).digest()).rstrip(b"=")
        answer = await client.get(f"{API}/me", headers={"Authorization": f"Bearer {text}.{mac.decode()}"})
        assert_refused(answer, 401, "token_invalid")
    canary.close()
    await canary.wait_closed()
    assert hits == 0


async def test_too_many_sign_ins_at_once_are_told_to_come_back(
    tmp_path: Path,
    urls: DatabaseUrls,
    running_app: Callable[[Settings], AbstractAsyncContextManager[FastAPI]],
) -> None:
    settings = make_settings(tmp_path, urls, auth=AuthSettings(password_workers=1, password_queue=1))
    async with running_app(settings) as app, http_client(app) as client:
        body = {"email": "nobody@example.com", "password": PASSWORD}
        answers = await asyncio.gather(*(client.post(f"{API}/auth/signin", json=body) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {401, 503}
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert_refused(busy, 503, "unavailable")
    assert int(busy.headers["Retry-After"]) >= 1


async def test_the_document_names_these_operations(app: FastAPI) -> None:
    document = app.openapi()
    operations = {
        (path, method): operation["operationId"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if path.startswith((f"{API}/auth", "/v1"))
    }
    assert operations == {
        (f"{API}/auth/signup", "post"): "sign_up",
        (f"{API}/auth/signin", "post"): "sign_in",
        (f"{API}/auth/refresh", "post"): "refresh_session",
        (f"{API}/auth/signout", "post"): "sign_out",
        (f"{API}/auth/switch", "post"): "switch_workspace",
        (f"{API}/auth/sessions", "get"): "list_sessions",
        (f"{API}/auth/sessions", "delete"): "delete_sessions",
        (f"{API}/auth/sessions/{{session_id}}", "delete"): "delete_session",
        (f"{API}/auth/password/change", "post"): "change_password",
        (f"{API}/auth/password/forgot", "post"): "forgot_password",
        (f"{API}/auth/password/reset", "post"): "reset_password",
        (f"{API}/auth/email/verify", "post"): "verify_email",
        (f"{API}/auth/email/resend", "post"): "resend_confirmation",
    }
    required = document["components"]["schemas"]["SignUp"]["required"]
    assert sorted(required) == ["confirmPassword", "email", "password"]
