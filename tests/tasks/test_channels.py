"""The caller's own channel."""

import asyncpg
import pytest

from parley.core.db import Database
from parley.core.scope import Scope
from parley.realtime.channels import ChannelNotFound, Channels
from parley.realtime.events import Channel
from parley.tasks.channels import TasksChannel
from parley.tasks.schemas import TaskCreate, TaskUpdate
from tests.tasks.conftest import TaskServices


@pytest.fixture
def channels(database: Database) -> Channels:
    return Channels(database, [TasksChannel()])


async def test_everyone_has_their_own_under_the_same_name(channels: Channels, scope: Scope, stranger: Scope) -> None:
    channel, head, mode = await channels.authorise(scope, "tasks")
    other, _, _ = await channels.authorise(stranger, "tasks")

    assert channel == Channel(scope.workspace_id, f"tasks:{scope.user_id}", "tasks", scope.user_id)
    assert (head.seq, mode) == (0, "log")
    assert other.name == "tasks"
    assert other.address != channel.address


@pytest.mark.parametrize("name", ["tasks:me", "tasks:019f0000-0000-7000-8000-000000000000", "tasksx", "task"])
async def test_there_is_nothing_below_it(name: str, channels: Channels, scope: Scope) -> None:
    with pytest.raises(ChannelNotFound):
        await channels.authorise(scope, name)


async def test_another_users_channel_cannot_be_named(channels: Channels, scope: Scope, stranger: Scope) -> None:
    await channels.authorise(scope, "tasks")

    with pytest.raises(ChannelNotFound):
        await channels.authorise(stranger, f"tasks:{scope.user_id}")


async def test_state_is_what_the_events_lead_to(
    channels: Channels, task_service: TaskServices, scope: Scope, admin: asyncpg.Connection
) -> None:
    channel, _, _ = await channels.authorise(scope, "tasks")
    assert (await channels.snapshot(scope, channel)).state == {"items": []}

    async with task_service(scope) as tasks:
        first = await tasks.add_task(TaskCreate(title="First"))
        second = await tasks.add_task(TaskCreate(title="Second"))
        third = await tasks.add_task(TaskCreate(title="Third"))
        changed = await tasks.change_task(first.id, TaskUpdate(completed=True))
        await tasks.delete_task(second.id)
    snapshot = await channels.snapshot(scope, channel)

    assert snapshot.state == {"items": [third.model_dump(mode="json"), changed.model_dump(mode="json")]}
    assert snapshot.head.seq == 5 == await admin.fetchval("SELECT count(*) FROM channel_events")


async def test_state_holds_the_newest_200_of_the_caller_only(
    channels: Channels, task_service: TaskServices, scope: Scope, stranger: Scope
) -> None:
    async with task_service(scope) as tasks:
        added = [await tasks.add_task(TaskCreate(title=f"Task {number}")) for number in range(203)]
    async with task_service(stranger) as tasks:
        await tasks.add_task(TaskCreate(title="Theirs"))
    channel, _, _ = await channels.authorise(scope, "tasks")

    items = (await channels.snapshot(scope, channel)).state["items"]

    assert [item["id"] for item in items] == [str(task.id) for task in reversed(added[3:])]
