"""Cookie mode: where the refresh token is, and who may have it used."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.cookies import Morsel, SimpleCookie
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core.db import DatabaseUrls
from parley.core.settings import Environment
from parley.identity.cookies import Cookies
from tests.conftest import http_client, make_settings, running

PASSWORD = "correct horse 1"
API = "/api/v1"
SITE = "https://chat.example.com"
OTHER_SITE = "https://app.example.com"
OURS = {"X-Parley-Session": "cookie", "Origin": SITE, "Sec-Fetch-Site": "same-origin"}
SIGN_UP = {"email": "ada@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
SIGN_IN = {"email": "ada@example.com", "password": PASSWORD}


@asynccontextmanager
async def at(tmp_path: Path, urls: DatabaseUrls, public_url: str = SITE) -> AsyncIterator[FastAPI]:
    settings = make_settings(tmp_path, urls, public_url=public_url, cors_origins=[OTHER_SITE])
    async with running(settings) as app:
        yield app


@pytest.fixture
async def browser(tmp_path: Path, urls: DatabaseUrls) -> AsyncIterator[httpx.AsyncClient]:
    """A browser's page of our own site, on https, signed up in cookie mode."""
    async with at(tmp_path, urls) as app, http_client(app, headers=OURS) as http:
        http.base_url = httpx.URL(SITE)
        answer = await http.post(f"{API}/auth/signup", json=SIGN_UP)
        assert answer.status_code == 201, answer.text
        yield http


def set_cookies(answer: httpx.Response) -> dict[str, Morsel[str]]:
    found: dict[str, Morsel[str]] = {}
    for line in answer.headers.get_list("set-cookie"):
        parsed: SimpleCookie = SimpleCookie(line)
        found |= dict(parsed.items())
    return found


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


async def state(admin: asyncpg.Connection) -> list[Any]:
    """Everything that a refused request must leave as it is."""
    tables = ("users", "sessions", "workspaces", "audit_events")
    rows = [[tuple(row) for row in await admin.fetch(f"SELECT * FROM {table} ORDER BY id")] for table in tables]
    return [*rows, await admin.fetchval("SELECT count(*) FROM jobs WHERE kind = 'mail'")]


@pytest.mark.parametrize(
    ("public_url", "prefix", "secure"),
    [
        (SITE, "__Host-", True),
        ("https://chat.example.com:8443/", "__Host-", True),
        ("http://localhost:8000", "", False),
        ("", "", False),
    ],
)
async def test_the_attributes_of_the_cookies(
    tmp_path: Path, urls: DatabaseUrls, public_url: str, prefix: str, secure: bool
) -> None:
    async with at(tmp_path, urls, public_url) as app, http_client(app, headers={**OURS, "Origin": OTHER_SITE}) as http:
        answers = [await http.post(f"{API}/auth/signup", json=SIGN_UP)]
        answers += [await http.post(f"{API}/auth/signin", json=SIGN_IN)]
    for answer in answers:
        assert answer.status_code in {200, 201}, answer.text
        made = set_cookies(answer)
        assert set(made) == {f"{prefix}parley_rt", f"{prefix}parley_device"}
        for cookie in made.values():
            assert cookie["httponly"] is True
            assert bool(cookie["secure"]) is secure
            assert (cookie["path"], cookie["samesite"].lower(), cookie["domain"]) == ("/", "strict", "")
        assert made[f"{prefix}parley_rt"]["max-age"] == str(7 * 86400)
        assert made[f"{prefix}parley_rt"].value.startswith("parley_rt_")


def test_in_production_they_are_secure_whatever_the_address(tmp_path: Path, urls: DatabaseUrls) -> None:
    settings = make_settings(tmp_path, urls, public_url="http://chat.example.com")
    for env, strict in ((Environment.PRODUCTION, True), (Environment.DEVELOPMENT, False)):
        made = Cookies.from_settings(settings.model_copy(update={"env": env}))
        assert (made.secure, made.refresh_name.startswith("__Host-")) == (strict, strict)
        assert made.allow_loopback is not strict


async def test_no_body_has_the_refresh_token(browser: httpx.AsyncClient, admin: asyncpg.Connection) -> None:
    seen: set[str] = set()
    workspace = ""
    for path in ("signin", "refresh", "refresh", "switch", "refresh"):
        body: dict[str, str] = {"signin": SIGN_IN, "switch": {"workspace_id": workspace}}.get(path, {})
        answer = await browser.post(f"{API}/auth/{path}", json=body)
        assert answer.status_code == 200, (path, answer.text)
        data = answer.json()["data"]
        assert data["refresh_token"] is None
        assert "parley_rt_" not in answer.text
        browser.headers["Authorization"] = f"Bearer {data['access_token']}"
        workspace = data["workspace"]["id"]
        seen.add(set_cookies(answer)["__Host-parley_rt"].value)
        assert answer.headers["cache-control"] == "no-store"
    # Each is another one: the cookie moves on.
    assert len(seen) == 5
    for path in ("me", "auth/sessions", "audit"):
        answer = await browser.get(f"{API}/{path}")
        assert answer.status_code == 200
        assert "parley_rt_" not in answer.text
    assert await admin.fetchval("SELECT count(*) FROM sessions WHERE cookie") == 2


REFUSED: dict[str, dict[str, Any]] = {
    "another origin": {"headers": {"Origin": "https://evil.example.com"}},
    "our name under another": {"headers": {"Origin": SITE + ".evil.example.com"}},
    "our site without TLS": {"headers": {"Origin": "http://chat.example.com"}},
    "an opaque origin": {"headers": {"Origin": "null"}},
    "an origin that is none": {"headers": {"Origin": "http://[::1"}},
    "no origin": {"without": "Origin"},
    "another site": {"headers": {"Sec-Fetch-Site": "cross-site"}},
    "a form": {"headers": {"Content-Type": "text/plain"}},
    "a form of fields": {"headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    "a form with a file": {"headers": {"Content-Type": "multipart/form-data; boundary=x"}},
}


@pytest.mark.parametrize("path", ["signup", "signin", "refresh", "signout"])
@pytest.mark.parametrize("case", REFUSED, ids=list(REFUSED))
async def test_what_does_not_come_from_our_page_changes_nothing(
    browser: httpx.AsyncClient, admin: asyncpg.Connection, path: str, case: str
) -> None:
    body = {"signup": SIGN_UP | {"email": "eve@example.com"}, "signin": SIGN_IN}.get(path, {})
    headers = {**browser.headers, "content-type": "application/json"}
    change = REFUSED[case]
    headers |= {name.lower(): value for name, value in change.get("headers", {}).items()}
    headers.pop(change.get("without", "").lower(), None)
    request = httpx.Request("POST", f"{SITE}{API}/auth/{path}", headers=headers, content=json.dumps(body))
    browser.cookies.set_cookie_header(request)
    before = await state(admin)
    answer = await browser.send(request)
    assert code(answer) == (403, "csrf_refused")
    assert set_cookies(answer) == {}
    assert await state(admin) == before
    # The same request from our own page is taken: nothing else was wrong with it.
    request = httpx.Request("POST", f"{SITE}{API}/auth/{path}", headers={**browser.headers, "content-type": "application/json"}, content=json.dumps(body))  # fmt: skip
    browser.cookies.set_cookie_header(request)
    assert (await browser.send(request)).status_code in {200, 201, 204}


@pytest.mark.parametrize("path", ["refresh", "signout"])
async def test_a_cookie_alone_proves_nothing(browser: httpx.AsyncClient, admin: asyncpg.Connection, path: str) -> None:
    before = await state(admin)
    del browser.headers["X-Parley-Session"]
    bodies: tuple[dict[str, str] | None, ...] = (None, {})
    for body in bodies:
        assert code(await browser.post(f"{API}/auth/{path}", json=body)) == (403, "csrf_refused")
    assert await state(admin) == before
    browser.headers["X-Parley-Session"] = "COOKIE"
    assert (await browser.post(f"{API}/auth/{path}")).status_code in {200, 204}


@pytest.mark.parametrize(
    "origin", [SITE, OTHER_SITE, "http://localhost:5173", "http://127.0.0.1:3000", "https://[::1]:8443"]
)
async def test_pages_that_are_ours(browser: httpx.AsyncClient, origin: str) -> None:
    for fetch_site in ("same-origin", "same-site", None):
        headers = {**OURS, "Origin": origin, "Sec-Fetch-Site": fetch_site}
        answer = await browser.post(
            f"{API}/auth/refresh", headers={name: value for name, value in headers.items() if value}
        )
        assert answer.status_code == 200, answer.text


async def test_a_session_keeps_its_token_in_one_place(browser: httpx.AsyncClient, admin: asyncpg.Connection) -> None:
    cookie = browser.cookies["__Host-parley_rt"]
    plain = httpx.AsyncClient(transport=browser._transport, base_url=SITE)
    before = await state(admin)
    # Out of the cookie into the body.
    answer = await plain.post(f"{API}/auth/refresh", json={"refresh_token": cookie})
    assert code(answer) == (401, "refresh_invalid")
    # Both at once.
    answer = await browser.post(f"{API}/auth/refresh", json={"refresh_token": cookie})
    assert code(answer) == (401, "refresh_invalid")
    assert await state(admin) == before
    # Out of the body into the cookie.
    given = (await plain.post(f"{API}/auth/signin", json=SIGN_IN)).json()["data"]["refresh_token"]
    before = await state(admin)
    stuffed = httpx.AsyncClient(transport=browser._transport, base_url=SITE, headers=OURS)
    answer = await stuffed.post(f"{API}/auth/refresh", headers={"Cookie": f"__Host-parley_rt={given}"})
    assert code(answer) == (401, "refresh_invalid")
    assert await state(admin) == before
    for http, body in ((plain, {"refresh_token": given}), (browser, None)):
        assert (await http.post(f"{API}/auth/refresh", json=body)).status_code == 200
    answer = await stuffed.post(f"{API}/auth/refresh")
    assert code(answer) == (401, "refresh_invalid")


@pytest.mark.parametrize("bearer", [True, False])
async def test_signing_out_takes_the_cookie_away(
    browser: httpx.AsyncClient, admin: asyncpg.Connection, bearer: bool
) -> None:
    token = (await browser.post(f"{API}/auth/refresh")).json()["data"]["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    answer = await browser.post(f"{API}/auth/signout", headers=headers if bearer else {})
    assert answer.status_code == 204
    cookie = set_cookies(answer)["__Host-parley_rt"]
    assert (cookie.value, cookie["max-age"]) == ("", "0")
    assert (bool(cookie["secure"]), cookie["path"]) == (True, "/")
    # The device stays known.
    assert set(browser.cookies) == {"__Host-parley_device"}
    assert await admin.fetchval("SELECT revoke_reason FROM sessions") == "sign_out"
    assert code(await browser.get(f"{API}/me", headers=headers)) == (401, "session_revoked")


async def test_a_switch_keeps_the_mode(browser: httpx.AsyncClient, admin: asyncpg.Connection) -> None:
    signed_in = (await browser.post(f"{API}/auth/refresh")).json()["data"]
    plain = httpx.AsyncClient(transport=browser._transport, base_url=SITE)
    by_body = (await plain.post(f"{API}/auth/signin", json=SIGN_IN)).json()["data"]
    for data, in_cookie in ((signed_in, True), (by_body, False)):
        # Whatever the request says: the session knows.
        for header in ({}, {"X-Parley-Session": "cookie"}):
            headers = {"Authorization": f"Bearer {data['access_token']}", **header}
            body = {"workspace_id": data["workspace"]["id"]}
            answer = await plain.post(f"{API}/auth/switch", json=body, headers=headers)
            assert answer.status_code == 200
            assert (answer.json()["data"]["refresh_token"] is None) is in_cookie
            assert ("__Host-parley_rt" in set_cookies(answer)) is in_cookie
        assert "__Host-parley_device" not in set_cookies(answer)


async def test_without_the_header_the_token_is_in_the_body(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    async with at(tmp_path, urls) as app, http_client(app) as http:
        answer = await http.post(f"{API}/auth/signup", json=SIGN_UP)
        assert answer.json()["data"]["refresh_token"].startswith("parley_rt_")
        assert set(set_cookies(answer)) == {"__Host-parley_device"}
        body = {"refresh_token": answer.json()["data"]["refresh_token"]}
        answer = await http.post(f"{API}/auth/refresh", json=body)
        assert answer.status_code == 200
        assert set_cookies(answer) == {}
    assert await admin.fetchval("SELECT count(*) FROM sessions WHERE cookie") == 0


async def test_the_cookie_opens_nothing_else(browser: httpx.AsyncClient) -> None:
    for method, path in (("GET", "me"), ("GET", "auth/sessions"), ("DELETE", "auth/sessions"), ("POST", "tasks")):
        assert (await browser.request(method, f"{API}/{path}")).status_code == 401
    answer = await browser.post(f"{API}/auth/switch", json={"workspace_id": "0193c0de-9f3a-7bd2-8000-2b1d4a5c6e7f"})
    assert answer.status_code == 401
    assert (await browser.get(f"{API}/auth/refresh")).status_code == 405
    assert (await browser.get(f"{API}/auth/signout")).status_code == 405


async def test_a_guard_that_lets_all_pass_would_be_seen(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cookies, "guard", lambda *_: None)
    answer = await browser.post(f"{API}/auth/refresh", headers={"Origin": "https://evil.example.com"})
    assert answer.status_code == 200
