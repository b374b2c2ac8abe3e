"""Scopes without sign-up, services without HTTP, and a counter of queries."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import bindparam, event, select, true
from sqlalchemy.pool import ConnectionPoolEntry

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import Unauthenticated
from parley.core.ids import new_id
from parley.core.repository import Prepared
from parley.core.scope import Credential, Role, Scope
from parley.realtime.events import LoggedEvent
from parley.tasks import repository
from parley.tasks.models import Task
from parley.tasks.repository import TaskRepository
from parley.tasks.service import TaskService
from parley.tenancy.permissions import permissions_of
from tests.conftest import http_client

CountQueries = Callable[[Database], AbstractAsyncContextManager[list[str]]]
SignInAs = Callable[[Scope], httpx.AsyncClient]
TaskServices = Callable[[Scope], AbstractAsyncContextManager[TaskService]]


@pytest.fixture
def count_queries() -> CountQueries:
    """Collect the statements of a block: `async with count_queries(database) as statements`.

    SQLAlchemy's statements are prepared ones, which asyncpg's logger does not see; the logger sees what goes past
    SQLAlchemy, and the frames of the transaction, which do not count.
    """

    @asynccontextmanager
    async def counting(database: Database) -> AsyncIterator[list[str]]:
        statements: list[str] = []
        watched: dict[int, asyncpg.Connection] = {}

        def before_execute(_conn: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        def on_query(record: Any) -> None:
            if not record.query.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
                statements.append(record.query)

        def on_checkout(dbapi_connection: Any, _entry: ConnectionPoolEntry, _proxy: object) -> None:
            driver = dbapi_connection.driver_connection
            if id(driver) not in watched:
                watched[id(driver)] = driver
                driver.add_query_logger(on_query)

        engines = [database.app.sync_engine, database.system.sync_engine]
        for engine in engines:
            event.listen(engine, "before_cursor_execute", before_execute)
            event.listen(engine, "checkout", on_checkout)
        try:
            yield statements
            # The logger is called by the event loop, one turn after the query.
            await asyncio.sleep(0)
        finally:
            for engine in engines:
                event.remove(engine, "before_cursor_execute", before_execute)
                event.remove(engine, "checkout", on_checkout)
            for driver in watched.values():
                driver.remove_query_logger(on_query)

    return counting


@dataclass
class Announcements:
    """A publisher that remembers what it was given."""

    events: list[tuple[tuple[UUID, str], LoggedEvent]] = field(default_factory=list)

    def publish(self, address: tuple[UUID, str], events: Sequence[LoggedEvent]) -> None:
        self.events += [(address, event) for event in events]

    @property
    def names(self) -> list[str]:
        return [event.e for _, event in self.events]


@pytest.fixture
def announcements() -> Announcements:
    """What was published."""
    return Announcements()


async def add_workspace(admin: asyncpg.Connection) -> UUID:
    """Return the id of a new workspace."""
    workspace_id = new_id()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'A workspace', true)", workspace_id)
    return workspace_id


def scope_in(workspace_id: UUID) -> Scope:
    """Return the scope of a new user in a workspace."""
    user_id = new_id()
    return Scope(workspace_id, user_id, Role.VIEWER, subject=str(user_id), permissions=permissions_of(Role.VIEWER))


@pytest.fixture
async def scope(admin: asyncpg.Connection) -> Scope:
    """A user with the least of roles, in a workspace."""
    return scope_in(await add_workspace(admin))


@pytest.fixture
async def colleague(scope: Scope) -> Scope:
    """Another user of the same workspace."""
    return scope_in(scope.workspace_id)


@pytest.fixture(params=["someone elsewhere", "a colleague", "the same user elsewhere"])
async def stranger(request: pytest.FixtureRequest, admin: asyncpg.Connection, scope: Scope, colleague: Scope) -> Scope:
    """Everyone who must not see the user's tasks; the user is one of them, in another workspace."""
    if request.param == "a colleague":
        return colleague
    elsewhere = await add_workspace(admin)
    return scope_in(elsewhere) if request.param == "someone elsewhere" else replace(scope, workspace_id=elsewhere)


@pytest.fixture
def without_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the condition out of every statement of the repository."""
    by_id = select(*Task.__table__.c).where(Task.__table__.c.id == bindparam("id"))  # type: ignore[attr-defined]  # SQLModel does not type it
    monkeypatch.setattr(repository, "_BY_ID", Prepared(by_id))
    monkeypatch.setattr(TaskRepository, "_visible", lambda _: true())


@pytest.fixture
async def without_row_level_security(admin: asyncpg.Connection) -> None:
    """Take the policies off the table."""
    await admin.execute("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY")


@pytest.fixture
def task_service(database: Database, announcements: Announcements) -> TaskServices:
    """Open the service in a transaction: `async with task_service(scope) as tasks`."""

    @asynccontextmanager
    async def opened(scope: Scope) -> AsyncIterator[TaskService]:
        async with database.unit_of_work(scope) as unit:
            yield TaskService(TaskRepository(unit, scope), scope, unit, announcements)

    return opened


class KnownTokens:
    """An authenticator for scopes that no sign-up leads to: a token is good if it was given out here."""

    def __init__(self) -> None:
        self.scopes: dict[str, Scope] = {}

    async def authenticate(self, token: str) -> Credential:
        if token not in self.scopes:
            raise Unauthenticated
        return Credential(self.scopes[token], expires_at=clock.timestamp() + 900)

    async def reauthenticate(self, scope: Scope) -> Credential:
        return Credential(scope, expires_at=clock.timestamp() + 900)


@pytest.fixture
async def sign_in_as(app: FastAPI) -> AsyncIterator[SignInAs]:
    """Return a client of the application that is a scope: `http = sign_in_as(scope)`."""
    tokens = KnownTokens()
    app.state.authenticator = tokens
    async with AsyncExitStack() as clients:
        made: list[httpx.AsyncClient] = []

        def sign_in(scope: Scope) -> httpx.AsyncClient:
            token = f"token-{len(made)}"
            tokens.scopes[token] = scope
            made.append(http_client(app, headers={"Authorization": f"Bearer {token}"}))
            clients.push_async_callback(made[-1].aclose)
            return made[-1]

        yield sign_in


@pytest.fixture
def http(sign_in_as: SignInAs, scope: Scope) -> httpx.AsyncClient:
    """The client of the user."""
    return sign_in_as(scope)
