"""Jobs over HTTP and in the inbox: one's own, of the kinds that are shown."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core.db import Database, DatabaseUrls
from parley.core.ids import new_id
from parley.core.scope import NO_WORKSPACE
from parley.core.settings import JobSettings
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobRun, JobType
from tests.conftest import Account, make_settings
from tests.jobs.conftest import until
from tests.live import greet, live


@pytest.fixture
async def app(app: FastAPI) -> FastAPI:
    """The application, with kinds that never get anywhere."""

    async def handle(_: JobRun) -> None:
        await asyncio.Event().wait()

    app.state.jobs.registry.add(JobType("counting", handle))
    app.state.jobs.registry.add(JobType("silent", handle, shown=False))
    return app


async def add(app: FastAPI, account: Account, kind: str = "counting", **options: Any) -> UUID:
    """Add a job of someone's."""
    database: Database = app.state.database
    options = {"workspace_id": account.workspace_id, "user_id": account.user_id, **options}
    async with database.system_unit_of_work() as unit:
        return await enqueue(unit, kind, {"secret": "payload"}, **options)


async def test_a_job_as_its_user_sees_it(app: FastAPI, alice: Account) -> None:
    id_ = await add(app, alice)

    async def runs() -> bool:
        return bool((await alice.http.get(f"/api/v1/jobs/{id_}")).json()["data"]["status"] == "running")

    await until(runs)
    answer = await alice.http.get(f"/api/v1/jobs/{id_}")
    assert answer.status_code == 200
    job = answer.json()["data"]
    assert job["id"] == str(id_)
    assert job["started_at"] >= job["created_at"]
    del job["id"], job["created_at"], job["started_at"]
    assert job == {
        "kind": "counting", "status": "running", "progress": None, "result": None, "error": None, "attempts": 1,
        "finished_at": None,
    }  # fmt: skip
    assert "payload" not in answer.text


async def test_the_list_is_paged_newest_first_and_filtered(app: FastAPI, alice: Account, admin: Any) -> None:
    ids = [str(await add(app, alice, kind="counting")) for _ in range(3)]
    await admin.execute("UPDATE jobs SET status = 'failed', owner = NULL WHERE id = $1", UUID(ids[1]))
    page = (await alice.http.get("/api/v1/jobs?per_page=2")).json()
    assert [job["id"] for job in page["data"]] == [ids[2], ids[1]]
    assert (page["meta"]["page"], page["meta"]["per_page"], page["meta"]["total"]) == (1, 2, 3)
    assert [job["id"] for job in (await alice.http.get("/api/v1/jobs?per_page=2&page=2")).json()["data"]] == [ids[0]]
    failed = (await alice.http.get("/api/v1/jobs?status=failed")).json()
    assert [job["id"] for job in failed["data"]] == [ids[1]]
    assert (await alice.http.get("/api/v1/jobs?status=lost")).status_code == 422


async def test_nobody_sees_what_is_not_theirs(
    app: FastAPI, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    hers = await add(app, alice)
    nobodys = await add(app, alice, user_id=None)
    installation = await add(app, alice, workspace_id=NO_WORKSPACE)
    hidden = await add(app, alice, kind="silent")
    unknown = await add(app, alice, kind="from a newer version")
    all_of_them = [hers, nobodys, installation, hidden, unknown]
    assert await admin.fetchval("SELECT count(*) FROM jobs WHERE id = ANY($1)", all_of_them) == 5

    # A member of the same workspace, and one of another.
    carol = await add(app, alice, user_id=new_id())
    for account, own in ((alice, {str(hers)}), (bob, set())):
        seen = (await account.http.get("/api/v1/jobs")).json()
        assert ({job["id"] for job in seen["data"]}, seen["meta"]["total"]) == (own, len(own))
        for id_ in (*all_of_them, carol):
            answer = await account.http.get(f"/api/v1/jobs/{id_}")
            assert answer.status_code == (200 if str(id_) in own else 404), answer.text


async def test_a_credential_is_asked_for(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/jobs")).status_code == 401
    assert (await client.get(f"/api/v1/jobs/{new_id()}")).status_code == 401


async def test_progress_arrives_on_a_live_socket(tmp_path: Path, urls: DatabaseUrls) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def handle(run: JobRun) -> dict[str, Any]:
        begun.set()
        await run.progress(1, 2, "pages")
        await go.wait()
        return {"pages": 2}

    settings = make_settings(tmp_path, urls, job=JobSettings(poll_s=0.05))
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url) as http:
        server.app.state.jobs.registry.add(JobType("counting", handle))
        body = {"email": "ada@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        account = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]
        token = account["access_token"]
        async with await greet(server, token, subs=[{"ch": "user:me"}]) as socket:
            assert (await socket.of_type("snap"))["state"]["jobs"] == []
            async with server.app.state.database.system_unit_of_work() as unit:
                ids: dict[str, Any] = {
                    "workspace_id": UUID(account["workspace"]["id"]),
                    "user_id": UUID(account["user"]["id"]),
                }
                id_ = await enqueue(unit, "counting", {}, **ids)
            halfway = await socket.until(lambda f: f.get("e") == "job.updated" and bool(f["d"]["progress"]))
            assert halfway["d"]["progress"] == {"done": 1, "total": 2, "note": "pages"}
            # Who comes now finds it in the state, as the API shows it.
            async with await greet(server, token, subs=[{"ch": "user:me"}]) as other:
                (job,) = (await other.of_type("snap"))["state"]["jobs"]
                assert job == halfway["d"]
                answer = await http.get(f"/api/v1/jobs/{id_}", headers={"Authorization": f"Bearer {token}"})
                assert answer.json()["data"] == job
            go.set()
            ended = await socket.until(lambda f: f.get("e") == "job.updated" and f["d"]["status"] == "completed")
            assert ended["d"]["result"] == {"pages": 2}
            states = [f["d"]["status"] for f in socket.frames if f.get("e") == "job.updated"]
            assert states == ["running", "running", "completed"]
            # What has ended is not unfinished.
            async with await greet(server, token, subs=[{"ch": "user:me"}]) as other:
                assert (await other.of_type("snap"))["state"]["jobs"] == []
