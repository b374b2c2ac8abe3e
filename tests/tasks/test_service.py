"""What a change does, that it is announced once, and that the service refuses what the layers below let through."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
from hypothesis import given, strategies

from parley.core import clock
from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.scope import Scope
from parley.tasks.errors import TaskAmbiguous, TaskNotFound
from parley.tasks.schemas import TaskCreate, TaskRead, TaskReplace, TaskUpdate
from parley.tasks.service import TaskService, named_task
from tests.tasks.conftest import Announcements, TaskServices

DUE = datetime(2027, 3, 1, 17, tzinfo=UTC)
ALL = PageRequest(1, 100)


Call = Callable[[TaskService, UUID], Awaitable[object]]

CALLS: dict[str, Call] = {
    "add": lambda tasks, _: tasks.add_task(TaskCreate(title="Another")),
    "get": lambda tasks, task_id: tasks.get_task(task_id),
    "list": lambda tasks, _: tasks.list_tasks(ALL),
    "newest": lambda tasks, _: tasks.newest_tasks(10),
    "change": lambda tasks, task_id: tasks.change_task(task_id, TaskUpdate(title="Taken")),
    "replace": lambda tasks, task_id: tasks.replace_task(task_id, TaskReplace(title="Taken")),
    "complete": lambda tasks, task_id: tasks.complete_task(task_id),
    "complete by name": lambda tasks, _: tasks.complete_named("buy milk"),
    "delete": lambda tasks, task_id: tasks.delete_task(task_id),
}


async def add(task_service: TaskServices, scope: Scope, title: str = "Buy milk", **values: Any) -> TaskRead:
    async with task_service(scope) as tasks:
        return await tasks.add_task(TaskCreate(title=title, **values))


async def logged(admin: asyncpg.Connection) -> list[tuple[int, str, Any]]:
    """Return every event in the database."""
    rows = await admin.fetch("SELECT seq, e, d::text AS d FROM channel_events ORDER BY channel, seq")
    return [(row["seq"], row["e"], orjson.loads(row["d"])) for row in rows]


async def test_added_task_is_the_callers_and_reads_the_same_later(task_service: TaskServices, scope: Scope) -> None:
    task = await add(task_service, scope, description="Two litres", due_at=DUE)

    async with task_service(scope) as tasks:
        assert await tasks.get_task(task.id) == task
        assert await tasks.list_tasks(ALL) == ([task], 1)
        assert await tasks.newest_tasks(5) == [task]
    assert (task.user_id, task.completed, task.due_at) == (scope.user_id, False, DUE)
    assert task.created_at == task.updated_at


async def test_change_keeps_what_is_left_out(task_service: TaskServices, scope: Scope) -> None:
    task = await add(task_service, scope, description="Two litres", due_at=DUE)

    async with task_service(scope) as tasks:
        changed = await tasks.change_task(task.id, TaskUpdate(title="Buy oat milk"))

    assert changed == task.model_copy(update={"title": "Buy oat milk", "updated_at": changed.updated_at})
    assert changed.updated_at > task.updated_at


async def test_change_clears_with_null(task_service: TaskServices, scope: Scope) -> None:
    task = await add(task_service, scope, description="Two litres", due_at=DUE)

    async with task_service(scope) as tasks:
        changed = await tasks.change_task(task.id, TaskUpdate(description=None, due_at=None))

    assert (changed.title, changed.description, changed.due_at) == ("Buy milk", None, None)


async def test_replace_resets_what_is_left_out(task_service: TaskServices, scope: Scope) -> None:
    task = await add(task_service, scope, description="Two litres", due_at=DUE, completed=True)

    async with task_service(scope) as tasks:
        changed = await tasks.replace_task(task.id, TaskReplace(title="Buy tea"))

    assert (changed.title, changed.description, changed.due_at, changed.completed) == ("Buy tea", None, None, False)
    assert (changed.id, changed.created_at) == (task.id, task.created_at)


async def test_each_change_is_announced_once(
    task_service: TaskServices, scope: Scope, admin: asyncpg.Connection, announcements: Announcements
) -> None:
    task = await add(task_service, scope)
    async with task_service(scope) as tasks:
        changed = await tasks.change_task(task.id, TaskUpdate(title="Buy tea"))
    async with task_service(scope) as tasks:
        replaced = await tasks.replace_task(task.id, TaskReplace(title="Buy rice", due_at=DUE))
    async with task_service(scope) as tasks:
        completed = await tasks.complete_task(task.id)
    async with task_service(scope) as tasks:
        await tasks.delete_task(task.id)

    assert await logged(admin) == [
        (1, "task.created", task.model_dump(mode="json")),
        (2, "task.updated", changed.model_dump(mode="json")),
        (3, "task.updated", replaced.model_dump(mode="json")),
        (4, "task.updated", completed.model_dump(mode="json")),
        (5, "task.deleted", {"id": str(task.id)}),
    ]
    assert announcements.names == ["task.created", *["task.updated"] * 3, "task.deleted"]
    assert {address for address, _ in announcements.events} == {(scope.workspace_id, f"tasks:{scope.user_id}")}


async def test_a_change_that_changes_nothing_is_not_announced(
    task_service: TaskServices, scope: Scope, announcements: Announcements
) -> None:
    task = await add(task_service, scope, completed=True)

    async with task_service(scope) as tasks:
        assert await tasks.change_task(task.id, TaskUpdate()) == task
        assert await tasks.change_task(task.id, TaskUpdate(title="Buy milk")) == task
        assert await tasks.replace_task(task.id, TaskReplace(title="Buy milk", completed=True)) == task
        assert await tasks.complete_task(task.id) == task

    assert announcements.names == ["task.created"]


async def test_nothing_is_kept_or_announced_of_a_transaction_that_rolls_back(
    task_service: TaskServices, scope: Scope, admin: asyncpg.Connection, announcements: Announcements
) -> None:
    task = await add(task_service, scope)
    announcements.events.clear()
    before = await logged(admin)

    async def change_and_fail(call: Call) -> None:
        async with task_service(scope) as tasks:
            await call(tasks, task.id)
            raise RuntimeError("afterwards")

    for name in ("add", "change", "complete", "delete"):
        with pytest.raises(RuntimeError, match="afterwards"):
            await change_and_fail(CALLS[name])

    assert await logged(admin) == before
    assert announcements.events == []
    async with task_service(scope) as tasks:
        assert await tasks.list_tasks(ALL) == ([task], 1)


@pytest.mark.usefixtures("without_filter", "without_row_level_security")
@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"add"}))
async def test_the_service_alone_refuses_another_users_row(
    call: str,
    task_service: TaskServices,
    scope: Scope,
    stranger: Scope,
    admin: asyncpg.Connection,
) -> None:
    task = await add(task_service, scope)
    before = await logged(admin)

    # Inside the transaction, so that nothing depends on its rolling back.
    async with task_service(stranger) as tasks:
        with pytest.raises(TaskNotFound):
            await CALLS[call](tasks, task.id)

    row = await admin.fetchrow("SELECT title, completed FROM tasks WHERE id = $1", task.id)
    assert (row["title"], row["completed"]) == ("Buy milk", False)
    assert await logged(admin) == before


@pytest.mark.parametrize("call", ["get", "change", "replace", "complete", "delete"])
async def test_a_task_that_is_not_there(call: str, task_service: TaskServices, scope: Scope) -> None:
    async with task_service(scope) as tasks:
        with pytest.raises(TaskNotFound):
            await CALLS[call](tasks, new_id())


async def test_concurrent_changes_lose_nothing(database: Database, task_service: TaskServices, scope: Scope) -> None:
    """The second waits for the first and starts from what it left."""
    task = await add(task_service, scope)

    async with task_service(scope) as first:
        await first.change_task(task.id, TaskUpdate(title="Buy tea"))
        async with database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            await connection.execute("SET LOCAL lock_timeout = '50ms'")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await connection.fetch("SELECT 1 FROM tasks WHERE id = $1 FOR UPDATE", task.id)
            await unit.session.rollback()
    async with task_service(scope) as second:
        changed = await second.complete_task(task.id)

    assert (changed.title, changed.completed) == ("Buy tea", True)


@pytest.mark.parametrize(
    ("name", "completes"),
    [
        ("Buy milk", "Buy milk"),
        ("  bUY MILK ", "Buy milk"),
        ("buy t", "Buy tea"),
        ("cat", "Feed the cat"),
        ("straße", "STRASSE fegen"),
    ],
)
async def test_complete_by_title(name: str, completes: str, task_service: TaskServices, scope: Scope) -> None:
    for title in ("Buy milk", "Buy milk for the neighbour", "Buy tea", "Feed the cat", "STRASSE fegen"):
        await add(task_service, scope, title)

    async with task_service(scope) as tasks:
        task = await tasks.complete_named(name.strip())
        done, _ = await tasks.list_tasks(ALL, completed=True)

    assert task.title == completes
    assert done == [task]


async def test_complete_by_id(task_service: TaskServices, scope: Scope) -> None:
    task = await add(task_service, scope)
    titled_like_an_id = await add(task_service, scope, str(new_id()))

    async with task_service(scope) as tasks:
        assert (await tasks.complete_named(str(task.id))).completed
        assert (await tasks.complete_named(titled_like_an_id.title)).id == titled_like_an_id.id


async def test_complete_by_a_title_that_many_have(
    task_service: TaskServices, scope: Scope, announcements: Announcements
) -> None:
    first = await add(task_service, scope, "Call Ann")
    second = await add(task_service, scope, "call ann")
    announcements.events.clear()

    async with task_service(scope) as tasks:
        with pytest.raises(TaskAmbiguous) as raised:
            await tasks.complete_named("Call Ann")
        with pytest.raises(TaskNotFound):
            await tasks.complete_named("Call Bob")

    assert raised.value.details == {
        "matches": [{"id": str(second.id), "title": "call ann"}, {"id": str(first.id), "title": "Call Ann"}]
    }
    assert announcements.events == []


async def test_complete_by_title_again_does_nothing_more(
    task_service: TaskServices, scope: Scope, announcements: Announcements
) -> None:
    task = await add(task_service, scope, "Buy milk")
    await add(task_service, scope, "Buy milk for the neighbour")
    announcements.events.clear()

    for _ in range(2):
        async with task_service(scope) as tasks:
            assert (await tasks.complete_named("buy milk")).id == task.id

    assert announcements.names == ["task.updated"]


async def test_a_task_completed_long_ago_is_not_taken_for_the_one_that_is_meant(
    task_service: TaskServices, scope: Scope
) -> None:
    await add(task_service, scope, "Buy milk", completed=True)
    today = await add(task_service, scope, "Buy milk today")

    with clock.shifted(3600):
        async with task_service(scope) as tasks:
            assert (await tasks.complete_named("buy milk")).id == today.id


def _task(number: int, title: str, completed: bool) -> TaskRead:
    moment = datetime(2027, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    return TaskRead(
        id=new_id(),
        user_id=new_id(),
        title=title,
        description=None,
        completed=completed,
        due_at=None,
        created_at=moment,
        updated_at=moment,
    )


@given(
    tasks=strategies.lists(strategies.tuples(strategies.text("ab ", min_size=1, max_size=4), strategies.booleans())),
    name=strategies.text("ab ", min_size=1, max_size=3),
)
def test_completing_by_name_is_idempotent(tasks: list[tuple[str, bool]], name: str) -> None:
    known = [_task(number, title, completed) for number, (title, completed) in enumerate(tasks)]
    try:
        task = named_task(name, known)
    except (TaskAmbiguous, TaskNotFound):
        return
    if not task.completed:
        done = task.model_copy(update={"completed": True, "updated_at": datetime(2027, 1, 2, tzinfo=UTC)})
        known[known.index(task)] = done

    assert named_task(name, known).id == task.id
