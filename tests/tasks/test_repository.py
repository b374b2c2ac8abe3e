"""Another user sees nothing: each layer with the other one taken away."""

from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from parley.core import clock
from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.scope import Scope
from parley.tasks.errors import TaskNotFound
from parley.tasks.models import Task
from parley.tasks.repository import TaskRepository

ALL = PageRequest(1, 100)


async def add(database: Database, scope: Scope, title: str = "Buy milk", *, completed: bool = False) -> UUID:
    async with database.unit_of_work(scope) as unit:
        task = Task(workspace_id=scope.workspace_id, user_id=scope.user_id, title=title, completed=completed)
        return (await TaskRepository(unit, scope).add(task)).id


async def assert_sees_nothing(database: Database, stranger: Scope, task_id: UUID) -> None:
    """Every method of the repository, called by someone else."""
    async with database.unit_of_work(stranger) as unit:
        repository = TaskRepository(unit, stranger)
        assert await repository.find(task_id) is None
        assert await repository.find(task_id, lock=True) is None
        with pytest.raises(TaskNotFound):
            await repository.get(task_id)
        assert await repository.list(ALL) == ([], 0)
        assert await repository.newest(10) == []
        assert await repository.open_or_completed_since(clock.now() - timedelta(days=1), limit=10) == []
        with pytest.raises(TaskNotFound):
            await repository.update(task_id, {"title": "Taken"})
        with pytest.raises(TaskNotFound):
            await repository.delete(task_id)


async def assert_untouched(admin: asyncpg.Connection, task_id: UUID) -> None:
    assert await admin.fetchval("SELECT title FROM tasks WHERE id = $1", task_id) == "Buy milk"


async def test_another_user_sees_nothing(
    database: Database, admin: asyncpg.Connection, scope: Scope, stranger: Scope
) -> None:
    task_id = await add(database, scope)

    await assert_sees_nothing(database, stranger, task_id)
    await assert_untouched(admin, task_id)


@pytest.mark.usefixtures("without_filter")
async def test_row_level_security_alone_holds(
    database: Database, admin: asyncpg.Connection, scope: Scope, stranger: Scope
) -> None:
    task_id = await add(database, scope)

    await assert_sees_nothing(database, stranger, task_id)
    await assert_untouched(admin, task_id)


@pytest.mark.usefixtures("without_row_level_security")
async def test_the_filter_alone_holds(
    database: Database, admin: asyncpg.Connection, scope: Scope, stranger: Scope
) -> None:
    task_id = await add(database, scope)

    await assert_sees_nothing(database, stranger, task_id)
    await assert_untouched(admin, task_id)


@pytest.mark.usefixtures("without_filter", "without_row_level_security")
async def test_without_both_the_row_is_seen(database: Database, scope: Scope, stranger: Scope) -> None:
    """The tests above would notice a layer that does nothing."""
    task_id = await add(database, scope)

    async with database.unit_of_work(stranger) as unit:
        repository = TaskRepository(unit, stranger)
        assert (await repository.get(task_id))["id"] == task_id
        assert (await repository.get(task_id, lock=True))["id"] == task_id


async def test_a_task_cannot_be_given_to_another_user(database: Database, scope: Scope, colleague: Scope) -> None:
    task = Task(workspace_id=scope.workspace_id, user_id=colleague.user_id, title="Yours")

    async with database.unit_of_work(scope) as unit:
        with pytest.raises(DBAPIError, match="row-level security"):
            await TaskRepository(unit, scope).add(task)
        await unit.session.rollback()


async def test_a_task_cannot_be_put_into_another_workspace(
    database: Database, admin: asyncpg.Connection, scope: Scope
) -> None:
    task = Task(workspace_id=new_id(), user_id=scope.user_id, title="Mine")

    async with database.unit_of_work(scope) as unit:
        with pytest.raises(ValueError, match="another workspace"):
            await TaskRepository(unit, scope).add(task)

    assert await admin.fetchval("SELECT count(*) FROM tasks") == 0


async def test_list_is_newest_first_in_pages(database: Database, scope: Scope) -> None:
    ids = [await add(database, scope, f"Task {number}") for number in range(5)]

    async with database.unit_of_work(scope) as unit:
        repository = TaskRepository(unit, scope)
        first, total = await repository.list(PageRequest(1, 2))
        last, _ = await repository.list(PageRequest(3, 2))
        beyond, still = await repository.list(PageRequest(4, 2))

    assert [row["id"] for row in first] == [ids[4], ids[3]]
    assert [row["id"] for row in last] == [ids[0]]
    assert (list(beyond), total, still) == ([], 5, 5)


async def test_list_keeps_to_the_completed_or_the_open(database: Database, scope: Scope) -> None:
    open_id = await add(database, scope)
    done_id = await add(database, scope, completed=True)

    async with database.unit_of_work(scope) as unit:
        repository = TaskRepository(unit, scope)
        done, done_total = await repository.list(ALL, completed=True)
        still_open, open_total = await repository.list(ALL, completed=False)

    assert ([row["id"] for row in done], done_total) == ([done_id], 1)
    assert ([row["id"] for row in still_open], open_total) == ([open_id], 1)


async def test_update_changes_only_what_it_was_given(database: Database, scope: Scope) -> None:
    task_id = await add(database, scope)
    other = await add(database, scope)

    async with database.unit_of_work(scope) as unit:
        repository = TaskRepository(unit, scope)
        before = await repository.get(task_id)
        after = await repository.update(task_id, {"completed": True})
        untouched = await repository.get(other)

    assert after["completed"] is True
    assert after["updated_at"] > before["updated_at"]
    unchanged = {str(name) for name in before} - {"completed", "updated_at"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert untouched["completed"] is False


async def test_delete_removes_one(database: Database, scope: Scope) -> None:
    task_id = await add(database, scope)
    other = await add(database, scope)

    async with database.unit_of_work(scope) as unit:
        repository = TaskRepository(unit, scope)
        await repository.delete(task_id)
        assert await repository.find(task_id) is None
        assert await repository.find(other) is not None
