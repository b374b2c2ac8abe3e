"""The end of an account: at once for its owner, for good after the days, and again after a restore."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.db import Database
from parley.core.revocations import Revocation
from parley.core.settings import Settings
from parley.identity.erasures import (
    AccountNotFound,
    ErasureService,
    LastOwner,
    LedgerInvalid,
    parse_ledger,
    render_ledger,
)
from parley.jobs.registry import JobFailed
from parley.main import PERSONAL_DATA
from tests.conftest import Account, SignUp
from tests.identity.test_exports import ALICE, BOB, Outbox, _write, add_export, job_of, jobs_wait, run_of
from tests.live import greet, live

PASSWORD = "correct horse 1"

__all__ = ["jobs_wait"]


class Box:
    """The service with a mailer of the test's, on the test's application."""

    def __init__(self, app: FastAPI) -> None:
        self.database: Database = app.state.database
        self.mail = Outbox()
        self.told: list[Revocation] = []
        app.state.revocations.subscribe(self.told.append)
        self.service = ErasureService(
            self.database,
            PERSONAL_DATA,
            confirm=app.state.passwords.confirm,
            revocations=app.state.revocations,
            mailer=self.mail,
            days=7,
        )


@pytest.fixture
def box(app: FastAPI) -> Box:
    return Box(app)


async def everything(admin: asyncpg.Connection) -> set[tuple[str, str]]:
    """Return every row of the database as text, past all policies; bytes readable where they are text."""
    tables = await admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    found = set()
    for (table,) in tables:
        rows = await admin.fetch(f"SELECT row_to_json(t)::text || encode(t::text::bytea, 'escape') FROM {table} t")
        found |= {(table, text) for (text,) in rows}
    return found


def holding(rows: set[tuple[str, str]], *words: str) -> set[tuple[str, str]]:
    # Bytes are shown as hexadecimal digits.
    spelled = [form for word in words for form in (word.lower(), word.lower().encode().hex())]
    return {row for row in rows if any(form in row[1].lower() for form in spelled)}


async def delete_me(account: Account, **body: Any) -> httpx.Response:
    return await account.http.request("DELETE", "/api/v1/me", json=body or {"current_password": PASSWORD})


async def fill_every_table(admin: asyncpg.Connection, account: Account, marker: str) -> None:
    """Give someone a marked row in each table that the API above did not write."""
    who, where = account.user_id, account.workspace_id
    add = admin.execute
    await add("UPDATE users SET name = $2 WHERE id = $1", who, marker)
    await add("UPDATE sessions SET user_agent = $2, address = '203.0.113.9' WHERE user_id = $1", who, marker)
    await add("INSERT INTO identities (issuer, subject, user_id) VALUES ('clerk', $2, $1)", who, f"{marker}-subject")
    await add(
        "INSERT INTO api_keys (workspace_id, id, user_id, name, prefix, last_four, hash, scopes)"
        " VALUES ($1, $2, $3, $4, 'p', 'abcd', 'h', '[]')", where, uuid4(), who, marker,
    )  # fmt: skip
    await add(
        "INSERT INTO idempotency_keys (workspace_id, user_id, hash, fingerprint, status, headers, body, expires_at)"
        " VALUES ($1, $2, 'h', 'f', 200, '{}', $3, now() + interval '1 day')", where, who, marker.encode(),
    )  # fmt: skip
    await add(
        "INSERT INTO jobs (workspace_id, id, user_id, kind, payload, max_attempts, status)"
        " VALUES ($1, $2, $3, 'x', $4, 1, 'completed')", where, uuid4(), who, json.dumps({"x": marker}),
    )  # fmt: skip
    await add(
        "INSERT INTO audit_events (workspace_id, id, actor, user_id, action, outcome, address, user_agent, details)"
        " VALUES ($1, $2, 'user', $3, 'x', 'success', '203.0.113.9', $4, $5)",
        where, uuid4(), who, marker, json.dumps({"x": marker}),
    )  # fmt: skip
    await add(
        "INSERT INTO one_time_tokens (id, user_id, purpose, hash, email, expires_at)"
        " VALUES ($1, $2, 'reset', 'h', $3, now() + interval '1 day')", uuid4(), who, account.email,
    )  # fmt: skip
    await add(
        "INSERT INTO realtime_tickets (workspace_id, hash, user_id, expires_at) VALUES ($1, $2, $3, now())",
        where, marker.encode(), who,
    )  # fmt: skip
    await add_export(admin, who, marker.encode())


async def invite(admin: asyncpg.Connection, workspace_id: UUID, account: Account, by: UUID) -> None:
    await admin.execute(
        "INSERT INTO invitations (workspace_id, id, email, email_norm, role, invited_by, expires_at)"
        " VALUES ($1, $2, $3, $3, 'member', $4, now() + interval '1 day')",
        workspace_id, uuid4(), account.email, by,
    )  # fmt: skip
    await admin.execute(
        "INSERT INTO audit_events (workspace_id, id, actor, user_id, action, outcome, details)"
        " VALUES ($1, $2, 'user', $3, 'invitation.created', 'success', $4)",
        workspace_id, uuid4(), by, json.dumps({"email": account.email}),
    )  # fmt: skip


async def join(admin: asyncpg.Connection, account: Account, workspace_id: UUID, role: str = "member") -> None:
    await admin.execute("INSERT INTO memberships VALUES ($1, $2, $3)", workspace_id, account.user_id, role)


async def erase_now(box: Box, account: Account, admin: asyncpg.Connection) -> None:
    """Close an account and run the job of its second phase when it is due."""
    await box.service.close_account(account.user_id)
    with clock.shifted(7 * 86_400 + 1):
        await box.service.run(run_of(await job_of(admin, kind="erasure"), box.database))


# -- the first phase ---------------------------------------------------------------------------------------------------


async def test_it_is_closed_at_once(admin: asyncpg.Connection, alice: Account, client: httpx.AsyncClient) -> None:
    await admin.execute(
        "INSERT INTO api_keys (workspace_id, id, user_id, name, prefix, last_four, hash, scopes)"
        " VALUES ($1, $2, $3, 'k', 'p', 'abcd', 'h', '[]')", alice.workspace_id, uuid4(), alice.user_id,
    )  # fmt: skip
    answer = await delete_me(alice)

    assert answer.status_code == 202, answer.text
    erase_after = datetime.fromisoformat(answer.json()["data"]["erase_after"])
    assert timedelta(days=6, hours=23) < erase_after - datetime.now(UTC) < timedelta(days=7, hours=1)
    refused = await alice.http.get("/api/v1/me")
    assert (refused.status_code, refused.json()["error"]) == (401, "session_revoked")
    refreshed = await client.post("/api/v1/auth/refresh", json={"refresh_token": alice.refresh_token})
    assert refreshed.status_code == 401
    assert await admin.fetchval("SELECT count(*) FROM api_keys WHERE revoked_at IS NULL") == 0
    assert await admin.fetchval("SELECT disabled_at IS NOT NULL AND tokens_valid_after IS NOT NULL FROM users")
    assert await admin.fetchval("SELECT count(*) FROM audit_events WHERE action = 'account.erasure_requested'") == 1


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"current_password": "not the one 1"}, 403, "invalid_credentials"),
        ({}, 422, "validation_error"),
        ({"confirm": "alice@example.com"}, 422, "validation_error"),
        ({"current_password": PASSWORD, "user_id": str(uuid4())}, 422, "validation_error"),
    ],
)
async def test_it_needs_the_password(
    alice: Account, admin: asyncpg.Connection, body: dict[str, Any], status: int, error: str
) -> None:
    answer = await alice.http.request("DELETE", "/api/v1/me", json=body)

    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert (await alice.http.get("/api/v1/me")).status_code == 200
    assert await admin.fetchval("SELECT count(*) FROM erasures") == 0


async def test_one_without_a_password_is_confirmed_by_its_address_or_id(
    alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await admin.execute("DELETE FROM credentials")
    assert (await delete_me(alice, confirm=bob.email)).status_code == 422
    assert (await delete_me(alice, confirm=" Alice@Example.com ")).status_code == 202
    assert (await delete_me(bob, confirm=str(bob.user_id))).status_code == 202


async def test_a_workspace_with_members_is_not_left_without_an_owner(
    alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await join(admin, bob, alice.workspace_id, "admin")
    answer = await delete_me(alice)
    assert (answer.status_code, answer.json()["error"]) == (409, "last_owner")
    assert answer.json()["details"] == {"workspace_ids": [str(alice.workspace_id)]}

    await admin.execute("UPDATE memberships SET role = 'owner' WHERE user_id = $1", bob.user_id)
    assert (await delete_me(alice)).status_code == 202


async def test_what_is_being_written_is_asked_to_end_and_every_process_is_told(
    box: Box, alice: Account, admin: asyncpg.Connection
) -> None:
    for status in ("streaming", "queued"):
        await admin.execute(
            "INSERT INTO replies (workspace_id, id, channel, user_id, question_id, status, options, fence, attempt,"
            " appended, start_seq, cancel_requested) VALUES ($1, $2, $3, $4, $2, $5, '{}', 1, 1, 0, 0, false)",
            alice.workspace_id, uuid4(), f"conversation:{status}", alice.user_id, status,
        )  # fmt: skip
    await box.service.close_account(alice.user_id)

    assert await admin.fetchval("SELECT bool_and(cancel_requested) FROM replies")
    # Here at once, and once more as every process hears it.
    assert set(box.told) == {Revocation("user", alice.user_id)}


async def test_a_reply_that_is_being_written_ends_and_sockets_close(
    settings: Settings, admin: asyncpg.Connection
) -> None:
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url) as http:
        body = {"email": "ada@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
        token = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        conversation = (await http.post("/api/v1/conversations", json={})).json()["data"]["id"]
        sent = await http.post(f"/api/v1/conversations/{conversation}/messages", json={"text": "repeat 5000 word"})
        assert sent.status_code == 202, sent.text
        async with asyncio.timeout(10), await greet(server, token) as socket:
            while await admin.fetchval("SELECT status FROM replies") != "streaming":
                pass
            answer = await http.request("DELETE", "/api/v1/me", json={"current_password": PASSWORD})
            assert answer.status_code == 202, answer.text
            assert await socket.closed() == 4403
            while await admin.fetchval("SELECT status FROM replies") != "cancelled":
                pass


async def test_a_mail_says_when_and_how_to_come_back(box: Box, alice: Account, admin: asyncpg.Connection) -> None:
    erase_after = await box.service.close_account(alice.user_id)
    await box.service.send_notice(run_of(await job_of(admin, kind="erasure.mail"), box.database))

    (mail,) = box.mail.sent
    assert mail.to == alice.email
    assert f"{erase_after:%Y-%m-%d %H:%M} UTC" in mail.text


async def test_it_can_be_brought_back_and_then_is_not_erased(
    box: Box, alice: Account, client: httpx.AsyncClient, admin: asyncpg.Connection
) -> None:
    await box.service.close_account(alice.user_id)
    async with box.database.system_unit_of_work() as unit:
        assert await box.service.pending(unit, alice.user_id) is not None
        assert await box.service.restore(unit, alice.user_id)
        assert not await box.service.restore(unit, alice.user_id)
    with clock.shifted(8 * 86_400):
        await box.service.run(run_of(await job_of(admin, kind="erasure"), box.database))

    signed_in = await client.post("/api/v1/auth/signin", json={"email": alice.email, "password": PASSWORD})
    assert signed_in.status_code == 200


async def test_signing_in_within_the_days_offers_the_way_back(
    alice: Account, client: httpx.AsyncClient, admin: asyncpg.Connection
) -> None:
    await delete_me(alice)
    credentials = {"email": alice.email, "password": PASSWORD}
    wrong = await client.post("/api/v1/auth/signin", json={**credentials, "password": "not the one 1", "restore": True})
    assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid_credentials")
    told = await client.post("/api/v1/auth/signin", json=credentials)
    assert (told.status_code, told.json()["error"]) == (403, "account_deleted")
    assert datetime.fromisoformat(told.json()["details"]["erase_after"]) > datetime.now(UTC)

    back = await client.post("/api/v1/auth/signin", json={**credentials, "restore": True})
    assert back.status_code == 200
    assert await admin.fetchval("SELECT count(*) FROM erasures") == 0


# -- the second phase --------------------------------------------------------------------------------------------------


async def test_nothing_of_the_person_is_left_and_all_of_the_others(
    box: Box, alice: Account, bob: Account, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    """T-16: marked content in every table; the whole database is read as text."""
    carol = await sign_up("carol@example.net")
    for account, marker in ((alice, ALICE), (bob, BOB)):
        await _write(account, marker)
        await fill_every_table(admin, account, marker)
        await invite(admin, carol.workspace_id, account, carol.user_id)
    # In a workspace that stays, and in one that she has left.
    await join(admin, alice, bob.workspace_id)
    await admin.execute(
        "INSERT INTO tasks (workspace_id, id, user_id, title, completed) VALUES ($1, $2, $3, $4, false)",
        bob.workspace_id, uuid4(), alice.user_id, f"{ALICE} at bob's",
    )  # fmt: skip
    await admin.execute(
        "INSERT INTO conversations (workspace_id, id, owner_id, title, assistant, shared, archived)"
        " VALUES ($1, $2, $3, $4, 'general', false, false)",
        carol.workspace_id, uuid4(), alice.user_id, f"{ALICE} at carol's",
    )  # fmt: skip
    await admin.execute(
        "INSERT INTO audit_events (workspace_id, id, actor, user_id, action, outcome, details)"
        " VALUES ($1, $2, 'user', $3, 'member.removed', 'success', '{}')", carol.workspace_id, uuid4(), alice.user_id,
    )  # fmt: skip
    before = await everything(admin)
    marked = {table for table, _ in holding(before, ALICE, alice.email)}
    assert marked >= {
        "users", "sessions", "identities", "api_keys", "idempotency_keys", "jobs", "audit_events", "conversations",
        "messages", "tasks", "channel_events", "one_time_tokens", "realtime_tickets", "export_chunks", "invitations",
    }  # fmt: skip

    await erase_now(box, alice, admin)

    after = await everything(admin)
    assert holding(after, ALICE, alice.email, "alice@") == set()
    # The opaque id stays where it says nothing: the ledger, and what was done.
    assert {table for table, _ in holding(after, str(alice.user_id))} <= {"erasures", "audit_events", "jobs"}
    assert holding(after, str(alice.workspace_id)) == set()
    his = holding(before, BOB, bob.email)
    assert his - after == set()
    assert len(his) >= 15


async def test_the_audit_log_keeps_what_was_done_without_who(
    box: Box, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await join(admin, alice, bob.workspace_id)
    await admin.execute(
        "INSERT INTO audit_events (workspace_id, id, actor, user_id, action, outcome, address, user_agent, details)"
        " VALUES ($1, $2, 'user', $3, 'member.removed', 'success', '203.0.113.9', 'Firefox', '{\"a\": 1}')",
        bob.workspace_id, uuid4(), alice.user_id,
    )  # fmt: skip
    await erase_now(box, alice, admin)

    row = await admin.fetchrow(
        "SELECT * FROM audit_events WHERE workspace_id = $1 AND user_id = $2", bob.workspace_id, alice.user_id
    )
    assert row is not None
    assert row["action"] == "member.removed"
    assert (row["address"], row["user_agent"], row["details"]) == (None, None, "{}")
    assert (
        await admin.fetchval("SELECT count(*) FROM audit_events WHERE action = 'account.erased' AND actor = 'system'")
        == 1
    )


async def test_identities_leave_a_tombstone_that_says_nothing(
    box: Box, alice: Account, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        "INSERT INTO identities (issuer, subject, user_id) VALUES ('clerk', 'a@b.c', $1)", alice.user_id
    )
    await erase_now(box, alice, admin)

    (row,) = await admin.fetch("SELECT issuer, subject, user_id, deleted_at FROM identities")
    assert row["issuer"] == "clerk"
    assert row["subject"].startswith("erased:")
    assert "a@b.c" not in row["subject"]
    assert row["user_id"] is None
    assert row["deleted_at"] is not None


async def test_it_waits_for_its_day(box: Box, alice: Account, admin: asyncpg.Connection) -> None:
    await box.service.close_account(alice.user_id)
    job = await job_of(admin, kind="erasure")
    assert job["run_at"] - datetime.now(UTC) > timedelta(days=6, hours=23)
    await box.service.run(run_of(job, box.database))
    assert await admin.fetchval("SELECT count(*) FROM users") == 1


@pytest.mark.parametrize("broken", range(6))
async def test_an_erasure_that_is_cut_off_anywhere_is_finished_by_the_next_attempt(
    box: Box, alice: Account, admin: asyncpg.Connection, broken: int
) -> None:
    await _write(alice, ALICE)
    await box.service.close_account(alice.user_id)
    parts = list(box.service._parts)

    class Broken:
        async def erase(self, *_: object) -> None:
            raise ConnectionError

    box.service._parts = [*parts[:broken], Broken(), *parts[broken:]]  # type: ignore[list-item]  # half a part
    with clock.shifted(8 * 86_400):
        job = run_of(await job_of(admin, kind="erasure"), box.database)
        with pytest.raises(ConnectionError):
            await box.service.run(job)
        box.service._parts = parts
        await box.service.run(job)
        await box.service.run(job)

    assert holding(await everything(admin), ALICE, alice.email) == set()


async def test_nobody_is_erased_who_is_not_in_the_ledger(box: Box, alice: Account) -> None:
    with pytest.raises(JobFailed):
        await box.service.erase(alice.user_id)
    with pytest.raises(AccountNotFound):
        await box.service.close_account(uuid4())


# -- after a restore ---------------------------------------------------------------------------------------------------


async def test_after_a_restore_the_ledger_is_applied_again(
    box: Box, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    """O-05: the person is back with the backup, and the ledger, kept outside it, ends that."""
    await _write(alice, ALICE)
    await erase_now(box, alice, admin)
    await box.service.close_account(bob.user_id)
    kept = render_ledger(await box.service.ledger())
    # The backup, from before both.
    await admin.execute("DELETE FROM erasures")
    await admin.execute("DELETE FROM jobs")
    await admin.execute(
        "INSERT INTO users (id, email, email_norm, email_verified) VALUES ($1, $2, $2, false)",
        alice.user_id,
        alice.email,
    )
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, $2, true)", alice.workspace_id, ALICE)
    await join(admin, alice, alice.workspace_id, "owner")
    await join(admin, bob, alice.workspace_id)
    await admin.execute("UPDATE users SET disabled_at = NULL, tokens_valid_after = NULL")

    assert await box.service.take_in(parse_ledger(kept)) == 2
    assert await box.service.reapply() == [alice.user_id]

    assert holding(await everything(admin), alice.email) == set()
    # The workspace of others stays, and has an owner again.
    assert await admin.fetchval("SELECT role FROM memberships WHERE workspace_id = $1", alice.workspace_id) == "owner"
    assert await admin.fetchval("SELECT disabled_at IS NOT NULL FROM users WHERE id = $1", bob.user_id)
    assert await admin.fetchval("SELECT payload->>'user_id' FROM jobs WHERE kind = 'erasure'") == str(bob.user_id)
    assert await box.service.reapply() == [alice.user_id]


async def test_the_ledgers_file_is_read_as_it_was_written(box: Box, alice: Account, bob: Account) -> None:
    for account in (alice, bob):
        await box.service.close_account(account.user_id)
    entries = await box.service.ledger()

    assert parse_ledger(render_ledger(entries)) == entries
    for text in ("{}", "no json", '{"user_id": "x", "requested_at": "2026-01-01", "erase_after": "y", "erased_at": null}',
                 json.dumps({"user_id": str(uuid4()), "requested_at": "2026-01-01T00:00:00",
                             "erase_after": "2026-01-01T00:00:00", "erased_at": None})):  # fmt: skip
        with pytest.raises(LedgerInvalid):
            parse_ledger(text)


async def test_two_requests_at_once_are_one(box: Box, alice: Account, admin: asyncpg.Connection) -> None:
    await asyncio.gather(*(box.service.close_account(alice.user_id) for _ in range(3)))
    assert await admin.fetchval("SELECT count(*) FROM erasures") == 1
    with clock.shifted(8 * 86_400):
        jobs = [
            await job_of(admin, row["id"], "erasure")
            for row in await admin.fetch("SELECT id FROM jobs WHERE kind = 'erasure'")
        ]
        for job in jobs:
            await box.service.run(run_of(job, box.database))
    assert await admin.fetchval("SELECT count(*) FROM users") == 0


async def test_the_last_owner_is_refused_to_operators_too(
    box: Box, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await join(admin, bob, alice.workspace_id)
    with pytest.raises(LastOwner):
        await box.service.close_account(alice.user_id, actor="operator")
