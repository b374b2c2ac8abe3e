"""The base of every repository: what it returns is the scope's, and nothing of it works without one."""

import asyncio
import inspect
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from parley.chat.models import Conversation
from parley.chat.repository import ConversationRepository
from parley.core.db import Database
from parley.core.errors import NotFound
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.repository import ScopedRepository
from parley.core.scope import Role, Scope

_column = Conversation.__table__.c  # type: ignore[attr-defined]  # SQLModel does not type it
NEWEST_FIRST = (_column.id.desc(),)
ALL = PageRequest(1, 100)


class ThingNotFound(NotFound):
    """Of this test."""


class Things(ScopedRepository[Conversation]):
    """The base class over a real table, with nothing added."""

    model = Conversation
    not_found: ClassVar[type[NotFound]] = ThingNotFound


@pytest.fixture
async def here(admin: asyncpg.Connection) -> Scope:
    return await _scope(admin)


@pytest.fixture
async def there(admin: asyncpg.Connection) -> Scope:
    return await _scope(admin)


async def _scope(admin: asyncpg.Connection) -> Scope:
    workspace_id = new_id()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'A workspace', true)", workspace_id)
    return Scope(workspace_id, new_id(), Role.MEMBER)


async def add(database: Database, scope: Scope, title: str = "A talk", **values: Any) -> UUID:
    async with database.unit_of_work(scope) as unit:
        row = Conversation(workspace_id=scope.workspace_id, owner_id=scope.user_id, title=title, **values)
        return (await Things(unit, scope).add(row)).id


async def _assert_sees_nothing(database: Database, scope: Scope, id_: UUID) -> None:
    async with database.unit_of_work(scope) as unit:
        things = Things(unit, scope)
        assert await things.find(id_) is None
        assert await things.find(id_, lock=True) is None
        with pytest.raises(ThingNotFound):
            await things.get(id_)
        assert await things.page(ALL, order_by=NEWEST_FIRST) == ([], 0)
        # A condition of the caller's narrows; it does not replace.
        assert await things.page(ALL, _column.id == id_, order_by=NEWEST_FIRST) == ([], 0)


async def test_another_workspace_sees_nothing(database: Database, here: Scope, there: Scope) -> None:
    await _assert_sees_nothing(database, there, await add(database, here))


async def test_the_filter_alone_holds(database: Database, admin: asyncpg.Connection, here: Scope, there: Scope) -> None:
    await admin.execute("ALTER TABLE conversations DISABLE ROW LEVEL SECURITY")

    await _assert_sees_nothing(database, there, await add(database, here))


async def test_a_condition_that_is_always_true_does_not_widen(
    database: Database, admin: asyncpg.Connection, here: Scope, there: Scope
) -> None:
    await admin.execute("ALTER TABLE conversations DISABLE ROW LEVEL SECURITY")
    await add(database, here)
    own = await add(database, there)
    async with database.unit_of_work(there) as unit:
        rows, total = await Things(unit, there).page(
            ALL, (_column.archived.is_(True)) | (_column.archived.is_(False)), order_by=NEWEST_FIRST
        )

    assert ([row["id"] for row in rows], total) == ([own], 1)


async def test_get_returns_the_row_and_find_returns_none(database: Database, here: Scope) -> None:
    id_ = await add(database, here, "Milk")
    async with database.unit_of_work(here) as unit:
        things = Things(unit, here)
        assert (await things.get(id_))["title"] == "Milk"
        assert (await things.get(id_, lock=True))["title"] == "Milk"
        assert await things.find(new_id()) is None
        with pytest.raises(ThingNotFound):
            await things.get(new_id())


async def test_pages_are_cut_and_counted(database: Database, here: Scope, there: Scope) -> None:
    ids = [await add(database, here, archived=number % 2 == 0) for number in range(5)]
    await add(database, there)
    async with database.unit_of_work(here) as unit:
        things = Things(unit, here)
        first, total = await things.page(PageRequest(1, 2), order_by=NEWEST_FIRST)
        last, _ = await things.page(PageRequest(3, 2), order_by=NEWEST_FIRST)
        beyond, still = await things.page(PageRequest(4, 2), order_by=NEWEST_FIRST)
        archived, of = await things.page(ALL, _column.archived.is_(True), order_by=NEWEST_FIRST)

    assert [row["id"] for row in first] == [ids[4], ids[3]]
    assert [row["id"] for row in last] == [ids[0]]
    assert (beyond, total, still) == ([], 5, 5)
    assert ([row["id"] for row in archived], of) == ([ids[4], ids[2], ids[0]], 3)


async def test_add_returns_what_the_database_filled_in(database: Database, here: Scope) -> None:
    async with database.unit_of_work(here) as unit:
        row = Conversation(workspace_id=here.workspace_id, owner_id=here.user_id)
        added = await Things(unit, here).add(row)

        assert added.created_at is not None
        assert added.created_at.tzinfo is not None


async def test_a_row_of_another_workspace_is_not_added(
    database: Database, admin: asyncpg.Connection, here: Scope, there: Scope
) -> None:
    async with database.unit_of_work(here) as unit:
        with pytest.raises(ValueError, match="another workspace"):
            await Things(unit, here).add(Conversation(workspace_id=there.workspace_id, owner_id=here.user_id))

    assert await admin.fetchval("SELECT count(*) FROM conversations") == 0


async def test_a_repository_with_a_foreign_scope_is_stopped_by_the_transaction(
    database: Database, here: Scope, there: Scope
) -> None:
    """A scope that is not the unit's: the filter asks for one workspace, the binding shows the other."""
    id_ = await add(database, here)
    async with database.unit_of_work(there) as unit:
        forged = Things(unit, here)
        assert await forged.find(id_) is None
        with pytest.raises(DBAPIError, match="row-level security"):
            await forged.add(Conversation(workspace_id=here.workspace_id, owner_id=here.user_id))
        await unit.session.rollback()


async def test_a_locked_row_is_nobody_elses_until_the_end(
    database: Database, admin: asyncpg.Connection, here: Scope
) -> None:
    id_ = await add(database, here)
    order: list[str] = []
    held = asyncio.Event()

    async def first() -> None:
        async with database.unit_of_work(here) as unit:
            await Things(unit, here).get(id_, lock=True)
            held.set()
            # Until the other one stands in the queue of this row.
            async with asyncio.timeout(5):
                while not await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    pass
            order.append("first")

    async def second() -> None:
        await held.wait()
        async with database.unit_of_work(here) as unit:
            await Things(unit, here).get(id_, lock=True)
            order.append("second")

    await asyncio.gather(first(), second())

    assert order == ["first", "second"]


def _public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(cls, callable) if not name.startswith("_")}


@pytest.mark.parametrize("repository", [ScopedRepository, ConversationRepository])
def test_nothing_public_works_without_an_instance_and_its_scope(repository: type) -> None:
    """`not_found` apart, all that is public is a method: no static one, no one of the class, that goes past a scope."""
    kinds = {name: inspect.getattr_static(repository, name) for name in _public(repository) if name != "not_found"}

    assert kinds
    assert [name for name, value in kinds.items() if name != "model" and not inspect.iscoroutinefunction(value)] == []
    assert list(inspect.signature(repository.__init__).parameters) == ["self", "unit", "scope"]  # type: ignore[misc]  # looked at, not called
