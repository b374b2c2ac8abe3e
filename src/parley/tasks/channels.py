"""The live channel of tasks."""

from collections.abc import Mapping

from pydantic import BaseModel

from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.realtime.channels import ChannelNotFound, Mode, State
from parley.realtime.events import Channel
from parley.realtime.server_frames import Closed, Deleted, example, example_of
from parley.tasks.repository import TaskRepository
from parley.tasks.schemas import TaskRead
from parley.tasks.service import CHANNEL, TaskReader, channel_of
from parley.tenancy.permissions import Permission

NEWEST = 200


class TasksState(Closed):
    """The newest tasks, newest first."""

    model_config = example(items=[example_of(TaskRead)])

    items: list[TaskRead]


class TasksChannel:
    """`tasks`: the caller's own, so the name needs no id. Its state is `{"items": newest 200}`."""

    prefix = CHANNEL
    mode: Mode = "log"
    permission: str = Permission.TASKS_READ
    pattern = CHANNEL
    events: Mapping[str, type[BaseModel]] = {
        "task.created": TaskRead,
        "task.updated": TaskRead,
        "task.deleted": Deleted,
    }
    snapshot: type[BaseModel] = TasksState

    async def resolve(self, unit: UnitOfWork, scope: Scope, argument: str) -> Channel:  # noqa: ARG002  same for all
        """Return the caller's channel. Raises `ChannelNotFound` for any name below `tasks:`."""
        if argument:
            raise ChannelNotFound
        return channel_of(scope)

    async def state(self, unit: UnitOfWork, scope: Scope, channel: Channel) -> State:  # noqa: ARG002  same for all
        """Return the newest tasks, newest first."""
        tasks = await TaskReader(TaskRepository(unit, scope), scope).newest_tasks(NEWEST)
        return {"items": [task.model_dump(mode="json") for task in tasks]}
