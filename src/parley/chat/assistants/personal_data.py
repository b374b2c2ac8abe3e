"""What assistants have of a person: that they made some."""

from collections.abc import AsyncIterator
from functools import partial

from parley.core.db import Database
from parley.core.personal_data import Person, Record, records

_ASSISTANTS = """
    SELECT id, row_to_json(a)::text AS row FROM (
        SELECT id, name, title, description, instructions, model, tools, approval, approval_tools, parameters, version,
               created_at, updated_at
        FROM assistants WHERE workspace_id = $1 AND created_by = $2 AND id > $3 ORDER BY id LIMIT $4
    ) a ORDER BY id
"""
# Others talk with them: they stay, without their maker.
_FORGET = "UPDATE assistants SET created_by = NULL WHERE workspace_id = $1 AND created_by = $2"


class AssistantData:
    """The assistants that a person has made."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield them, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            entry = f"workspaces/{workspace_id}/assistants.json"
            async for record in records(open_unit, entry, _ASSISTANTS, workspace_id, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Forget who made them."""
        for workspace_id in person.workspace_ids:
            async with database.unit_of_work(person.scope(workspace_id)) as unit:
                connection = await unit.driver()
                await connection.execute(_FORGET, workspace_id, person.user_id)
