"""What models may do."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from parley.core.db import Database
from parley.core.pagination import PageRequest
from parley.core.scope import Scope
from parley.llm.tools import Tool, ToolContext
from parley.tasks.errors import TaskAmbiguous, TaskNotFound
from parley.tasks.tools import TOOLS
from tests.tasks.conftest import Announcements, TaskServices

BY_NAME = {tool.name: tool for tool in TOOLS}
RunTool = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def run_tool(database: Database, announcements: Announcements) -> RunTool:
    """Run a tool as the chat does: arguments from a model, a transaction of its own."""

    async def run(scope: Scope, name: str, **arguments: Any) -> dict[str, Any]:
        tool = BY_NAME[name]
        async with database.unit_of_work(scope) as unit:
            context = ToolContext(unit, scope, announcements)
            result = await tool.run(context, tool.arguments.model_validate(arguments))
        assert orjson.loads(orjson.dumps(result)) == result, "a result is plain JSON"
        return result

    return run


async def test_add_list_complete(run_tool: RunTool, scope: Scope, announcements: Announcements) -> None:
    added = await run_tool(scope, "add_task", title="Buy milk", due_at="2027-03-01T18:00:00+01:00")
    await run_tool(scope, "add_task", title="Feed the cat", description="The grey one")
    completed = await run_tool(scope, "complete_task", task="feed the CAT")
    listed = await run_tool(scope, "list_tasks")
    still_open = await run_tool(scope, "list_tasks", completed=False)

    assert added["task"] == {
        "id": added["task"]["id"],
        "title": "Buy milk",
        "completed": False,
        "due_at": "2027-03-01T17:00:00Z",
    }
    assert completed["task"]["completed"] is True
    assert listed == {"tasks": [completed["task"], added["task"]], "total": 2}
    assert still_open == {"tasks": [added["task"]], "total": 1}
    assert announcements.names == ["task.created", "task.created", "task.updated"]


async def test_complete_is_idempotent(run_tool: RunTool, scope: Scope, announcements: Announcements) -> None:
    task_id = (await run_tool(scope, "add_task", title="Buy milk"))["task"]["id"]

    answers = [await run_tool(scope, "complete_task", task=task) for task in ("milk", "milk", task_id)]

    assert answers[0] == answers[1] == answers[2]
    assert announcements.names == ["task.created", "task.updated"]


async def test_complete_says_what_is_wrong(run_tool: RunTool, scope: Scope) -> None:
    await run_tool(scope, "add_task", title="Buy milk")
    await run_tool(scope, "add_task", title="Buy tea")

    with pytest.raises(TaskAmbiguous) as ambiguous:
        await run_tool(scope, "complete_task", task="buy")
    with pytest.raises(TaskNotFound):
        await run_tool(scope, "complete_task", task="sell")

    assert [match["title"] for match in ambiguous.value.details["matches"]] == ["Buy tea", "Buy milk"]


async def test_tools_stay_with_the_caller(
    run_tool: RunTool, scope: Scope, stranger: Scope, task_service: TaskServices
) -> None:
    task_id = (await run_tool(scope, "add_task", title="Buy milk"))["task"]["id"]

    assert await run_tool(stranger, "list_tasks") == {"tasks": [], "total": 0}
    for task in ("Buy milk", task_id):
        with pytest.raises(TaskNotFound):
            await run_tool(stranger, "complete_task", task=task)

    async with task_service(scope) as tasks:
        [task], _ = await tasks.list_tasks(PageRequest(1, 10))
    assert not task.completed


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add_task", {}),
        ("add_task", {"title": "  "}),
        ("add_task", {"title": "x" * 201}),
        ("add_task", {"title": "x", "user_id": "019f0000-0000-7000-8000-000000000000"}),
        ("add_task", {"title": "x", "workspace_id": "019f0000-0000-7000-8000-000000000000"}),
        ("add_task", {"title": "x", "due_at": "tomorrow"}),
        ("list_tasks", {"completed": "perhaps"}),
        ("complete_task", {}),
        ("complete_task", {"task": ""}),
        ("complete_task", {"task": "a\x00b"}),
    ],
)
def test_arguments_are_validated(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BY_NAME[name].arguments.model_validate(arguments)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_argument_is_described(tool: Tool) -> None:
    schema = tool.spec.parameters

    assert schema["additionalProperties"] is False
    assert all(field.get("description") for field in schema["properties"].values())
    assert not {"user_id", "workspace_id", "role"} & set(schema["properties"])
