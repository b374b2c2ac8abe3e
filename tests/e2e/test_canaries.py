"""A run of a real server through its life with secrets that are known: none of them is in a log, a table or a job."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.canaries import PROVIDER_KEY as WORKSPACE_KEY
from tests.canaries import secrets_in, secrets_in_files, secrets_in_tables
from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

API = "/api/v1"
SECRET_KEY = "canary-7f3a9c1e5b2d8a6f4e0c-key-of-everything"
PROVIDER_KEY = "sk-canary-4b1d9e7c2a5f8036"
SMTP_PASSWORD = "canary-smtp-61d0"
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"canary-webhook-secret-8841").decode()
PASSWORD, NEW_PASSWORD, WRONG = "canary 1a walk", "canary 2b walk", "canary 3c wrong"
ADDRESS = "canary.of.the.mine@example.com"
KNOWN = (SECRET_KEY, PROVIDER_KEY, SMTP_PASSWORD, WEBHOOK_SECRET, PASSWORD, NEW_PASSWORD, WRONG)


async def _connect(data_dir: Path) -> asyncpg.Connection:
    lines = (data_dir / "postgres/data/postmaster.pid").read_text().splitlines()
    return await asyncpg.connect(host=lines[4], port=int(lines[3]), user="postgres", database="parley")


def _mailed(data_dir: Path, pattern: str, *, seen: set[str]) -> str:
    """Wait for a token in a mail; the mail folder is the one place where they may stand."""
    import time

    until = time.monotonic() + 20
    while time.monotonic() < until:
        for path in sorted((data_dir / "mail").glob("*.eml")):
            text = path.read_text().replace("=\n", "")
            for found in re.findall(pattern, text):
                if found not in seen:
                    seen.add(found)
                    return str(found)
        time.sleep(0.05)
    raise AssertionError(f"no mail with {pattern}")


def _live(http: httpx.Client, data_dir: Path) -> list[str]:
    """Go through accounts, sessions, keys and mails; return every secret that came along."""
    seen: set[str] = set()
    held: list[str] = []

    def ask(method: str, path: str, body: Any = None, *, token: str | None = None, **headers: str) -> httpx.Response:
        if token:
            headers["Authorization"] = f"Bearer {token}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        kind = {"Content-Type": "application/json"} if content is not None else {}
        return http.request(method, API + path, content=content, headers={**kind, **headers})

    sign_up = {"email": ADDRESS, "password": PASSWORD, "confirmPassword": PASSWORD}
    first = ask("POST", "/auth/signup", sign_up).json()["data"]
    token = first["access_token"]
    held += [first["access_token"], first["refresh_token"]]
    verify = _mailed(data_dir, r"parley_ot_[\w=-]{40,}", seen=seen)
    held.append(verify)
    assert ask("POST", "/auth/email/verify", {"token": verify}).status_code == 204

    # Failures of every kind: wrong types, oversized, unknown fields, wrong passwords, unknown tokens.
    for body in (
        {"email": ADDRESS, "password": WRONG},
        {"email": {"x": PASSWORD}, "password": [PASSWORD]},
        {"email": ADDRESS, "password": PASSWORD * 500},
        {"email": ADDRESS, "password": PASSWORD, PASSWORD: WRONG},
        f'{{"password": "{PASSWORD}"'.encode(),
    ):
        assert ask("POST", "/auth/signin", body).status_code in {400, 401, 422}
        assert ask("POST", "/auth/signup", body).status_code in {400, 409, 422}
    for path in (f"/me?token={token}", f"/tasks?page={WRONG}", f"/tasks/{token}", f"/{token.rpartition('.')[0]}"):
        ask("GET", path.replace(" ", "%20"), token=token)
    ask("GET", "/me", token=token + "x")
    ask("GET", "/me", Authorization=f"Basic {base64.b64encode(PASSWORD.encode()).decode()}")
    ask("GET", "/me", **{"X-Api-Key": PROVIDER_KEY, "Cookie": f"parley_rt={first['refresh_token']}"})

    # Cookie mode, refresh and its reuse.
    browser = {"X-Parley-Session": "cookie", "Origin": str(http.base_url).rstrip("/")}
    signed = ask("POST", "/auth/signin", {"email": ADDRESS, "password": PASSWORD}, **browser)
    assert signed.status_code == 200, signed.text
    held.append(signed.json()["data"]["access_token"])
    cookie = next(value for name, value in signed.cookies.items() if name.endswith("parley_rt"))
    held.append(cookie)
    http.cookies.clear()
    second = ask("POST", "/auth/signin", {"email": ADDRESS, "password": PASSWORD}).json()["data"]
    tokens = [second["refresh_token"]]
    for _ in range(2):
        tokens.append(ask("POST", "/auth/refresh", {"refresh_token": tokens[-1]}).json()["data"]["refresh_token"])
    assert ask("POST", "/auth/refresh", {"refresh_token": tokens[0]}).status_code == 401
    held += tokens

    # Keys, tickets, invitations, an export, a reset.
    key = ask("POST", "/api-keys", {"name": "Canary"}, token=token).json()["data"]["key"]
    assert ask("GET", "/tasks", token=key).status_code == 200
    ticket = ask("POST", "/realtime/tickets", token=token).json()["data"]["ticket"]
    workspace = first["workspace"]["id"]
    invited = ask("POST", f"/workspaces/{workspace}/invitations", {"email": "other@example.com"}, token=token)
    assert invited.status_code == 201, invited.text
    held += [key, ticket, _mailed(data_dir, r"parley_in_[\w=-]{40,}", seen=seen)]
    assert ask("POST", "/me/export", token=token).status_code == 202
    assert ask("POST", "/auth/password/forgot", {"email": ADDRESS}).status_code == 202
    reset = _mailed(data_dir, r"parley_ot_[\w=-]{40,}", seen=seen)
    new = {"password": NEW_PASSWORD, "confirmPassword": NEW_PASSWORD}
    assert ask("POST", "/auth/password/reset", {"token": reset, **new}).status_code == 204
    assert ask("POST", "/auth/password/reset", {"token": reset, **new}).status_code == 422
    last = ask("POST", "/auth/signin", {"email": ADDRESS, "password": NEW_PASSWORD}).json()["data"]
    held += [reset, last["access_token"], last["refresh_token"]]

    # A key of the workspace's own, set well and badly.
    own = f"{WORKSPACE_KEY}7c2e91d4"
    settings: tuple[tuple[str, dict[str, Any]], ...] = (
        ("openai", {"key": own}),
        ("openai", {"key": own, "base_url": f"https://{own}@models.example.com/v1"}),
        ("openai", {"key": [own]}),
        ("openai", {"key": f"{own}\n{own}"}),
        ("nobody", {"key": own}),
    )
    for provider, wanted in settings:
        answer = ask("PUT", f"/provider-keys/{provider}", wanted, token=last["access_token"])
        assert answer.status_code in {200, 404, 422}, answer.text
        assert own not in answer.text
    assert ask("GET", "/provider-keys", token=last["access_token"]).text.count(own[-4:]) == 1
    held.append(own)

    # A reply, by a provider that cannot be reached: its errors could name the key.
    conversation = ask("POST", "/conversations", {}, token=last["access_token"]).json()["data"]["id"]
    for model in ("gpt", "demo", None):
        body = {"text": "Hello", **({"model": model} if model else {})}
        ask(
            "POST", f"/conversations/{conversation}/messages", body, token=last["access_token"],
            Accept="text/event-stream",
        )  # fmt: skip
    assert ask("DELETE", "/me", {"current_password": NEW_PASSWORD}, token=last["access_token"]).status_code == 202
    return held


async def test_no_secret_is_left_anywhere(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    options = {
        "PARLEY_SECRET_KEY": SECRET_KEY, "PARLEY_RATE_LIMITS": "off", "PARLEY_LOG_LEVEL": "DEBUG",
        "OPENAI_API_KEY": PROVIDER_KEY, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
        "PARLEY_MAIL_PASSWORD": SMTP_PASSWORD, "PARLEY_AUTH_CLERK_WEBHOOK_SECRET": WEBHOOK_SECRET,
    }  # fmt: skip
    with server_process(data_dir, **options) as server:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
            held = _live(http, data_dir)
        await _nothing_left(server, data_dir, [*KNOWN, *held])


async def _nothing_left(server: ServerProcess, data_dir: Path, held: list[str]) -> None:
    assert len(held) > 20
    logs = [server.log, *(path for path in (data_dir / "logs").rglob("*") if path.is_file())]
    assert len(logs) > 2
    for path in logs:
        text = path.read_text(errors="replace")
        assert [secret[:12] for secret in held if secret in text] == [], path
        # Shown in part only, so that a person is found and an address is not.
        assert ADDRESS not in text, path
        assert secrets_in(text) == [], path
    connection = await _connect(data_dir)
    assert await secrets_in_tables(connection, *held) == []
    await connection.close()


def test_a_secret_in_a_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "app.log").write_text('{"message": "password is correct horse 1"}\n')
    (tmp_path / "more.log").write_text("parley_sk_" + "A" * 60)

    assert len(secrets_in_files(tmp_path)) == 2


async def test_a_secret_in_a_table_is_noticed(admin: asyncpg.Connection) -> None:
    await admin.execute("INSERT INTO webhook_events (source, event_id) VALUES ('clerk', $1)", "parley_rt_" + "A" * 60)
    await admin.execute("INSERT INTO users (id, email_verified) VALUES ('019f0000-0000-7000-8000-000000000001', false)")
    # As bytes, which are shown as hex.
    await admin.execute(
        "INSERT INTO exports (id, user_id, hash, expires_at) SELECT gen_random_uuid(), id, $1, now() FROM users",
        b"correct horse 1",
    )

    assert await secrets_in_tables(admin) == ["exports: correct horse 1", "webhook_events: parley_rt_AAAA…"]

    # This database too is looked at when it is dropped.
    await admin.execute("DELETE FROM webhook_events")
    await admin.execute("DELETE FROM exports")
