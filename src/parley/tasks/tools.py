"""What models may do with tasks."""

from typing import Any

from pydantic import Field, StrictBool

from parley.core.pagination import PageRequest
from parley.core.schemas import RequestModel
from parley.llm.tools import Tool, ToolContext
from parley.tasks.repository import TaskRepository
from parley.tasks.schemas import Description, DueAt, TaskCreate, TaskRead, Title
from parley.tasks.service import TaskService
from parley.tenancy.permissions import Permission

_LISTED = 50


class AddTask(RequestModel):
    """The arguments of `add_task`."""

    title: Title = Field(description="What is to be done, in a few words")
    description: Description | None = Field(default=None, description="More about it")
    due_at: DueAt | None = Field(default=None, description="When it is due: ISO 8601 with an offset")


class ListTasks(RequestModel):
    """The arguments of `list_tasks`."""

    completed: StrictBool | None = Field(
        default=None, description="true: only the completed ones; false: only the open ones; left out: all"
    )


class CompleteTask(RequestModel):
    """The arguments of `complete_task`."""

    task: Title = Field(description="The task's title, a part of it that no other open task has, or its id")


def _service(context: ToolContext) -> TaskService:
    repository = TaskRepository(context.unit, context.scope)
    return TaskService(repository, context.scope, context.unit, context.publisher)


def _told(task: TaskRead) -> dict[str, Any]:
    # Not the description: fifty of them would fill a model's context.
    return task.model_dump(mode="json", include={"id", "title", "completed", "due_at"})


async def _add_task(context: ToolContext, arguments: AddTask) -> dict[str, Any]:
    task = await _service(context).add_task(TaskCreate(**arguments.model_dump()))
    return {"task": _told(task)}


async def _list_tasks(context: ToolContext, arguments: ListTasks) -> dict[str, Any]:
    tasks, total = await _service(context).list_tasks(PageRequest(1, _LISTED), completed=arguments.completed)
    return {"tasks": [_told(task) for task in tasks], "total": total}


async def _complete_task(context: ToolContext, arguments: CompleteTask) -> dict[str, Any]:
    task = await _service(context).complete_named(arguments.task)
    return {"task": _told(task)}


_READ, _WRITE = Permission.TASKS_READ, Permission.TASKS_WRITE

TOOLS: tuple[Tool, ...] = (
    Tool("add_task", "Add a task to the user's list.", AddTask, _add_task, _WRITE),
    Tool("list_tasks", f"List the user's newest {_LISTED} tasks.", ListTasks, _list_tasks, _READ, idempotent=True),
    Tool(
        "complete_task", "Mark one of the user's tasks as done.", CompleteTask, _complete_task, _WRITE, idempotent=True
    ),
)
"""The names are the ones that the built-in demo model calls."""
