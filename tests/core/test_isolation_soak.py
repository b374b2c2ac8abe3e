"""Many tasks of two workspaces on a pool of two, cancelled and rolled back at any moment: each sees its own rows only."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from parley.core.db import Database, DatabaseUrls, UnitOfWork
from parley.core.errors import Unavailable
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.scope import Role, Scope
from parley.core.settings import DatabaseSettings
from parley.core.unit_of_work import ScopedSession
from parley.tasks.repository import TaskRepository

_TASKS = 50
_ROWS = 30
_SECONDS = 60.0 if os.environ.get("PARLEY_CI") else 8.0
_CANCELLED = 0.25

# No condition on either: what is kept out is kept out by the binding of the transaction.
_READ = text("SELECT workspace_id, id FROM tasks")
_ADD = text(
    "INSERT INTO tasks (workspace_id, id, user_id, title, completed) VALUES (:workspace, :id, :user, 'passing', false)"
)
_REMOVE = text("DELETE FROM tasks WHERE title = 'passing' AND random() < 0.5")
_SPOIL = text("UPDATE tasks SET title = 'spoilt'")


class Interrupted(Exception):
    """What a step is rolled back with."""


@dataclass
class Tenant:
    """A workspace with rows that are never removed."""

    scope: Scope
    rows: frozenset[UUID]


@dataclass
class Soak:
    """What was done and what was seen. `wrong` holds each foreign, missing or spoilt row."""

    database: Database
    tenants: tuple[Tenant, Tenant]
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def look(self, unit: UnitOfWork, tenant: Tenant, when: str) -> None:
        rows = (await (await unit.connection()).execute(_READ)).all()
        foreign = sum(row.workspace_id != tenant.scope.workspace_id for row in rows)
        missing = len(tenant.rows - {row.id for row in rows})
        if foreign or missing:
            self.wrong.append(f"{when}: {foreign} foreign, {missing} missing")
        self.done["reads"] += 1

    async def add(self, unit: UnitOfWork, tenant: Tenant) -> None:
        scope = tenant.scope
        values = {"workspace": scope.workspace_id, "id": new_id(), "user": scope.user_id}
        await (await unit.connection()).execute(_ADD, values)

    # -- steps, each a transaction or two ------------------------------------------------------------------------------

    async def read(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            await self.look(unit, tenant, "read")

    async def read_by_repository(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            rows, _ = await TaskRepository(unit, tenant.scope).list(PageRequest(1, 100))
        if any(row["workspace_id"] != tenant.scope.workspace_id for row in rows):
            self.wrong.append("repository: foreign")
        self.done["reads"] += 1

    async def read_by_driver(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            rows = await (await unit.driver()).fetch("SELECT workspace_id FROM tasks")
            if len(rows) < _ROWS or any(row[0] != tenant.scope.workspace_id for row in rows):
                self.wrong.append("driver: foreign or missing")
        self.done["reads"] += 1

    async def write(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            await self.add(unit, tenant)
            await self.look(unit, tenant, "write")
            await (await unit.connection()).execute(_REMOVE)
        self.done["commits"] += 1

    async def commit_in_between(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            await self.add(unit, tenant)
            await unit.session.commit()
            await self.look(unit, tenant, "after a commit")
            await unit.session.rollback()
            await self.look(unit, tenant, "after a rollback")
        self.done["commits"] += 1

    async def roll_back(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            await (await unit.connection()).execute(_SPOIL)
            self.done["rollbacks"] += 1
            raise Interrupted

    async def fail_in_a_savepoint(self, tenant: Tenant) -> None:
        async with self.database.unit_of_work(tenant.scope) as unit:
            connection = await unit.connection()
            try:
                async with connection.begin_nested():
                    await connection.execute(_SPOIL)
                    await connection.execute(text("SELECT 1 / 0"))
            except DBAPIError:
                self.done["savepoints"] += 1
            await self.look(unit, tenant, "after a savepoint")

    @property
    def steps(self) -> tuple[Callable[[Tenant], Awaitable[None]], ...]:
        return (
            self.read, self.read, self.read_by_repository, self.read_by_driver, self.write, self.commit_in_between,
            self.roll_back, self.fail_in_a_savepoint,
        )  # fmt: skip

    async def work(self, number: int, until: float) -> None:
        """Take steps for one of the tenants, and cut some of them off at a moment that nothing waits for."""
        loop = asyncio.get_running_loop()
        tenant = self.tenants[number % 2]
        while loop.time() < until:
            step = asyncio.ensure_future(self.random.choice(self.steps)(tenant))
            if self.random.random() < _CANCELLED:
                loop.call_later(self.random.random() * 0.04, step.cancel)
            try:
                await step
            except asyncio.CancelledError:
                self.done["cancelled"] += 1
            except Interrupted:
                pass
            except DBAPIError as error:
                self.wrong.append(f"refused: {error.orig}")
            except Unavailable:
                # Of fifty that wait for two connections some are told to come again.
                self.done["refused"] += 1


async def tenant_of(admin: asyncpg.Connection) -> Tenant:
    """Return a new workspace with its rows."""
    scope = Scope(new_id(), new_id(), Role.MEMBER)
    await admin.execute(
        "INSERT INTO workspaces (id, name, personal) VALUES ($1, 'A workspace', true)", scope.workspace_id
    )
    rows = [new_id() for _ in range(_ROWS)]
    await admin.executemany(
        "INSERT INTO tasks (workspace_id, id, user_id, title, completed) VALUES ($1, $2, $3, 'stays', false)",
        [(scope.workspace_id, row, scope.user_id) for row in rows],
    )
    return Tenant(scope, frozenset(rows))


async def soak(urls: DatabaseUrls, admin: asyncpg.Connection, *, seconds: float, tasks: int = _TASKS) -> Soak:
    """Run, and return what was seen. Pooled connections must end up with nothing set and nothing spoilt."""
    database = Database(urls, DatabaseSettings(pool_size=2, system_pool_size=1))
    made = Soak(database, (await tenant_of(admin), await tenant_of(admin)), random.Random(4711))
    try:
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(made.work(number, until))
        for _ in range(2):
            async with database.app.connect() as connection:
                left = (await connection.execute(text("SELECT app_workspace(), app_user()"))).one()
                if any(left):
                    made.wrong.append(f"left on a pooled connection: {left}")
    finally:
        await database.close()
    made.wrong += ["spoilt"] * await admin.fetchval("SELECT count(*) FROM tasks WHERE title = 'spoilt'")
    return made


async def test_no_foreign_and_no_missing_row(urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    found = await soak(urls, admin, seconds=_SECONDS)

    print(f"{_SECONDS:g} s: {dict(found.done)}")
    assert found.wrong == []
    assert found.done["reads"] > 20 * _SECONDS
    assert min(found.done[name] for name in ("cancelled", "rollbacks", "savepoints", "commits")) > _SECONDS


async def test_a_workspace_that_is_set_for_the_session_is_noticed(
    urls: DatabaseUrls, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, with the binding outliving its transaction: the next one on the connection has it."""
    bind = "SELECT set_config('app.workspace_id', '{workspace}', false), set_config('app.user_id', '{user}', false)"
    monkeypatch.setattr("parley.core.unit_of_work._BIND", bind)

    def forget(session: ScopedSession, _transaction: object, connection: object) -> None:
        # As if set when the session was opened: a transaction after a commit in between is not bound anew.
        if session.info.setdefault("bound", 0):
            connection.connection.driver_connection.prologue = ""  # type: ignore[attr-defined]  # SQLAlchemy's connection
        session.info["bound"] += 1

    event.listen(ScopedSession, "after_begin", forget)
    try:
        found = await soak(urls, admin, seconds=1.5)
    finally:
        event.remove(ScopedSession, "after_begin", forget)

    assert found.wrong != []
