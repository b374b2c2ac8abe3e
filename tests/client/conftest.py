"""Clients and the servers that tests script for them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.client.author import Author
from tests.client.scripted import ScriptedServer, Watched

Watch = Callable[..., Watched]


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """No task of a client outlives it."""
    before = asyncio.all_tasks()
    yield
    left = [task for task in asyncio.all_tasks() - before if task is not asyncio.current_task() and not task.done()]
    assert not left


@pytest.fixture
async def server(nothing_left: None) -> AsyncIterator[ScriptedServer]:
    """A server that does what the test says."""
    async with ScriptedServer.running() as made:
        yield made


@pytest.fixture
async def watch(server: ScriptedServer) -> AsyncIterator[Watch]:
    """A function that starts a client of the scripted server: `watched = watch()`."""
    made: list[Watched] = []

    def start(**options: Any) -> Watched:
        watched = Watched(options.pop("url", server.url), **options)
        made.append(watched)
        watched.client.start()
        return watched

    yield start
    for watched in made:
        await watched.client.aclose()


@pytest.fixture
def author() -> Author:
    """A conversation with a reply that is being written."""
    made = Author()
    made.ask()
    made.delta(0, "one ")
    return made
