"""The outbox on a fresh database, and dispatchers of its own."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.settings import JobSettings
from parley.jobs.inprocess import InProcessDispatcher
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobRegistry, JobRun, JobType
from parley.realtime.events import LoggedEvent

ENDED = ("completed", "failed", "cancelled")


async def until(holds: Callable[[], Awaitable[bool]], *, timeout_s: float = 10) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + timeout_s
    while not await holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


@dataclass
class Heard:
    """Stands where the rings of the process are: keeps the data of each event that is published."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def publish(self, address: tuple[UUID, str], events: Sequence[LoggedEvent]) -> None:
        """Take committed events."""
        self.events += [{**event.d, "channel": address[1], "e": event.e} for event in events]

    def states(self, id: UUID) -> list[str]:
        """Return the states that a job was said to be in."""
        return [event["status"] for event in self.events if event["id"] == str(id)]


@dataclass
class Outbox:
    """Adds jobs, and looks at them past every policy."""

    database: Database
    admin: asyncpg.Connection
    workspace: UUID
    user: UUID

    async def add(self, kind: str = "work", payload: dict[str, Any] | None = None, **options: Any) -> UUID:
        """Add a job of the workspace and the user."""
        options = {"workspace_id": self.workspace, "user_id": self.user, **options}
        async with self.database.system_unit_of_work() as unit:
            return await enqueue(unit, kind, payload or {}, **options)

    async def flood(self, count: int) -> None:
        """Add many jobs of the workspace at once."""
        await self.admin.execute(
            "INSERT INTO jobs (workspace_id, id, kind, payload, max_attempts) "
            "SELECT $1, gen_random_uuid(), 'work', '{}', 3 FROM generate_series(1, $2)",
            self.workspace,
            count,
        )
        await self.admin.execute("ANALYZE jobs")

    async def new_workspace(self) -> UUID:
        """Make a workspace."""
        id_ = new_id()
        await self.admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'w', false)", id_)
        return id_

    async def row(self, id: UUID) -> asyncpg.Record:
        """Return a job's row."""
        row = await self.admin.fetchrow("SELECT * FROM jobs WHERE id = $1", id)
        assert row is not None
        return row

    async def when(self, id: UUID, holds: Callable[[asyncpg.Record], bool]) -> asyncpg.Record:
        """Return a job's row once something holds of it."""

        async def look() -> bool:
            return holds(await self.row(id))

        await until(look)
        return await self.row(id)

    async def ended(self, id: UUID) -> asyncpg.Record:
        """Return a job's row once it has ended."""
        return await self.when(id, lambda row: row["status"] in ENDED)


@pytest.fixture
async def outbox(database: Database, admin: asyncpg.Connection) -> Outbox:
    user, workspace = new_id(), new_id()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'w', false)", workspace)
    await admin.execute(
        "INSERT INTO users (id, email, email_norm, email_verified) VALUES ($1, 'u@e.org', 'u@e.org', false)", user
    )
    # What handlers of these tests do.
    await admin.execute("CREATE TABLE effects (job_id uuid, note text)")
    await admin.execute("CREATE UNIQUE INDEX ON effects (job_id)")
    await admin.execute("GRANT SELECT, INSERT ON effects TO parley_system")
    return Outbox(database, admin, workspace, user)


Handler = Callable[[JobRun], Awaitable[dict[str, Any] | None]]


def make_dispatcher(
    database: Database, *types: JobType | Handler, heard: Heard | None = None, **settings: Any
) -> InProcessDispatcher:
    """Return a dispatcher of these kinds; a bare handler is of the kind `work`."""
    made = [one if isinstance(one, JobType) else JobType("work", one) for one in types]
    values: dict[str, Any] = {"poll_s": 0.02, "lease_s": 600, "drain_s": 0, **settings}
    return InProcessDispatcher(database, JobRegistry(made), heard or Heard(), JobSettings(**values))


@asynccontextmanager
async def dispatching(
    database: Database, *types: JobType | Handler, heard: Heard | None = None, **settings: Any
) -> AsyncIterator[InProcessDispatcher]:
    """Run a dispatcher for the length of the block."""
    made = make_dispatcher(database, *types, heard=heard, **settings)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def lose(dispatcher: InProcessDispatcher) -> None:
    """End a dispatcher as the death of its process would: nothing of it is written down or handed back."""
    mine = [task for task in asyncio.all_tasks() if task.get_name().startswith(f"jobs-{dispatcher.owner}")]
    assert mine
    for task in mine:
        task.cancel()
    await asyncio.gather(*mine, return_exceptions=True)
