"""Clerk's webhooks: each once, in any order, and nobody comes back who was deleted."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from httpx_ws import WebSocketDisconnect
from pydantic import SecretStr
from svix.webhooks import Webhook

from parley.core.db import Database, DatabaseUrls
from parley.core.settings import AuthSettings
from parley.identity.external_users import erased_subject
from tests.conftest import http_client
from tests.identity.issuers import Made, SigningKey, clerk, jwks_server, shared_secret
from tests.identity.test_issuers import me, service, socket

KEY = SigningKey.make("RS256")
WEBHOOK_SECRET, OLDER_SECRET = "whsec_" + "A" * 32, "whsec_" + "B" * 32
_ids = itertools.count(1)
NOW_MS = int(time.time() * 1000)


def message(kind: str, *, subject: str = "user_1", at: int = 0, **data: Any) -> bytes:
    """Return a body as Clerk sends it; `at` is in milliseconds from the start of the tests."""
    moment = NOW_MS + at
    about: dict[str, Any] = {"id": subject, "object": "user", "deleted": True}
    if kind != "user.deleted":
        about = {
            "id": subject, "updated_at": moment, "first_name": "Ada", "last_name": "Lovelace",
            "primary_email_address_id": "e_2",
            "email_addresses": [
                {"id": "e_1", "email_address": "old@example.com", "verification": {"status": "verified"}},
                {"id": "e_2", "email_address": "ada@example.com", "verification": {"status": "verified"}},
            ],
        }  # fmt: skip
    return json.dumps({"type": kind, "timestamp": moment, "object": "event", "data": {**about, **data}}).encode()


def signed(
    body: bytes, *, event_id: str | None = None, secret: str = WEBHOOK_SECRET, late_s: float = 0
) -> dict[str, str]:
    """Return the headers of a delivery."""
    event_id, moment = event_id or f"msg_{next(_ids)}", datetime.now(UTC) - timedelta(seconds=late_s)
    signature = Webhook(secret).sign(event_id, moment, body.decode())
    return {"svix-id": event_id, "svix-timestamp": str(int(moment.timestamp())), "svix-signature": signature}


async def post(app: FastAPI, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    async with http_client(app) as http:
        return await http.post(
            "/api/v1/webhooks/clerk", content=body, headers=signed(body) if headers is None else headers
        )


async def deliver(app: FastAPI, kind: str, **more: Any) -> None:
    answer = await post(app, message(kind, **more))
    assert answer.status_code == 204, answer.text


@asynccontextmanager
async def taking(
    tmp_path: Path, urls: DatabaseUrls, *more: Made, secret: str | None = WEBHOOK_SECRET, **changes: Any
) -> AsyncIterator[tuple[FastAPI, Made]]:
    """Run an application that takes Clerk's tokens and messages."""
    async with jwks_server(KEY) as server:
        issuer = clerk(server.url, KEY, **changes)
        auth = AuthSettings(clerk_webhook_secret=SecretStr(secret) if secret else None)
        async with service(tmp_path, urls, issuer, *more, auth=auth) as app:
            yield app, issuer


async def who(admin: asyncpg.Connection, subject: str = "user_1") -> Any:
    return await admin.fetchrow(
        "SELECT u.email, u.name, u.email_verified, u.email_norm, u.disabled_at, i.deleted_at FROM identities i"
        " LEFT JOIN users u ON u.id = i.user_id WHERE i.issuer = 'clerk' AND i.subject = $1", subject,
    )  # fmt: skip


async def test_a_user_is_made_and_changed(tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    async with taking(tmp_path, urls) as (app, issuer):
        await deliver(app, "user.created")
        assert tuple(await who(admin)) == ("ada@example.com", "Ada Lovelace", True, None, None, None)
        await deliver(app, "user.updated", at=10, first_name="Augusta", primary_email_address_id="e_1")
        assert tuple(await who(admin))[:2] == ("old@example.com", "Augusta Lovelace")
        # The message was here before the first request: those who come at once still make one workspace.
        now = int(time.time())
        answers = await asyncio.gather(*(me(app, issuer.token("user_1", iat=now - n)) for n in range(20)))
        assert {answer.status_code for answer in answers} == {200}
    assert await admin.fetchval("SELECT count(*) FROM users") == 1
    assert await admin.fetchval("SELECT count(*) FROM workspaces") == 1


async def test_nobody_is_made_where_that_is_not_allowed(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    async with taking(tmp_path, urls, create_users=False) as (app, _):
        await deliver(app, "user.created")
    assert await who(admin) is None


async def test_one_delivery_ten_times_counts_once(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    body = message("user.created")
    headers = signed(body)
    async with taking(tmp_path, urls) as (app, _):
        answers = await asyncio.gather(*(post(app, body, headers) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {204}
    assert await admin.fetchval("SELECT count(*) FROM users") == 1
    assert await admin.fetchval("SELECT count(*) FROM webhook_events") == 1
    assert await admin.fetchval("SELECT count(*) FROM audit_events WHERE action = 'identity.linked'") == 1


async def test_the_newest_wins_in_any_order(tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    async with taking(tmp_path, urls) as (app, _):
        for seed in range(4):
            bodies = [
                message("user.updated", subject=f"user_{seed}", at=n, first_name=f"Name {n}") for n in range(1, 7)
            ]
            bodies.append(message("user.created", subject=f"user_{seed}", at=0))
            random.Random(seed).shuffle(bodies)
            assert {(await post(app, body)).status_code for body in bodies} == {204}
            assert (await who(admin, f"user_{seed}"))["name"] == "Name 6 Lovelace"


async def test_who_was_deleted_stays_deleted(tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    async with taking(tmp_path, urls) as (app, issuer):
        token = issuer.token("user_1")
        assert (await me(app, token)).status_code == 200
        async with socket(app, {"token": token}) as peer:
            assert (await peer.receive_json(timeout=5))["t"] == "welcome"
            await deliver(app, "user.deleted", at=100)
            with pytest.raises(WebSocketDisconnect) as ended:
                await peer.receive_json(timeout=5)
            assert ended.value.code == 4403
        await deliver(app, "user.updated", at=50)
        await deliver(app, "user.updated", at=150)
        await deliver(app, "user.created", at=160)
        for late in (token, issuer.token("user_1", jti="new")):
            answer = await me(app, late)
            assert (answer.status_code, answer.json()["error"]) == (401, "user_unknown")
        # Somebody who was never here leaves the same mark.
        await deliver(app, "user.deleted", subject="user_2")
        await deliver(app, "user.created", subject="user_2", at=500)
        assert (await me(app, issuer.token("user_2"))).status_code == 401
    found = await who(admin)
    assert found["deleted_at"] is not None
    assert found["disabled_at"] is not None
    assert await admin.fetchval("SELECT count(*) FROM users") == 1
    assert await admin.fetchval("SELECT count(*) FROM audit_events WHERE action = 'identity.deleted'") == 1


async def test_a_late_message_does_not_name_somebody_who_was_erased_again(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        "INSERT INTO identities (issuer, subject, deleted_at) VALUES ('clerk', $1, now())",
        erased_subject("clerk", "user_1"),
    )
    async with taking(tmp_path, urls) as (app, issuer):
        for n, kind in enumerate(("user.deleted", "user.created", "user.updated")):
            await deliver(app, kind, at=n)
            assert await who(admin) is None
        assert (await me(app, issuer.token("user_1"))).status_code == 401
    assert await who(admin) is None


GOOD = message("user.created")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {**signed(GOOD), "svix-signature": ""},
        {**signed(GOOD), "svix-signature": "v1"},
        {**signed(GOOD), "svix-signature": "v1,not base64!"},
        {**signed(GOOD), "svix-signature": "v1,a v1,b,c ,"},
        {**signed(GOOD), "svix-signature": "x" * 7000},
        {**signed(GOOD), "svix-timestamp": "x"},
        {**signed(GOOD), "svix-timestamp": "9" * 400},
        {**signed(GOOD), "svix-timestamp": "nan"},
        {**signed(GOOD), "svix-id": "another"},
        signed(GOOD, secret=OLDER_SECRET),
        signed(GOOD, late_s=3600),
        signed(GOOD, late_s=-3600),
        signed(GOOD, late_s=301),
        signed(GOOD + b" "),
        signed(GOOD, event_id="x" * 300),
    ],
    ids=range(16),
)
async def test_what_is_not_signed_is_refused(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection, headers: dict[str, str]
) -> None:
    async with taking(tmp_path, urls) as (app, _):
        answer = await post(app, GOOD, headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "signature_invalid")
    assert await admin.fetchval("SELECT count(*) FROM webhook_events") == 0


@pytest.mark.parametrize("body", [b"", b"\xff\xfe\x00", b"{", b"[]", b"1", b"[" * 50_000])
async def test_bodies_that_cannot_be_read_are_refused(tmp_path: Path, urls: DatabaseUrls, body: bytes) -> None:
    async with taking(tmp_path, urls) as (app, _):
        headers = signed(body) if body.isascii() else signed(GOOD)
        assert (await post(app, body, headers)).status_code == 400


async def test_messages_about_other_things_are_taken_and_left(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    odd: list[Any] = [
        {"type": "session.created", "data": {"id": "sess_1"}}, {"type": None}, {}, {"type": "user.created"},
        {"type": "user.created", "data": []}, {"type": "user.created", "data": {"id": 7}},
        {"type": "user.created", "data": {"id": "x" * 300}}, {"type": ["user.created"], "data": {"id": "user_1"}},
        {"type": "user.created", "data": {"id": "user\0_1"}},
    ]  # fmt: skip
    async with taking(tmp_path, urls) as (app, _):
        for event in odd:
            assert (await post(app, json.dumps(event).encode())).status_code == 204, event
        assert await admin.fetchval("SELECT count(*) FROM identities") == 0
        # A user of whom nothing can be read but the id.
        strange = message(
            "user.created", email_addresses=[7, {"id": "e_2", "email_address": "a\0b"}], first_name=9,
            last_name=None, updated_at="soon",
        )  # fmt: skip
        assert (await post(app, strange)).status_code == 204
    assert tuple(await who(admin))[:3] == (None, None, False)


async def test_two_secrets_hold_while_one_rotates(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with taking(tmp_path, urls, secret=f"{WEBHOOK_SECRET}, {OLDER_SECRET}") as (app, _):
        for secret in (WEBHOOK_SECRET, OLDER_SECRET):
            assert (await post(app, GOOD, signed(GOOD, secret=secret))).status_code == 204


async def test_without_a_secret_or_an_issuer_there_is_nothing(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with taking(tmp_path, urls, secret=None) as (app, _):
        assert (await post(app, GOOD)).status_code == 404
    plain = shared_secret(issuer=None)
    auth = AuthSettings(clerk_webhook_secret=SecretStr(WEBHOOK_SECRET))
    async with service(tmp_path, urls, plain, auth=auth) as app:
        assert (await post(app, GOOD)).status_code == 404


async def test_while_the_database_is_away_the_sender_is_told_to_try_again(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = message("user.created")
    headers = signed(body)
    async with taking(tmp_path, urls) as (app, _):
        unit_of_work = Database.system_unit_of_work

        @asynccontextmanager
        async def cut(self: Database) -> AsyncIterator[Any]:
            """A connection that is lost before the commit, when everything was done."""
            async with unit_of_work(self) as unit:
                yield unit
                raise ConnectionResetError

        monkeypatch.setattr(Database, "system_unit_of_work", cut)
        answer = await post(app, body, headers)
        assert answer.status_code == 503, answer.text
        monkeypatch.undo()
        assert await admin.fetchval("SELECT count(*) FROM users") == 0
        assert (await post(app, body, headers)).status_code == 204
    assert await admin.fetchval("SELECT count(*) FROM users") == 1
