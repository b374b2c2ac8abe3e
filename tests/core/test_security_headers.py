"""What every answer tells browsers, whatever the answer is."""

import base64
import hashlib
import re
from pathlib import Path

import httpx
import pytest

from parley.core.db import DatabaseUrls
from parley.core.settings import Settings
from tests.conftest import Account, http_client, make_settings, running

API = "/api/v1"
ALWAYS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}  # fmt: skip


def checked(answer: httpx.Response, *, private: bool | None = None) -> httpx.Response:
    for name, value in ALWAYS.items():
        assert answer.headers.get_list(name) == [value], (answer.url, name)
    policy = answer.headers.get_list("content-security-policy")
    assert len(policy) == 1
    assert "frame-ancestors 'none'" in policy[0]
    assert "default-src 'none'" in policy[0]
    assert "unsafe-inline" not in policy[0].partition("script-src")[2].partition(";")[0]
    if private is not None:
        assert (answer.headers.get("cache-control") == "no-store") is private, answer.url
    return answer


async def test_every_kind_of_answer_has_them(alice: Account, client: httpx.AsyncClient) -> None:
    http = alice.http
    made = checked(await http.post(f"{API}/tasks", json={"title": "x"}, headers={"Idempotency-Key": "a"}), private=True)
    checked(await http.post(f"{API}/tasks", json={"title": "x"}, headers={"Idempotency-Key": "a"}), private=True)
    task = made.json()["data"]["id"]
    for method, path, status in (
        ("GET", f"{API}/tasks", 200), ("GET", f"{API}/tasks/{task}", 200), ("GET", f"{API}/tasks/x", 422),
        ("GET", f"{API}/audit", 200), ("DELETE", f"{API}/tasks/{task}", 204), ("GET", f"{API}/tasks/{task}", 404),
    ):  # fmt: skip
        answer = checked(await http.request(method, path), private=True)
        assert answer.status_code == status
    for method, path, status in (
        ("GET", "/health/live", 200), ("GET", "/nowhere", 404), ("PATCH", f"{API}/tasks", 405), ("GET", f"{API}/me", 401),
        ("GET", "/openapi.json", 200), ("GET", "/asyncapi.json", 200),
    ):  # fmt: skip
        answer = checked(await client.request(method, path))
        assert answer.status_code == status
    large = await http.post(f"{API}/tasks", content=b"x" * 2_000_000)
    assert checked(large).status_code == 413
    wrong = await client.post(f"{API}/auth/signin", json={"email": "x@example.com", "password": "x"})
    assert checked(wrong).status_code == 401
    body = {"email": "new@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
    assert checked(await client.post(f"{API}/auth/signup", json=body), private=True).status_code == 201


async def test_a_fault_of_ours_has_them(alice: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("parley.tasks.service.TaskReader.list_tasks", broken)
    assert checked(await alice.http.get(f"{API}/tasks")).status_code == 500


async def test_pages_run_their_own_scripts_and_no_others(client: httpx.AsyncClient) -> None:
    for path in ("/", "/docs", "/redoc"):
        page = checked(await client.get(path))
        policy = page.headers["content-security-policy"]
        for script in re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        assert not re.search(r"""(src|href)=["'](https?:)?//""", page.text)


@pytest.mark.parametrize(
    ("url", "sent"), [("https://parley.example.com", True), ("http://parley.example.com", False), ("", False)]
)
async def test_https_is_remembered_where_it_is_spoken(tmp_path: Path, urls: DatabaseUrls, url: str, sent: bool) -> None:
    async with running(make_settings(tmp_path, urls, public_url=url)) as app, http_client(app) as http:
        answer = checked(await http.get("/health/live"))
        assert ("strict-transport-security" in answer.headers) is sent


# -- other origins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://app.example.com", True), ("https://evil.example", False), ("null", False),
        ("https://sub.app.example.com", False), ("https://app.example.com.evil.example", False),
        ("http://app.example.com", False), ("https://app.example.com:8443", False), ("https://APP.example.com", False),
        ("http://localhost:5173", False),
    ],
)  # fmt: skip
async def test_origins_are_exact_in_production(
    tmp_path: Path, urls: DatabaseUrls, origin: str, allowed: bool, settings: Settings
) -> None:
    production = make_settings(
        tmp_path, urls, env="production", cors_origins="https://app.example.com", public_url="https://parley.example.com",
        secret_key="0123456789abcdefghijklmnopqrstuvwxyz", rate_limits="on", mail={"transport": "smtp"},
    )  # fmt: skip
    async with running(production) as app, http_client(app) as http:
        for answer in (
            await http.get("/health/live", headers={"Origin": origin}),
            await http.options(
                f"{API}/tasks", headers={"Origin": origin, "Access-Control-Request-Method": "POST",
                                         "Access-Control-Request-Headers": "authorization,idempotency-key,x-parley-session"},
            ),
        ):  # fmt: skip
            assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
            assert "*" not in answer.headers.get("access-control-allow-origin", "")
            assert "Origin" in answer.headers["vary"]
            if allowed:
                assert answer.headers["access-control-allow-credentials"] == "true"
        exposed = (await http.get("/health/live", headers={"Origin": origin})).headers.get(
            "access-control-expose-headers", ""
        )
        assert not allowed or {"RateLimit", "RateLimit-Policy", "Idempotent-Replayed", "X-Request-ID"} <= set(
            exposed.split(", ")
        )
