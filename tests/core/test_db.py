"""The unit of work: its binding, what happens after the commit, and a database that goes away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import select

from parley.chat.models import Conversation
from parley.core.db import (
    APP_ROLE,
    SYSTEM_ROLE,
    Database,
    DatabaseUrls,
    MissingScope,
    UnitOfWork,
    check_runtime_roles,
)
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.core.errors import OutcomeUnknown, Unavailable
from parley.core.ids import new_id
from parley.core.migrate import current_revision, head
from parley.core.scope import Role, Scope
from parley.core.settings import DatabaseSettings
from parley.core.unit_of_work import ScopedAsyncSession

_ADD = text(
    "INSERT INTO conversations (workspace_id, id, owner_id, assistant, shared, archived)"
    " VALUES (:workspace, :id, :owner, 'general', false, false)"
)
_PARENT = "fk_messages_workspace_id_conversation_id"
_SEEN = text("SELECT workspace_id FROM conversations")


async def add_scope(admin: asyncpg.Connection) -> Scope:
    """Return the scope of a new user in a new workspace."""
    workspace_id = new_id()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'A workspace', true)", workspace_id)
    return Scope(workspace_id, new_id(), Role.MEMBER)


@pytest.fixture
async def here(admin: asyncpg.Connection) -> Scope:
    return await add_scope(admin)


@pytest.fixture
async def there(admin: asyncpg.Connection) -> Scope:
    return await add_scope(admin)


@pytest.fixture
async def one_connection(urls: DatabaseUrls) -> AsyncIterator[Database]:
    """A pool of one: every transaction follows another on the same connection."""
    made = Database(urls, DatabaseSettings(pool_size=1, system_pool_size=1))
    yield made
    await made.close()


async def add(unit: UnitOfWork, scope: Scope) -> UUID:
    id_ = new_id()
    await (await unit.connection()).execute(
        _ADD, {"workspace": scope.workspace_id, "id": id_, "owner": scope.user_id}
    )  # fmt: skip
    return id_


async def seen(unit: UnitOfWork) -> list[UUID]:
    """Return the workspaces of the rows that can be read."""
    return [row.workspace_id for row in await (await unit.connection()).execute(_SEEN)]


async def ask(unit: UnitOfWork, expression: str) -> object:
    return (await (await unit.connection()).execute(text(f"SELECT {expression}"))).scalar_one()


async def added(database: Database, scope: Scope) -> UUID:
    async with database.unit_of_work(scope) as unit:
        return await add(unit, scope)


# -- binding -----------------------------------------------------------------------------------------------------------


async def test_workspace_and_user_are_bound(database: Database, here: Scope) -> None:
    async with database.unit_of_work(here) as unit:
        assert await ask(unit, "app_workspace()") == here.workspace_id
        assert await ask(unit, "app_user()") == here.user_id
        assert await ask(unit, "current_user::text") == APP_ROLE


async def test_the_binding_holds_across_a_commit_in_between(database: Database, here: Scope, there: Scope) -> None:
    await added(database, there)
    async with database.unit_of_work(here) as unit:
        await add(unit, here)
        await unit.session.commit()
        assert await seen(unit) == [here.workspace_id]
        await unit.session.rollback()
        assert await seen(unit) == [here.workspace_id]


async def test_the_binding_holds_across_a_savepoint(database: Database, here: Scope, there: Scope) -> None:
    await added(database, there)
    async with database.unit_of_work(here) as unit:
        await add(unit, here)
        savepoint = await unit.session.begin_nested()
        await add(unit, here)
        await savepoint.rollback()
        assert await seen(unit) == [here.workspace_id]
        with pytest.raises(DBAPIError):
            async with unit.session.begin_nested():
                await ask(unit, "1 / 0")
        assert await seen(unit) == [here.workspace_id]


async def test_a_pooled_connection_carries_nothing_over(one_connection: Database, here: Scope, there: Scope) -> None:
    backends = set()
    for scope in (here, there):
        await added(one_connection, scope)
    for scope in (here, there, here):
        async with one_connection.unit_of_work(scope) as unit:
            assert await seen(unit) == [scope.workspace_id]
            backends.add(await ask(unit, "pg_backend_pid()"))
    async with one_connection.app.connect() as connection:
        assert (await connection.execute(_SEEN)).all() == []

    assert len(backends) == 1


async def test_a_setting_of_the_session_would_be_carried_over(
    one_connection: Database, here: Scope, there: Scope
) -> None:
    """Why the binding is the transaction's: what a session sets, the next one on its connection has."""
    for scope in (here, there):
        await added(one_connection, scope)
    async with one_connection.app.begin() as connection:
        await connection.execute(text(f"SELECT set_config('app.workspace_id', '{there.workspace_id}', false)"))
    async with one_connection.app.connect() as connection:
        assert [row.workspace_id for row in await connection.execute(_SEEN)] == [there.workspace_id]

    # Even then a unit of work sees its own.
    async with one_connection.unit_of_work(here) as unit:
        assert await seen(unit) == [here.workspace_id]


async def test_without_a_scope_nothing_is_asked(database: Database) -> None:
    asked: list[str] = []
    event.listen(database.app.sync_engine, "before_cursor_execute", lambda *given: asked.append(given[2]))

    async with ScopedAsyncSession(database.app) as session:
        session.sync_session.info.update(become=False)
        with pytest.raises(MissingScope):
            await session.exec(select(Conversation))

    assert asked == []


async def test_what_only_looks_like_a_scope_is_none(database: Database, here: Scope) -> None:
    async with ScopedAsyncSession(database.app) as session:
        session.sync_session.info.update(scope={"workspace_id": here.workspace_id}, become=False)
        with pytest.raises(MissingScope):
            await session.connection()


async def test_without_a_workspace_there_are_no_rows_and_no_inserts(database: Database, here: Scope) -> None:
    await added(database, here)

    async with database.app.connect() as connection:
        assert (await connection.execute(_SEEN)).all() == []
        with pytest.raises(DBAPIError, match="row-level security"):
            await connection.execute(
                _ADD, {"workspace": here.workspace_id, "id": new_id(), "owner": here.user_id}
            )  # fmt: skip


async def test_the_system_role_is_its_own(database: Database, here: Scope) -> None:
    await added(database, here)
    async with database.system_unit_of_work() as unit:
        assert await ask(unit, "current_user::text") == SYSTEM_ROLE
        assert await ask(unit, "count(*) FROM workspaces") == 1
        # It reads what it must, and conversations are not of that.
        with pytest.raises(DBAPIError, match="permission denied"):
            await seen(unit)


async def test_a_snapshot_sees_one_instant(database: Database, here: Scope) -> None:
    async with database.unit_of_work(here, snapshot=True) as unit:
        assert await ask(unit, "current_setting('transaction_isolation')") == "repeatable read"
        assert await seen(unit) == []
        await added(database, here)
        assert await seen(unit) == []
        assert await ask(unit, "app_workspace()") == here.workspace_id

    # The next transaction on the same connection is an ordinary one again.
    async with database.unit_of_work(here) as unit:
        assert await ask(unit, "current_setting('transaction_isolation')") == "read committed"
        assert await seen(unit) == [here.workspace_id]


# -- after the commit --------------------------------------------------------------------------------------------------


async def test_actions_run_after_the_commit_in_order(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran = []
    async with database.unit_of_work(here) as unit:
        unit.after_commit(lambda: ran.append(1))
        await add(unit, here)
        unit.after_commit(lambda: ran.append(2))
        unit.after_commit(lambda: ran.append(3))
        assert ran == []
        assert await admin.fetchval("SELECT count(*) FROM conversations") == 0

    assert ran == [1, 2, 3]
    assert await admin.fetchval("SELECT count(*) FROM conversations") == 1


async def test_an_action_sees_the_transaction_as_committed(database: Database, here: Scope) -> None:
    states = []
    async with database.unit_of_work(here) as unit:
        await add(unit, here)
        unit.after_commit(lambda: states.append(unit.session.in_transaction()))

    assert states == [False]


async def _fail(database: Database, scope: Scope, ran: list[int]) -> None:
    async with database.unit_of_work(scope) as unit:
        unit.after_commit(lambda: ran.append(1))
        await add(unit, scope)
        raise ValueError("no")


async def test_actions_do_not_run_when_the_block_fails(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran: list[int] = []
    with pytest.raises(ValueError, match="no"):
        await _fail(database, here, ran)

    assert ran == []
    assert await admin.fetchval("SELECT count(*) FROM conversations") == 0


async def test_actions_do_not_run_when_the_block_is_cancelled(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran: list[int] = []
    waiting = asyncio.Event()

    async def work() -> None:
        async with database.unit_of_work(here) as unit:
            unit.after_commit(lambda: ran.append(1))
            await add(unit, here)
            waiting.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ran == []
    assert await admin.fetchval("SELECT count(*) FROM conversations") == 0


async def test_actions_do_not_run_when_the_commit_fails(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran: list[int] = []
    await admin.execute(f"ALTER TABLE messages ALTER CONSTRAINT {_PARENT} DEFERRABLE INITIALLY DEFERRED")
    unit_of_work = database.unit_of_work(here)
    unit = await unit_of_work.__aenter__()
    unit.after_commit(lambda: ran.append(1))
    await (await unit.connection()).execute(
        text(
            "INSERT INTO messages (workspace_id, id, conversation_id, role, parts, status, author_id)"
            " VALUES (app_workspace(), gen_random_uuid(), gen_random_uuid(), 'user', '[]', 'completed', app_user())"
        )
    )

    # The database refused: nothing happened, and that is known.
    with pytest.raises(DBAPIError, match=_PARENT):
        await unit_of_work.__aexit__(None, None, None)
    assert ran == []


async def test_actions_do_not_run_when_the_block_took_its_work_back(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran: list[int] = []
    async with database.unit_of_work(here) as unit:
        await add(unit, here)
        unit.after_commit(lambda: ran.append(1))
        await unit.session.rollback()

    assert await admin.fetchval("SELECT count(*) FROM conversations") == 0
    assert ran == []


# -- a database that goes away -----------------------------------------------------------------------------------------


async def _lose(unit: UnitOfWork, admin: asyncpg.Connection) -> None:
    """End the unit's connection on the server, and wait until it is gone."""
    process = await ask(unit, "pg_backend_pid()")
    await admin.execute("SELECT pg_terminate_backend($1, 5000)", process)


async def test_a_connection_lost_in_the_block_is_unavailable(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran: list[int] = []
    unit_of_work = database.unit_of_work(here)
    unit = await unit_of_work.__aenter__()
    unit.after_commit(lambda: ran.append(1))
    await _lose(unit, admin)
    with pytest.raises(DBAPIError) as lost:
        await seen(unit)

    with pytest.raises(Unavailable) as told:
        await unit_of_work.__aexit__(DBAPIError, lost.value, lost.value.__traceback__)
    assert told.value.code == "unavailable"
    assert told.value.retry_after_s
    assert ran == []
    # The pool has a new one.
    await added(database, here)


async def _commit_on_a_lost_connection(
    unit_of_work: AbstractAsyncContextManager[UnitOfWork], scope: Scope, admin: asyncpg.Connection, ran: list[int]
) -> None:
    async with unit_of_work as unit:
        unit.after_commit(lambda: ran.append(1))
        await add(unit, scope)
        await _lose(unit, admin)


async def test_a_connection_lost_in_commit_leaves_the_outcome_unknown(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    ran: list[int] = []
    with pytest.raises(OutcomeUnknown) as told:
        await _commit_on_a_lost_connection(database.unit_of_work(here), here, admin, ran)

    assert told.value.code == "outcome_unknown"
    assert ran == []
    await added(database, here)


async def _ask_the_driver_of_a_lost_connection(database: Database, scope: Scope, admin: asyncpg.Connection) -> None:
    async with database.unit_of_work(scope) as unit:
        driver = await unit.driver()
        await _lose(unit, admin)
        await driver.fetchval("SELECT 1")


async def test_a_connection_lost_under_the_driver_is_unavailable(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    """The paths that are written in SQL go past SQLAlchemy, which wraps no error of theirs."""
    with pytest.raises(Unavailable):
        await _ask_the_driver_of_a_lost_connection(database, here, admin)

    await added(database, here)


async def _fail_as_the_driver_does(
    database: Database, scope: Scope, admin: asyncpg.Connection, error: Exception
) -> None:
    async with database.unit_of_work(scope) as unit:
        await _lose(unit, admin)
        raise error


@pytest.mark.parametrize(
    "error",
    [
        # What asyncpg says when the loss is noticed in the middle of another message: of none of its families.
        asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        ConnectionResetError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_every_way_the_driver_tells_of_a_lost_connection_is_unavailable(
    database: Database, admin: asyncpg.Connection, here: Scope, error: Exception
) -> None:
    with pytest.raises(Unavailable):
        await _fail_as_the_driver_does(database, here, admin, error)

    await added(database, here)


async def test_no_server_at_all_is_unavailable(urls: DatabaseUrls, here: Scope, unused_tcp_port: int) -> None:
    away = f"postgresql://parley_app@127.0.0.1:{unused_tcp_port}/nothing"
    database = Database(DatabaseUrls(app=away, system=away, owner=away, direct=away), DatabaseSettings())

    with pytest.raises(Unavailable):
        await added(database, here)
    await database.close()


async def test_a_statement_that_the_database_refuses_is_not_a_lost_connection(database: Database, here: Scope) -> None:
    with pytest.raises(DBAPIError, match="division by zero"):
        async with database.unit_of_work(here) as unit:
            await ask(unit, "1 / 0")


async def _fail_on_a_file(database: Database, scope: Scope) -> None:
    async with database.unit_of_work(scope) as unit:
        await ask(unit, "1")
        raise FileNotFoundError("prompt")


async def test_a_fault_of_ours_is_not_a_lost_connection(database: Database, here: Scope) -> None:
    with pytest.raises(FileNotFoundError):
        await _fail_on_a_file(database, here)


# -- one login for all roles -------------------------------------------------------------------------------------------


@pytest.fixture
async def becoming(urls: DatabaseUrls, postgres: EmbeddedPostgres) -> AsyncIterator[Database]:
    """A database where a superuser's login serves all, as on a managed server with one address."""
    login = postgres.admin_url(urls.name)
    become = DatabaseUrls(app=login, system=login, owner=login, direct=login, become=True)
    made = Database(become, DatabaseSettings(pool_size=1, system_pool_size=1))
    yield made
    await made.close()


async def test_each_transaction_takes_its_role(becoming: Database, here: Scope, there: Scope) -> None:
    for scope in (here, there):
        async with becoming.unit_of_work(scope) as unit:
            assert await ask(unit, "current_user::text") == APP_ROLE
            await add(unit, scope)
            await unit.session.commit()
            assert await ask(unit, "current_user::text") == APP_ROLE
            assert await seen(unit) == [scope.workspace_id]
    async with becoming.unit_of_work(here, snapshot=True) as unit:
        assert await ask(unit, "current_user::text") == APP_ROLE
        assert await seen(unit) == [here.workspace_id]
    async with becoming.system_unit_of_work() as unit:
        assert await ask(unit, "current_user::text") == SYSTEM_ROLE
        with pytest.raises(DBAPIError, match="permission denied"):
            await seen(unit)


async def test_the_system_connection_takes_its_role_too(becoming: Database) -> None:
    connection = await becoming.connect_system()
    try:
        assert await connection.fetchval("SELECT current_user::text") == SYSTEM_ROLE
    finally:
        await connection.close()
    assert await current_revision(becoming) == head()


async def test_the_role_ends_with_the_transaction(becoming: Database, here: Scope) -> None:
    await added(becoming, here)

    async with becoming.app.connect() as connection:
        assert (await connection.execute(text("SELECT current_user = session_user"))).scalar_one() is True


async def test_row_level_security_holds_under_one_login(becoming: Database, here: Scope, there: Scope) -> None:
    with pytest.raises(DBAPIError, match="row-level security"):
        async with becoming.unit_of_work(here) as unit:
            await add(unit, there)


async def test_one_address_is_enough_outside_production() -> None:
    one = DatabaseUrls.from_settings(DatabaseSettings(url="postgresql://u@h/db"))
    four = DatabaseUrls.from_settings(
        DatabaseSettings(url="app", system_url="system", owner_url="owner", direct_url="direct")
    )  # fmt: skip

    assert one.become
    assert {one.app, one.system, one.owner, one.direct} == {"postgresql://u@h/db"}
    assert (four.become, four.pooled) == (False, True)
    assert (four.app, four.system, four.owner, four.direct) == ("app", "system", "owner", "direct")


# -- the roles that production takes -----------------------------------------------------------------------------------


async def test_plain_roles_may_serve(database: Database) -> None:
    assert await check_runtime_roles(database) == []


async def test_a_superuser_must_not_serve(becoming: Database) -> None:
    problems = await check_runtime_roles(becoming)

    assert ["PARLEY_DATABASE_URL" in problems[0], "PARLEY_DATABASE_SYSTEM_URL" in problems[1]] == [True, True]
    assert "superuser" in problems[0]


async def test_the_owner_must_not_serve(urls: DatabaseUrls) -> None:
    owner = Database(DatabaseUrls(urls.owner, urls.system, urls.owner, urls.direct), DatabaseSettings())

    (problem,) = await check_runtime_roles(owner)
    assert "owner of the tables" in problem
    await owner.close()


# -- cut off anywhere -------------------------------------------------------------------------------------------------


async def ask_in(database: Database, scope: Scope) -> None:
    async with database.unit_of_work(scope) as unit:
        await ask(unit, "1")


async def test_a_unit_that_was_cancelled_anywhere_leaves_no_transaction_behind(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    """Cut off in BEGIN, the next unit on that connection would be a savepoint in a transaction that never commits."""

    async def cut_off() -> None:
        async with database.unit_of_work(here) as unit:
            await (await unit.driver()).fetchval("SELECT 1")

    turns = 0
    while turns < 60:
        # With a connection in the pool: what is to be cut off is the unit and not the making of a connection.
        await ask_in(database, here)
        task = asyncio.create_task(cut_off())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        turns += 1
    for number in range(1, 12):
        await added(database, here)
        assert await admin.fetchval("SELECT count(*) FROM conversations") == number
    idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
    assert await admin.fetchval(idle) == 0
