"""Users of other issuers: made at first sight, never joined by an address, and out as fast as our own."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from httpx_ws import AsyncWebSocketSession, WebSocketDisconnect, aconnect_ws
from httpx_ws.transport import ASGIWebSocketTransport

from parley.core import clock
from parley.core.db import DatabaseUrls
from parley.core.settings import LimitSettings, SettingsInvalid, load_settings
from parley.main import create_app
from tests.conftest import http_client, make_settings, running
from tests.documented import DocumentedSession
from tests.identity.issuers import SECRET, Made, SigningKey, better_auth, clerk, jwks_server, shared_secret

RSA, ED = SigningKey.make("RS256"), SigningKey.make("EdDSA")


@asynccontextmanager
async def service(tmp_path: Path, urls: DatabaseUrls, *issuers: Made, **more: Any) -> AsyncIterator[FastAPI]:
    """Run an application that takes these issuers' tokens."""
    settings = make_settings(tmp_path, urls, issuers=json.dumps([made.entry for made in issuers]), **more)
    settings._environ = {"SHARED_SECRET": SECRET}
    async with running(settings) as app:
        yield app


@asynccontextmanager
async def socket(app: FastAPI, auth: dict[str, str]) -> AsyncIterator[AsyncWebSocketSession]:
    """Open a socket and say hello."""
    url = "http://localhost/api/v1/realtime"
    async with httpx.AsyncClient(transport=ASGIWebSocketTransport(app=app)) as client:
        opening: AbstractAsyncContextManager[AsyncWebSocketSession] = aconnect_ws(
            url, client, subprotocols=["parley.v1"], session_class=DocumentedSession
        )
        async with opening as session:
            await session.send_json({"t": "hello", "v": 1, "auth": auth})
            yield session


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def me(app: FastAPI, token: str) -> httpx.Response:
    async with http_client(app) as http:
        return await http.get("/api/v1/me", headers=bearer(token))


async def test_each_kind_of_issuer_makes_its_users(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    async with jwks_server(RSA) as one, jwks_server(ED) as two:
        made = (
            clerk(one.url, RSA), better_auth(two.url, ED), shared_secret(issuer="https://other.example.com"),
            shared_secret(issuer=None),
        )  # fmt: skip
        async with service(tmp_path, urls, *made) as app:
            ids = set()
            for issuer in made:
                token = issuer.token("user_1", email="ada@example.com", email_verified=True, name="Ada")
                answer = await me(app, token)
                assert answer.status_code == 200, answer.text
                data = answer.json()["data"]
                assert (data["email"], data["email_verified"], data["name"]) == ("ada@example.com", True, "Ada")
                assert data["workspace"]["role"] == "owner"
                assert (await me(app, issuer.token("user_1"))).json()["data"]["id"] == data["id"]
                ids.add(data["id"])
    # One subject and one address at four issuers: four people.
    assert len(ids) == 4
    assert await admin.fetchval("SELECT count(*) FROM identities") == 4
    assert await admin.fetchval("SELECT count(*) FROM users WHERE email_norm IS NOT NULL") == 0


async def test_a_token_works_everywhere(tmp_path: Path, urls: DatabaseUrls) -> None:
    issuer = shared_secret(issuer=None)
    async with service(tmp_path, urls, issuer) as app, http_client(app) as http:
        token = issuer.token("better-auth-user")
        http.headers.update(bearer(token))
        made = await http.post("/api/better-auth-user/tasks", json={"title": "Buy milk"})
        assert made.status_code == 201, made.text
        assert made.json()["user_id"] == "better-auth-user"
        assert (await http.get("/api/somebody-else/tasks")).status_code == 401
        ticket = (await http.post("/api/v1/realtime/tickets")).json()["data"]["ticket"]
        for auth in ({"token": token}, {"ticket": ticket}):
            async with socket(app, auth) as peer:
                assert (await peer.receive_json(timeout=5))["t"] == "welcome"
                await peer.send_json({"t": "sub", "id": 1, "ch": "tasks"})
                assert (await peer.receive_json(timeout=5))["t"] == "subbed"


async def test_twenty_first_requests_make_one_user(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    issuer = shared_secret(issuer=None)
    async with service(tmp_path, urls, issuer) as app:
        now = int(time.time())
        answers = await asyncio.gather(*(me(app, issuer.token("user_1", iat=now - n)) for n in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["data"]["id"] for answer in answers}) == 1
    assert await admin.fetchval("SELECT count(*) FROM users") == 1
    assert await admin.fetchval("SELECT count(*) FROM workspaces") == 1


async def test_users_are_made_only_where_that_is_allowed(tmp_path: Path, urls: DatabaseUrls) -> None:
    issuer = shared_secret(issuer=None, create_users=False)
    async with service(tmp_path, urls, issuer) as app:
        answer = await me(app, issuer.token("user_1"))
    assert (answer.status_code, answer.json()["error"]) == (401, "user_unknown")


async def test_a_fixed_workspace_and_one_that_a_claim_names(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    workspace = "019f0000-0000-7000-8000-00000000000a"
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'Team', false)", workspace)
    fixed = shared_secret(issuer=None, workspace=f"fixed:{workspace}")
    claim = shared_secret(issuer="https://other.example.com", workspace="claim:o.id")
    async with service(tmp_path, urls, fixed, claim) as app:
        for token in (fixed.token("user_1"), claim.token("user_2", o={"id": workspace})):
            data = (await me(app, token)).json()["data"]
            assert (data["workspace"]["id"], data["workspace"]["role"]) == (workspace, "member")
        for value in (None, {"id": "x"}, {"id": "019f0000-0000-7000-8000-00000000000b"}, "x", {}):
            answer = await me(app, claim.token("user_3", o=value))
            assert (answer.status_code, answer.json()["error"]) == (403, "no_workspace"), value
        # Whom an admin has taken out no token puts back.
        user = await admin.fetchval("SELECT user_id FROM identities WHERE subject = 'user_1'")
        await admin.execute("DELETE FROM memberships WHERE user_id = $1", user)
        await admin.execute(
            "INSERT INTO audit_events (workspace_id, id, actor, action, outcome, target, details)"
            " VALUES ($1, gen_random_uuid(), 'user', 'member.removed', 'success', $2, '{}')", workspace, str(user),
        )  # fmt: skip
        assert (await me(app, fixed.token("user_1", jti="another"))).status_code == 403
    assert await admin.fetchval("SELECT count(*) FROM users") == 2


async def test_a_closed_account_and_older_tokens_are_refused(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    issuer = shared_secret(issuer=None)
    async with service(tmp_path, urls, issuer) as app, http_client(app) as http:
        token, later = issuer.token("user_1"), issuer.token("user_1", iat=int(time.time()) + 20)
        http.headers.update(bearer(token))
        async with socket(app, {"token": token}) as peer:
            assert (await peer.receive_json(timeout=5))["t"] == "welcome"
            assert (await http.delete("/api/v1/auth/sessions")).status_code == 204
            with pytest.raises(WebSocketDisconnect) as ended:
                await peer.receive_json(timeout=5)
            assert ended.value.code == 4403
        assert (await me(app, token)).status_code == 401
        assert (await me(app, later)).status_code == 200
        await admin.execute("UPDATE users SET disabled_at = now()")
        app.state.authenticator._kinds[1]._known.forget_all()
        answer = await me(app, later)
        assert (answer.status_code, answer.json()["error"]) == (401, "user_unknown")


async def test_the_credential_ends_with_the_token(
    tmp_path: Path, urls: DatabaseUrls, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer = shared_secret(issuer=None)
    async with service(tmp_path, urls, issuer) as app:
        token = issuer.token("user_1")
        assert (await me(app, token)).status_code == 200
        real = clock.timestamp()
        monkeypatch.setattr(clock, "timestamp", lambda: real + 340)
        answer = await me(app, token)
        assert (answer.status_code, answer.json()["error"]) == (401, "token_expired")


async def test_a_token_without_an_issuer_needs_an_entry_for_such(tmp_path: Path, urls: DatabaseUrls) -> None:
    issuer = shared_secret(issuer="https://other.example.com")
    async with service(tmp_path, urls, issuer) as app:
        assert (await me(app, issuer.token("user_1"))).status_code == 200
        assert (await me(app, issuer.token("user_1", iss=None))).status_code == 401


async def test_a_claim_leads_into_nobodys_own_workspace(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    one = shared_secret(issuer=None)
    other = shared_secret(issuer="https://other.example.com", workspace="claim:workspace")
    async with service(tmp_path, urls, one, other) as app:
        workspace = (await me(app, one.token("user_1"))).json()["data"]["workspace"]["id"]
        answer = await me(app, other.token("user_2", workspace=workspace))
        assert (answer.status_code, answer.json()["error"]) == (403, "no_workspace")
    assert await admin.fetchval("SELECT count(*) FROM memberships") == 1


# -- the entries -------------------------------------------------------------------------------------------------------

GOOD = shared_secret(issuer="https://other.example.com").entry


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("x", "Invalid JSON"),
        ("{}", "array"),
        ([{**GOOD, "algorithm": "none"}], "algorithm"),
        ([{**GOOD, "algorithm": "RS256"}], "HS256 needs secret_env"),
        ([{**GOOD, "jwks_url": "https://x.example.com/jwks"}], "HS256 needs secret_env"),
        ([{**GOOD, "secret_env": None, "algorithm": "RS256", "jwks_url": "http://x.example.com/jwks"}], "https"),
        ([{**GOOD, "secret_env": "NOT_SET"}], "NOT_SET"),
        ([{**GOOD, "secret_env": "SHORT_SECRET"}], "32 bytes"),
        ([{**GOOD, "workspace": "any"}], "workspace must be"),
        ([{**GOOD, "workspace": "fixed:x"}], "id of a workspace"),
        ([{**GOOD, "unknown": 1}], "unknown"),
        ([{**GOOD, "azp": []}], "azp"),
        ([GOOD, GOOD], "one name"),
        ([GOOD, {**GOOD, "name": "second"}], "one issuer"),
        ([{**GOOD, "issuer": None}, {**GOOD, "name": "second", "issuer": None}], "one issuer"),
        ([{**GOOD, "issuer": "parley"}], "our own issuer"),
    ],
)
def test_entries_that_do_not_hold_stop_the_start(tmp_path: Path, entries: Any, said: str) -> None:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    settings = load_settings(tmp_path, env="testing", issuers=text)
    settings._environ = {"SHARED_SECRET": SECRET, "SHORT_SECRET": "short and secret"}

    with pytest.raises(SettingsInvalid, match="PARLEY_ISSUERS") as refused:
        create_app(settings)
    assert said in str(refused.value)
    assert "short and secret" not in str(refused.value)


@pytest.mark.parametrize("secret", ["x", "whsec_ä", "whsec_not base64!"])
def test_a_webhook_secret_that_is_none_stops_the_start(tmp_path: Path, secret: str) -> None:
    settings = load_settings(tmp_path, env="testing", auth={"clerk_webhook_secret": secret})

    with pytest.raises(SettingsInvalid, match="PARLEY_AUTH_CLERK_WEBHOOK_SECRET") as refused:
        create_app(settings)
    assert secret not in str(refused.value).replace("whsec_ and", "")


async def test_a_personal_workspace_that_is_gone_is_made_anew_only_so_often(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    """Each has a ceiling of its own of what it may cost the operator."""
    issuer = shared_secret(issuer=None)
    more = {"rate_limits": "on", "limits": LimitSettings(workspaces_per_month=3)}
    async with service(tmp_path, urls, issuer, **more) as app:
        seen = set()
        for n in range(4):
            answer = await me(app, issuer.token("user_1", iat=int(time.time()) - n))
            if answer.status_code == 200:
                seen.add(answer.json()["data"]["workspace"]["id"])
                await admin.execute("DELETE FROM workspaces")
    assert (answer.status_code, answer.json()["error"]) == (429, "too_many_workspaces")
    assert len(seen) == 3
