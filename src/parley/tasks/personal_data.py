"""What this module has of a person: the tasks."""

from collections.abc import AsyncIterator
from functools import partial

from parley.core.db import Database
from parley.core.personal_data import Person, Record, records

_EXPORT = """
    SELECT id, row_to_json(t)::text AS row FROM (
        SELECT id, user_id, title, description, completed, due_at, created_at, updated_at
        FROM tasks WHERE workspace_id = $1 AND user_id = $2 AND id > $3 ORDER BY id LIMIT $4
    ) t ORDER BY id
"""
_ERASE = "DELETE FROM tasks WHERE workspace_id = $1 AND user_id = $2"


class TaskData:
    """The tasks of a person."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield the person's tasks, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            entry = f"workspaces/{workspace_id}/tasks.json"
            async for record in records(open_unit, entry, _EXPORT, workspace_id, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove the person's tasks."""
        for workspace_id in person.workspace_ids:
            async with database.unit_of_work(person.scope(workspace_id)) as unit:
                connection = await unit.driver()
                await connection.execute(_ERASE, workspace_id, person.user_id)
