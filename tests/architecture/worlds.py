"""Two workspaces with people and their things, on an application that has lost some of its layers of isolation."""

import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from httpx_ws import AsyncWebSocketSession, aconnect_ws
from httpx_ws.transport import ASGIWebSocketTransport
from sqlalchemy import Select, select, true
from sqlalchemy.sql.elements import BinaryExpression, BooleanClauseList

from parley.chat.repository import ConversationRepository
from parley.chat.transfer import importing
from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.repository import Prepared, ScopedRepository
from parley.core.scope import NO_WORKSPACE, Role, Scope
from parley.identity import erasures, exports, mails
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobRun, JobType
from parley.tasks.schemas import TaskRead
from parley.tasks.service import TaskReader
from tests.conftest import TestDatabases, http_client, make_settings, running
from tests.documented import DocumentedSession, documented

MARKER = "zebra-4711"
"""In every text of alice's: no answer to anyone else may hold it."""

JOB_KIND = "chore"


class Layers(StrEnum):
    """Which layers of isolation are there."""

    ALL = "all layers"
    NO_FILTERS = "without the repositories' filters"
    NO_POLICIES = "without row-level security"
    NONE = "without both"


@dataclass(frozen=True)
class Things:
    """The ids of what a person has, by the names that recipes use."""

    user: UUID
    workspace: UUID
    conversation: UUID
    message: UUID
    reply: UUID
    task: UUID
    api_key: UUID
    job: UUID
    export: UUID
    session: UUID
    invitation: UUID
    assistant: UUID
    tool_call: UUID
    attachment: UUID

    @classmethod
    def random(cls) -> "Things":
        """Return ids of nothing, made as real ones are."""
        return cls(*(new_id() for _ in fields(cls)))

    def __iter__(self) -> Iterator[str]:
        return (str(value) for value in vars(self).values())


@dataclass
class Person:
    """Someone signed in, with one of everything."""

    name: str
    http: httpx.AsyncClient
    token: str
    things: Things
    cid: UUID


@dataclass
class World:
    """Alice has things; bob is in another workspace, carol in hers. Neither may see or touch what alice has."""

    layers: Layers
    app: FastAPI
    admin: asyncpg.Connection
    alice: Person
    bob: Person
    carol: Person

    @property
    def intruders(self) -> tuple[Person, ...]:
        """Who must be kept out: inside a workspace what is private is the repositories' rule, so not without them."""
        return (self.bob,) if self.layers is Layers.NO_FILTERS else (self.bob, self.carol)

    async def rows(self) -> set[tuple[str, str]]:
        """Return every row of the database as text, past all policies."""
        tables = await self.admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
        found = set()
        for (table,) in tables:
            # What the installation has to do is done whether anyone calls or not.
            own = f" WHERE workspace_id <> '{NO_WORKSPACE}'" if table == "jobs" else ""
            # When a credential was last used moves by itself.
            rows = await self.admin.fetch(f"SELECT (to_jsonb(t) - 'last_used_at')::text FROM {table} t{own}")
            found |= {(table, text) for (text,) in rows}
        return found


# -- taking layers away ------------------------------------------------------------------------------------------------

_COLUMNS = ("workspace_id", "owner_id", "user_id")
# The parameter stays in the statement, since it is still given.
_CONDITION = re.compile(r"(?:\b\w+\.)?\b(?:workspace_id|owner_id) = (\$[12])(?!\d)")


def _without_conditions(statement: Select[Any]) -> Select[Any]:
    where = statement.whereclause
    clauses = list(where.clauses) if isinstance(where, BooleanClauseList) else [where] if where is not None else []
    kept = [
        clause
        for clause in clauses
        if not (isinstance(clause, BinaryExpression) and getattr(clause.left, "name", None) in _COLUMNS)
    ]
    return select(*statement.selected_columns).where(*kept)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


def remove_filters(patch: pytest.MonkeyPatch) -> int:
    """Take the scope's condition out of every statement of the repositories; return how many lost theirs."""
    removed = 0
    for repository in (ScopedRepository, *_subclasses(ScopedRepository)):
        if "_visible" in vars(repository):
            patch.setattr(repository, "_visible", lambda _: true())
            removed += 1
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("parley.") or name.rpartition(".")[2] not in {"repository", "log", "runs"}:
            continue
        for constant, value in list(vars(module).items()):
            changed: object = value
            if isinstance(value, str) and constant.startswith("_") and not constant.startswith("__"):
                changed = _CONDITION.sub(r"\1::uuid IS NOT NULL", value)
            elif isinstance(value, Prepared):
                changed = Prepared(_without_conditions(value.statement))
            if changed is not value and changed != value:
                patch.setattr(module, constant, changed)
                removed += 1
    # A second look at every row, above the repository's statements.
    patch.setattr(TaskReader, "_own", lambda _, row: TaskRead.model_construct(**row))
    patch.setattr(ConversationRepository, "_check", lambda _, row, owner: None)
    patch.setattr(ConversationRepository, "mine", true())
    return removed + 3


async def remove_policies(admin: asyncpg.Connection) -> None:
    """Switch row-level security off on every table."""
    for (table,) in await admin.fetch("SELECT oid::regclass::text FROM pg_class WHERE relrowsecurity"):
        await admin.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")


# -- people ------------------------------------------------------------------------------------------------------------


async def _signed_up(app: FastAPI, name: str) -> tuple[httpx.AsyncClient, dict[str, Any]]:
    http = http_client(app)
    body = {"email": f"{name}@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
    answer = await http.post("/api/v1/auth/signup", json=body)
    assert answer.status_code == 201, answer.text
    return http, answer.json()["data"]


async def fill(http: httpx.AsyncClient, text: str, *, user: UUID, workspace: UUID, cid: UUID) -> Things:
    """Make a conversation with an answered message, a task, an API key, and a job that has been done."""
    made = await http.post("/api/v1/conversations", json={"title": f"{text} talk"})
    assert made.status_code == 201, made.text
    conversation = made.json()["data"]["id"]
    # As a stream the answer ends with the reply, so nothing is being written any more.
    headers = {"Accept": "text/event-stream", "Idempotency-Key": str(cid)}
    path = f"/api/v1/conversations/{conversation}/messages"
    sent = await http.post(path, json={"text": f"{text} question"}, headers=headers)
    assert "event: reply.completed" in documented().streamed(sent.text), sent.text
    question, reply = (await http.get(path)).json()["data"]
    task = (await http.post("/api/v1/tasks", json={"title": f"{text} chore"})).json()["data"]
    key = (await http.post("/api/v1/api-keys", json={"name": f"{text} key"})).json()["data"]
    ids = (conversation, question["id"], reply["id"], task["id"], key["id"])
    job = await _job(http, text, user=user, workspace=workspace)
    export = await _export(http, text, user=user)
    sessions = (await http.get("/api/v1/auth/sessions")).json()["data"]
    session = next(session["id"] for session in sessions if session["current"])
    invited = await http.post(
        f"/api/v1/workspaces/{workspace}/invitations",
        json={"email": f"{text.replace(' ', '-')}-{new_id()}@example.org"},
    )
    assert invited.status_code == 201, invited.text
    invitation = invited.json()["data"]["id"]
    budget = {"subject": "user", "subject_id": str(user), "period": "day", "limit": "1000"}
    assert (await http.put("/api/v1/budgets", json={"budgets": [budget]})).status_code == 200
    helper = {"name": f"a{new_id().hex}", "title": f"{text} helper", "instructions": f"{text} rules"}
    assistant = (await http.post("/api/v1/assistants", json=helper)).json()["data"]["id"]
    tool_call = await _tool_call(http, text, user=user, workspace=workspace, reply=UUID(reply["id"]))
    file = await http.post("/api/v1/attachments", params={"name": f"{text}.txt"}, content=f"{text} file".encode())
    assert file.status_code == 201, file.text
    attachment = file.json()["data"]["id"]
    rest = (*ids, str(job), str(export), session, invitation, assistant, str(tool_call), attachment)
    return Things(user, workspace, *(UUID(id_) for id_ in rest))


async def _job(http: httpx.AsyncClient, text: str, *, user: UUID, workspace: UUID) -> UUID:
    transport = http._transport
    assert isinstance(transport, httpx.ASGITransport)
    database: Database = transport.app.state.database  # type: ignore[attr-defined]  # an ASGI callable to httpx
    id_ = new_id()
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        await connection.execute(
            "INSERT INTO jobs (workspace_id, id, user_id, kind, status, payload, result, max_attempts) "
            "VALUES ($1, $2, $3, $4, 'completed', '{}', $5, 1)",
            workspace, id_, user, JOB_KIND, json.dumps({"chore": text}),
        )  # fmt: skip
    return id_


async def _tool_call(http: httpx.AsyncClient, text: str, *, user: UUID, workspace: UUID, reply: UUID) -> UUID:
    transport = http._transport
    assert isinstance(transport, httpx.ASGITransport)
    database: Database = transport.app.state.database  # type: ignore[attr-defined]  # an ASGI callable to httpx
    id_ = new_id()
    async with database.unit_of_work(Scope(workspace, user, Role.MEMBER)) as unit:
        connection = await unit.driver()
        await connection.execute(
            "INSERT INTO tool_approvals (workspace_id, id, reply_id, user_id, tool, arguments, arguments_hash,"
            " approved, decided_by, decided_at, expires_at)"
            " VALUES ($1, $2, $3, $4, 'add_task', $5, '', true, $4, now(), now())",
            workspace, id_, reply, user, json.dumps({"title": text}),
        )  # fmt: skip
    return id_


async def _export(http: httpx.AsyncClient, text: str, *, user: UUID) -> UUID:
    transport = http._transport
    assert isinstance(transport, httpx.ASGITransport)
    database: Database = transport.app.state.database  # type: ignore[attr-defined]  # an ASGI callable to httpx
    id_, data = new_id(), f"{text} data".encode()
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        await connection.execute(
            "INSERT INTO exports (id, user_id, size, created_at, expires_at)"
            " VALUES ($1, $2, $3, now() - interval '2 days', now() + interval '1 hour')",
            id_, user, len(data),
        )  # fmt: skip
        await connection.execute("INSERT INTO export_chunks (export_id, number, data) VALUES ($1, 0, $2)", id_, data)
    return id_


async def _do_nothing(_: JobRun) -> None:
    pass


async def add_person(
    app: FastAPI, name: str, text: str, *, into: tuple[asyncpg.Connection, UUID] | None = None
) -> Person:
    """Sign someone up and give them things. `into`: as a member of that workspace, and signed in there."""
    http, session = await _signed_up(app, name)
    if into is not None:
        admin, workspace = into
        user = UUID(session["user"]["id"])
        await admin.execute(
            "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'admin')", workspace, user
        )
        await admin.execute("UPDATE sessions SET workspace_id = $1 WHERE user_id = $2", workspace, user)
        renewed = await http.post("/api/v1/auth/refresh", json={"refresh_token": session["refresh_token"]})
        session = renewed.json()["data"]
        assert session["workspace"]["id"] == str(workspace)
    http.headers["Authorization"] = f"Bearer {session['access_token']}"
    ids = {"user": UUID(session["user"]["id"]), "workspace": UUID(session["workspace"]["id"])}
    cid = new_id()
    return Person(name, http, session["access_token"], await fill(http, text, **ids, cid=cid), cid)


@asynccontextmanager
async def world_of(databases: TestDatabases, data_dir: Path, layers: Layers) -> AsyncIterator[World]:
    """Run an application without some layers, with people in it."""
    urls = await databases.create()
    admin = await asyncpg.connect(databases.postgres.admin_url(urls.name))
    with pytest.MonkeyPatch.context() as patch:
        # What these would do later would change rows under the tests that compare them.
        for module in (exports, erasures, mails, importing):
            patch.setattr(module, "enqueue", partial(enqueue, delay=timedelta(days=1)))
        if layers in {Layers.NO_FILTERS, Layers.NONE}:
            assert remove_filters(patch) > 10
        if layers in {Layers.NO_POLICIES, Layers.NONE}:
            await remove_policies(admin)
        async with running(make_settings(data_dir, urls)) as app:
            app.state.jobs.registry.add(JobType(JOB_KIND, _do_nothing))
            alice = await add_person(app, "alice", MARKER)
            bob = await add_person(app, "bob", "bob's")
            carol = await add_person(app, "carol", "carol's", into=(admin, alice.things.workspace))
            await admin.execute(
                "INSERT INTO provider_keys (workspace_id, provider, sealed, last_four, base_url, given_for, created_by)"
                " VALUES ($1, 'openai', '', '4711', $3, $3, $2)",
                alice.things.workspace, alice.things.user, f"https://{MARKER}.example.com",
            )  # fmt: skip
            yield World(layers, app, admin, alice, bob, carol)
            for person in (alice, bob, carol):
                await person.http.aclose()
    await admin.close()
    await databases.drop(urls)


# -- the socket --------------------------------------------------------------------------------------------------------


class Socket:
    """A socket that has said hello."""

    def __init__(self, session: AsyncWebSocketSession) -> None:
        self._session = session
        self._requests = 0

    async def send(self, **frame: Any) -> None:
        """Send a frame."""
        await self._session.send_text(json.dumps(frame, default=str))

    async def receive(self) -> dict[str, Any]:
        """Return the next frame."""
        frame: dict[str, Any] = json.loads(await self._session.receive_text(timeout=5))
        return frame

    async def until(self, *kinds: str, **fields: Any) -> dict[str, Any]:
        """Return the next frame of one of these kinds with these fields."""
        while True:
            frame = await self.receive()
            if frame["t"] in kinds and all(frame.get(name) == value for name, value in fields.items()):
                return frame

    async def ask(self, **frame: Any) -> dict[str, Any]:
        """Send a request and return its answer, without its id."""
        self._requests += 1
        await self.send(**frame, id=self._requests)
        answer = await self.until("ok", "err", "subbed", id=self._requests)
        return {name: value for name, value in answer.items() if name != "id"}


@asynccontextmanager
async def socket_of(app: FastAPI, person: Person, *, subs: tuple[str, ...] = ()) -> AsyncIterator[Socket]:
    """Open a socket as someone. Within a test, since it holds a task group."""
    async with (
        ASGIWebSocketTransport(app=app) as transport,
        httpx.AsyncClient(transport=transport, base_url="http://parley.test") as client,
        aconnect_ws(
            "http://parley.test/api/v1/realtime",
            client,
            subprotocols=["parley.v1"],
            session_class=DocumentedSession,
        ) as session,
    ):
        socket = Socket(session)
        await socket.send(t="hello", v=1, auth={"token": person.token}, subs=[{"ch": channel} for channel in subs])
        await socket.until("welcome")
        yield socket
