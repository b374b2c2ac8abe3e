"""What this module has of a person: the log of their own channels, run records, tickets."""

from collections.abc import AsyncIterator
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.personal_data import Person, Record

# Below the workspace each time: what is theirs is found by the keys that the tables have.
_ERASE = (
    """
    DELETE FROM channel_events e USING channel_heads h
    WHERE h.workspace_id = $1 AND h.owner_id = $2 AND e.workspace_id = $1 AND e.channel = h.channel
    """,
    "DELETE FROM channel_heads WHERE workspace_id = $1 AND owner_id = $2",
    "DELETE FROM channel_events WHERE workspace_id = $1 AND owner_id = $2",
    "DELETE FROM replies WHERE workspace_id = $1 AND user_id = $2",
    "DELETE FROM realtime_tickets WHERE workspace_id = $1 AND user_id = $2",
)
_STOP = """
    UPDATE replies SET cancel_requested = true, cancelled_by = user_id
    WHERE user_id = $1 AND status IN ('queued', 'streaming') AND NOT cancel_requested
"""
_STOP_IN = """
    UPDATE replies SET cancel_requested = true, cancelled_by = user_id
    WHERE workspace_id = $1 AND ($2::uuid IS NULL OR user_id = $2) AND status IN ('queued', 'streaming')
      AND NOT cancel_requested
"""
_NO_TICKETS_IN = "DELETE FROM realtime_tickets WHERE workspace_id = $1 AND ($2::uuid IS NULL OR user_id = $2)"
_NO_TICKETS = "DELETE FROM realtime_tickets WHERE user_id = $1"


class RealtimeData:
    """The log of a person's own channels. What it says is in the tables of other modules, so it is not exported."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:  # noqa: ARG002 - there is none
        """Yield nothing."""
        nothing: tuple[Record, ...] = ()
        for record in nothing:
            yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove the events, the heads and the run records of the person."""
        for workspace_id in person.workspace_ids:
            async with database.system_unit_of_work() as unit:
                connection = await unit.driver()
                for statement in _ERASE:
                    await connection.execute(statement, workspace_id, person.user_id)


async def stop_everything(unit: UnitOfWork, user_id: UUID) -> None:
    """Ask for the end of the user's open replies, as a cancel does, and take their tickets away. System role."""
    connection = await unit.driver()
    await connection.execute(_STOP, user_id)
    await connection.execute(_NO_TICKETS, user_id)


async def leave_workspace(unit: UnitOfWork, workspace_id: UUID, user_id: UUID | None) -> None:
    """Do the same in one workspace, for a member who goes, or for all when the workspace does. System role."""
    connection = await unit.driver()
    await connection.execute(_STOP_IN, workspace_id, user_id)
    await connection.execute(_NO_TICKETS_IN, workspace_id, user_id)
