"""What models may do with tasks."""

from typing import Annotated, Any

from pydantic import Field, StrictBool

from parley.core.pagination import PageRequest
from parley.llm.tools import Tool, ToolContext, tool
from parley.tasks.repository import TaskRepository
from parley.tasks.schemas import Description, DueAt, TaskCreate, TaskRead, Title
from parley.tasks.service import TaskService
from parley.tenancy.permissions import Permission

_LISTED = 50


def _service(context: ToolContext) -> TaskService:
    repository = TaskRepository(context.unit, context.scope)
    return TaskService(repository, context.scope, context.unit, context.publisher)


def _told(task: TaskRead) -> dict[str, Any]:
    # Not the description: fifty of them would fill a model's context.
    return task.model_dump(mode="json", include={"id", "title", "completed", "due_at"})


@tool(permission=Permission.TASKS_WRITE, side_effects=True)
async def add_task(
    context: ToolContext,
    *,
    title: Annotated[Title, Field(description="What is to be done, in a few words")],
    description: Annotated[Description | None, Field(description="More about it")] = None,
    due_at: Annotated[DueAt | None, Field(description="When it is due: ISO 8601 with an offset")] = None,
) -> dict[str, Any]:
    """Add a task to the user's list."""
    new = TaskCreate(title=title, description=description, due_at=due_at)
    return {"task": _told(await _service(context).add_task(new))}


@tool(permission=Permission.TASKS_READ, side_effects=False, idempotent=True)
async def list_tasks(
    context: ToolContext,
    *,
    completed: Annotated[
        StrictBool | None, Field(description="true: only the completed ones; false: only the open ones; left out: all")
    ] = None,
) -> dict[str, Any]:
    """List the user's newest 50 tasks."""
    tasks, total = await _service(context).list_tasks(PageRequest(1, _LISTED), completed=completed)
    return {"tasks": [_told(task) for task in tasks], "total": total}


@tool(permission=Permission.TASKS_WRITE, side_effects=True, idempotent=True)
async def complete_task(
    context: ToolContext,
    *,
    task: Annotated[Title, Field(description="The task's title, a part of it that no other open task has, or its id")],
) -> dict[str, Any]:
    """Mark one of the user's tasks as done."""
    return {"task": _told(await _service(context).complete_named(task))}


TOOLS: tuple[Tool, ...] = (add_task, list_tasks, complete_task)
"""The names are the ones that the built-in demo model calls."""
