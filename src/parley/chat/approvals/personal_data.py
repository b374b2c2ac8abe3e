"""What approvals have of a person: the calls that were made for them, with their arguments."""

from collections.abc import AsyncIterator
from functools import partial

from parley.core.db import Database
from parley.core.personal_data import Person, Record, records

_APPROVALS = """
    SELECT id, row_to_json(a)::text AS row FROM (
        SELECT id, reply_id, tool, arguments, approved, decided_by, decided_at, created_at, expires_at
        FROM tool_approvals WHERE workspace_id = $1 AND user_id = $2 AND id > $3 ORDER BY id LIMIT $4
    ) a ORDER BY id
"""
_ERASE = "DELETE FROM tool_approvals WHERE workspace_id = $1 AND user_id = $2"


class ApprovalData:
    """The tool calls that a person was asked about."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield them, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            entry = f"workspaces/{workspace_id}/tool_approvals.json"
            async for record in records(open_unit, entry, _APPROVALS, workspace_id, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove them."""
        for workspace_id in person.workspace_ids:
            async with database.unit_of_work(person.scope(workspace_id)) as unit:
                connection = await unit.driver()
                await connection.execute(_ERASE, workspace_id, person.user_id)
