"""What can be done with tasks. Every change is also an event on the caller's `tasks` channel, in one transaction."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.engine import RowMapping

from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.scope import Scope
from parley.realtime.events import Channel, NewEvent
from parley.realtime.log import Publisher, append
from parley.tasks.errors import TaskAmbiguous, TaskNotFound
from parley.tasks.models import Task
from parley.tasks.repository import TaskRepository
from parley.tasks.schemas import TaskCreate, TaskRead, TaskReplace, TaskUpdate

CHANNEL = "tasks"

_SEARCHED = 1_000
"""How many tasks a title is looked for in, from the newest."""
_REPEATED_WITHIN = timedelta(minutes=10)
_MATCHES_SHOWN = 5


def channel_of(scope: Scope) -> Channel:
    """Return the channel of the caller's tasks: everyone calls theirs `tasks`."""
    return Channel(scope.workspace_id, key=f"{CHANNEL}:{scope.user_id}", name=CHANNEL, owner_id=scope.user_id)


def named_task(name: str, tasks: Sequence[TaskRead]) -> TaskRead:
    """Return the one open task with this title, else with this beginning, else with this part.

    A completed one counts where no open one matches as well. Raises `TaskNotFound` and `TaskAmbiguous`.
    """
    wanted = name.casefold()
    ways: tuple[Callable[[str], bool], ...] = (
        lambda title: title == wanted,
        lambda title: title.startswith(wanted),
        lambda title: wanted in title,
    )
    for matches in ways:
        found = [task for task in tasks if matches(task.title.casefold())]
        still_open = [task for task in found if not task.completed]
        if len(still_open) > 1:
            shown = [{"id": str(task.id), "title": task.title} for task in still_open[:_MATCHES_SHOWN]]
            raise TaskAmbiguous(details={"matches": shown})
        if found:
            return still_open[0] if still_open else max(found, key=lambda task: task.updated_at)
    raise TaskNotFound("No open task has this title.")


class TaskReader:
    """Reads the caller's tasks.

    It refuses a row of anyone else whatever the repository let through: the second of three checks, the last being
    row-level security.
    """

    def __init__(self, repository: TaskRepository, scope: Scope) -> None:
        self._repository = repository
        self._scope = scope

    def _own(self, row: Mapping[str, Any] | RowMapping) -> TaskRead:
        if row["user_id"] != self._scope.user_id or row["workspace_id"] != self._scope.workspace_id:
            raise TaskNotFound
        # Not validated once more: the values come from columns of the right types.
        return TaskRead.model_construct(**row)

    async def get_task(self, id: UUID) -> TaskRead:
        """Return a task. Raises `TaskNotFound`."""
        return self._own(await self._repository.get(id))

    async def list_tasks(self, page: PageRequest, *, completed: bool | None = None) -> tuple[list[TaskRead], int]:
        """Return one page, newest first, and how many there are in all."""
        rows, total = await self._repository.list(page, completed=completed)
        return [self._own(row) for row in rows], total

    async def newest_tasks(self, limit: int) -> list[TaskRead]:
        """Return the newest tasks, newest first."""
        return [self._own(row) for row in await self._repository.newest(limit)]


class TaskService(TaskReader):
    """Changes the caller's tasks too. A change that changes nothing is neither written nor announced."""

    def __init__(self, repository: TaskRepository, scope: Scope, unit: UnitOfWork, publisher: Publisher) -> None:
        super().__init__(repository, scope)
        self._unit = unit
        self._publisher = publisher

    async def add_task(self, new: TaskCreate) -> TaskRead:
        """Add a task of the caller's."""
        scope = self._scope
        row = Task(workspace_id=scope.workspace_id, user_id=scope.user_id, **new.model_dump())
        task = TaskRead.model_validate(await self._repository.add(row))
        await self._announce("task.created", task)
        return task

    async def change_task(self, id: UUID, part: TaskUpdate) -> TaskRead:
        """Change the fields that are there. Raises `TaskNotFound`."""
        return await self._change(id, part.model_dump(exclude_unset=True))

    async def replace_task(self, id: UUID, whole: TaskReplace) -> TaskRead:
        """Change all fields. Raises `TaskNotFound`."""
        return await self._change(id, whole.model_dump())

    async def complete_task(self, id: UUID) -> TaskRead:
        """Mark a task as done; one that is done stays so. Raises `TaskNotFound`."""
        return await self._change(id, {"completed": True})

    async def complete_named(self, name: str) -> TaskRead:
        """Mark the task that a title, the beginning or a part of one, or an id stands for as done.

        Case does not count. A repeated call finds the task that it completed, and not the next best one: whoever
        calls may not have heard the first answer. Raises `TaskNotFound` and `TaskAmbiguous`.
        """
        with suppress(ValueError, TaskNotFound):
            return await self.complete_task(UUID(name))
        since = clock.now() - _REPEATED_WITHIN
        rows = await self._repository.open_or_completed_since(since, limit=_SEARCHED)
        return await self.complete_task(named_task(name, [self._own(row) for row in rows]).id)

    async def delete_task(self, id: UUID) -> None:
        """Remove a task. Raises `TaskNotFound`."""
        self._own(await self._repository.get(id, lock=True))
        await self._repository.delete(id)
        await append(self._unit, self._publisher, [NewEvent(channel_of(self._scope), "task.deleted", {"id": str(id)})])

    async def _change(self, id: UUID, values: Mapping[str, Any]) -> TaskRead:
        # Read before writing, so that a row of anyone else is refused before it is touched.
        before = self._own(await self._repository.get(id, lock=True))
        changes = {name: value for name, value in values.items() if getattr(before, name) != value}
        if not changes:
            return before
        task = self._own(await self._repository.update(id, changes))
        await self._announce("task.updated", task)
        return task

    async def _announce(self, event: str, task: TaskRead) -> None:
        data = task.model_dump(mode="json")
        await append(self._unit, self._publisher, [NewEvent(channel_of(self._scope), event, data)])
