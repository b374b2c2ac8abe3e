"""Export of a user's data: only theirs, all of it, once."""

import asyncio
import io
import json
import re
import secrets
import zipfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import RateLimited
from parley.core.mail import Mail
from parley.core.personal_data import Person, Record
from parley.identity.exports import ExportNotFound, ExportRunning, ExportService, SignInAgain
from parley.jobs.inprocess import InProcessDispatcher
from parley.jobs.registry import JobFailed, JobRun
from parley.main import PERSONAL_DATA
from tests.conftest import Account, SignUp

ALICE, BOB = "zebra-4711", "okapi-0815"


class Outbox:
    """A mailer that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Mail] = []

    async def send(self, mail: Mail) -> None:
        self.sent.append(mail)


class Box:
    """The service with a mailer of the test's, on the test's application."""

    def __init__(self, app: FastAPI) -> None:
        self.database: Database = app.state.database
        self.mail = Outbox()
        self.service = ExportService(self.database, PERSONAL_DATA, mailer=self.mail, base_url="https://parley.test")


async def _not_yet(_: InProcessDispatcher) -> None:
    pass


@pytest.fixture(autouse=True)
def jobs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run the jobs themselves, at the moment that they mean."""
    monkeypatch.setattr(InProcessDispatcher, "start", _not_yet)


@pytest.fixture
async def box(app: FastAPI) -> Box:
    return Box(app)


async def job_of(admin: asyncpg.Connection, id: UUID | None = None, kind: str = "export") -> dict[str, Any]:
    row = await admin.fetchrow(
        "SELECT * FROM jobs WHERE kind = $1 AND ($2::uuid IS NULL OR id = $2) ORDER BY created_at DESC, id DESC LIMIT 1",
        kind,
        id,
    )
    assert row is not None
    return {**dict(row), "payload": json.loads(row["payload"])}


def run_of(job: dict[str, Any], database: Database, attempt: int = 1, **more: Any) -> JobRun:
    return JobRun(
        id=job["id"],
        workspace_id=job["workspace_id"],
        user_id=job["user_id"],
        payload=job["payload"],
        attempt=attempt,
        database=database,
        **more,
    )


async def add_export(admin: asyncpg.Connection, user_id: UUID, data: bytes = b"a file", **columns: Any) -> UUID:
    """Put a finished export there."""
    id_ = uuid4()
    await admin.execute(
        "INSERT INTO exports (id, user_id, size, expires_at, created_at) VALUES ($1, $2, $3, $4, $5)",
        id_,
        user_id,
        len(data),
        columns.get("expires_at", datetime.now(UTC) + timedelta(hours=1)),
        columns.get("created_at", datetime.now(UTC)),
    )
    await admin.execute("INSERT INTO export_chunks (export_id, number, data) VALUES ($1, 0, $2)", id_, data)
    return id_


async def _write(account: Account, marker: str) -> None:
    made = await account.http.post("/api/v1/conversations", json={"title": f"{marker} talk"})
    conversation = made.json()["data"]["id"]
    sent = await account.http.post(
        f"/api/v1/conversations/{conversation}/messages",
        json={"text": f"{marker} said"},
        headers={"Accept": "text/event-stream"},
    )
    assert "event: reply.completed" in sent.text
    assert (await account.http.post("/api/v1/tasks", json={"title": f"{marker} chore"})).status_code == 201


async def _join(admin: asyncpg.Connection, account: Account, workspace_id: UUID) -> None:
    """Make someone a member of a workspace, and move their session there."""
    await admin.execute("INSERT INTO memberships VALUES ($1, $2, 'member')", workspace_id, account.user_id)


def _scope_of(account: Account, app: FastAPI) -> Any:
    return app.state.authenticator.authenticate(account.access_token)


async def packed(box: Box, app: FastAPI, admin: asyncpg.Connection, account: Account) -> tuple[dict[str, Any], bytes]:
    """Ask for an export, run its job, fetch it."""
    scope = (await _scope_of(account, app)).scope
    job = await job_of(admin, await box.service.request(scope))
    result = await box.service.run(run_of(job, box.database))
    file = await box.service.open(scope, UUID(result["export_id"]))
    data = b"".join([piece async for piece in file.pieces])
    assert len(data) == file.size == result["size"]
    return result, data


def read_zip(data: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: json.loads(archive.read(name)) for name in archive.namelist()}


async def test_an_export_holds_all_of_the_users_and_nothing_of_anyone_elses(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account, bob: Account, sign_up: SignUp
) -> None:
    """T-16: two users with marked content, in two workspaces, one of which they share."""
    await _write(alice, ALICE)
    await _write(bob, BOB)
    await _join(admin, bob, alice.workspace_id)
    await admin.execute(
        "INSERT INTO tasks (workspace_id, id, user_id, title, completed) VALUES ($1, $2, $3, $4, false)",
        alice.workspace_id, uuid4(), bob.user_id, f"{BOB} in alice's",
    )  # fmt: skip
    await admin.execute(
        "INSERT INTO api_keys (workspace_id, id, user_id, name, prefix, last_four, hash, scopes)"
        " VALUES ($1, $2, $3, 'k', 'parley', 'abcd', $4, '[]')",
        alice.workspace_id, uuid4(), alice.user_id, b"secret-hash",
    )  # fmt: skip

    _, hers = await packed(box, app, admin, alice)
    _, his = await packed(box, app, admin, bob)

    mine, theirs = read_zip(hers), read_zip(his)
    text = json.dumps(mine)
    for word in ("talk", "said", "chore"):
        assert f"{ALICE} {word}" in text
    for stranger in (BOB, bob.email, str(bob.user_id)):
        assert stranger not in text
    assert f"{BOB} in alice's" in json.dumps(theirs[f"workspaces/{alice.workspace_id}/tasks.json"])
    for stranger in (ALICE, alice.email, str(alice.user_id)):
        assert stranger not in json.dumps(theirs)
    assert {row["id"] for row in theirs["memberships.json"]} == {str(alice.workspace_id), str(bob.workspace_id)}
    assert mine["profile.json"][0]["email"] == alice.email
    # Roles of messages: the replies are hers too.
    messages = mine[f"workspaces/{alice.workspace_id}/messages.json"]
    assert [row["role"] for row in messages] == ["user", "assistant"]


async def test_an_export_holds_no_secret(box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account) -> None:
    await admin.execute(
        "INSERT INTO api_keys (workspace_id, id, user_id, name, prefix, last_four, hash, scopes)"
        " VALUES ($1, $2, $3, 'k', 'parley', 'abcd', $4, '[]')",
        alice.workspace_id, uuid4(), alice.user_id, b"secret-hash",
    )  # fmt: skip
    _, data = await packed(box, app, admin, alice)

    entries = read_zip(data)
    words = set(re.findall(r'"(\w+)":', json.dumps(entries)))
    assert not words & {"hash", "salt", "counter", "password_hash", "body_hash", "token"}
    assert b"secret-hash".hex() not in json.dumps(entries)
    assert entries["api_keys.json"][0]["last_four"] == "abcd"
    assert entries["sessions.json"][0]["workspace_id"] == str(alice.workspace_id)


async def test_entries_are_named_by_fixed_words_and_ids(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    await alice.http.patch("/api/v1/me", json={"name": "../../etc/passwd"})
    await _write(alice, "../../evil")
    _, data = await packed(box, app, admin, alice)

    name = re.compile(r"[a-z_]+\.json|workspaces/[0-9a-f-]{36}/[a-z_]+\.json")
    assert all(name.fullmatch(entry) for entry in read_zip(data))


class Long:
    """More rows than a piece holds, and than a page."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        for number in range(1200):
            # Random, so that compression does not make it small.
            yield Record("long.json", json.dumps({"n": number, "x": secrets.token_hex(600)}))

    async def erase(self, database: Database, person: Person) -> None:
        raise NotImplementedError


async def test_a_long_export_is_kept_in_pieces_and_reports_its_progress(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    service = ExportService(box.database, [Long()], mailer=box.mail, base_url="")
    scope = (await _scope_of(alice, app)).scope
    job = await job_of(admin, await service.request(scope))
    told: list[int] = []

    async def report(done: int, total: int | None, note: str | None) -> None:
        told.append(done)

    result = await service.run(run_of(job, box.database, report=report))

    sizes = [row[0] for row in await admin.fetch("SELECT octet_length(data) FROM export_chunks ORDER BY number")]
    assert len(sizes) > 2
    assert max(sizes) == 256 * 1024 == sizes[0]
    assert sum(sizes) == result["size"]
    assert told == [500, 1000]
    file = await service.open(scope, UUID(result["export_id"]))
    rows = read_zip(b"".join([piece async for piece in file.pieces]))["long.json"]
    assert [row["n"] for row in rows] == list(range(1200))


async def test_an_attempt_that_was_cut_off_leaves_nothing_in_the_file(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    scope = (await _scope_of(alice, app)).scope
    job = await job_of(admin, await box.service.request(scope))
    export_id = UUID(job["payload"]["export_id"])
    await admin.execute("INSERT INTO export_chunks VALUES ($1, $2, 'rubbish')", export_id, 2**20)

    await box.service.run(run_of(job, box.database, attempt=2))

    file = await box.service.open(scope, export_id)
    assert "profile.json" in read_zip(b"".join([piece async for piece in file.pieces]))


async def test_one_runs_at_a_time_and_two_a_day(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    scope = (await _scope_of(alice, app)).scope
    asked = await asyncio.gather(*(box.service.request(scope) for _ in range(4)), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in asked) == ["ExportRunning"] * 3 + ["UUID"]

    await box.service.run(run_of(await job_of(admin), box.database))
    await box.service.run(run_of(await job_of(admin, await box.service.request(scope)), box.database))
    with pytest.raises(RateLimited) as refused:
        await box.service.request(scope)
    assert 86_000 < (refused.value.retry_after_s or 0) <= 86_401


async def test_one_that_failed_for_good_does_not_block_the_next(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    class Broken(Long):
        async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
            yield Record("a.json", "{}")
            raise ConnectionError

    scope = (await _scope_of(alice, app)).scope
    broken = ExportService(box.database, [Broken()], mailer=box.mail, base_url="")
    job = await job_of(admin, await broken.request(scope))
    with pytest.raises(ConnectionError):
        await broken.run(run_of(job, box.database, attempt=1))
    with pytest.raises(ExportRunning):
        await broken.request(scope)
    with pytest.raises(ConnectionError):
        await broken.run(run_of(job, box.database, attempt=3))
    await broken.request(scope)


async def test_the_link_in_the_mail_works_once_without_a_fresh_session(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    scope = (await _scope_of(alice, app)).scope
    result = await box.service.run(run_of(await job_of(admin, await box.service.request(scope)), box.database))
    await box.service.send_link(run_of(await job_of(admin, kind="export.mail"), box.database))
    export_id = UUID(result["export_id"])

    (mail,) = box.mail.sent
    assert mail.to == alice.email
    found = re.search(r"https://parley\.test/export#id=([0-9a-f-]+)&token=([\w-]+)", mail.text)
    assert found is not None
    assert UUID(found.group(1)) == export_id
    token = found.group(2)
    stored = await admin.fetchval("SELECT hash FROM exports WHERE id = $1", export_id)
    assert token.encode() not in stored

    with pytest.raises(SignInAgain):
        await box.service.open(scope, export_id, token="x" * 43)
    with clock.shifted(601):
        with pytest.raises(SignInAgain):
            await box.service.open(scope, export_id)
        assert (await box.service.open(scope, export_id, token=token)).size > 0
        with pytest.raises(ExportNotFound):
            await box.service.open(scope, export_id, token=token)


async def test_the_payloads_and_the_result_hold_no_token(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    scope = (await _scope_of(alice, app)).scope
    result = await box.service.run(run_of(await job_of(admin, await box.service.request(scope)), box.database))
    assert set(result) == {"export_id", "expires_at", "size"}
    assert {key for (key,) in await admin.fetch("SELECT DISTINCT json_object_keys(payload) FROM jobs")} <= {
        "export_id",
        "user_id",
        "template",
    }


async def test_of_two_downloads_at_once_one_wins(app: FastAPI, admin: asyncpg.Connection, alice: Account) -> None:
    export_id = await add_export(admin, alice.user_id)
    answers = await asyncio.gather(*(alice.http.get(f"/api/v1/me/exports/{export_id}") for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [200, 404, 404, 404, 404]
    assert await admin.fetchval("SELECT count(*) FROM export_chunks") == 0


async def test_a_download_is_an_attachment_that_nobody_keeps(
    admin: asyncpg.Connection, alice: Account, bob: Account
) -> None:
    export_id = await add_export(admin, alice.user_id, b"all of it")
    theirs = await bob.http.get(f"/api/v1/me/exports/{export_id}")
    nobodys = await bob.http.get(f"/api/v1/me/exports/{uuid4()}")
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.json()["errors"] == nobodys.json()["errors"]

    answer = await alice.http.get(f"/api/v1/me/exports/{export_id}")
    assert answer.content == b"all of it"
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-length"] == "9"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-disposition"] == f'attachment; filename="parley-export-{export_id}.zip"'
    written = await admin.fetchval("SELECT count(*) FROM audit_events WHERE action = 'account.export_downloaded'")
    assert written == 1


async def test_an_expired_export_is_gone_and_swept(box: Box, admin: asyncpg.Connection, alice: Account) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    export_id = await add_export(admin, alice.user_id, expires_at=past)
    kept = await add_export(admin, alice.user_id)
    assert (await alice.http.get(f"/api/v1/me/exports/{export_id}")).status_code == 404

    await box.service.sweep(
        run_of({"id": uuid4(), "workspace_id": uuid4(), "user_id": None, "payload": {}}, box.database)
    )

    assert await admin.fetchval("SELECT array_agg(export_id) FROM export_chunks") == [kept]
    assert {row[0] for row in await admin.fetch("SELECT id FROM exports")} == {export_id, kept}


async def test_an_export_of_an_account_that_is_gone_fails_for_good(
    box: Box, app: FastAPI, admin: asyncpg.Connection, alice: Account
) -> None:
    scope = (await _scope_of(alice, app)).scope
    job = await job_of(admin, await box.service.request(scope))
    await admin.execute("DELETE FROM exports")
    with pytest.raises(JobFailed):
        await box.service.run(run_of(job, box.database))


async def test_asking_over_http_gives_the_job(
    client: httpx.AsyncClient, alice: Account, admin: asyncpg.Connection
) -> None:
    answer = await alice.http.post("/api/v1/me/export")
    assert answer.status_code == 202
    job = answer.json()["data"]["job"]
    assert job == {"id": job["id"], "kind": "export", "status": "queued"}
    row = await admin.fetchrow("SELECT workspace_id, user_id FROM jobs WHERE id = $1", UUID(job["id"]))
    assert row is not None
    assert (row["workspace_id"], row["user_id"]) == (alice.workspace_id, alice.user_id)
    assert (await client.post("/api/v1/me/export")).status_code == 401
