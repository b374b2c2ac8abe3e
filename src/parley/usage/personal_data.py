"""What this module has of a person: which calls of models were made for them."""

from collections.abc import AsyncIterator
from functools import partial

from parley.core.db import Database
from parley.core.personal_data import Person, Record, records

_EXPORT = """
    SELECT id, row_to_json(u)::text AS row FROM (
        SELECT id, workspace_id, key_id, conversation_id, message_id, purpose, provider, model, attempt, status, error,
               input_tokens, cached_tokens, output_tokens, images, estimated, cost::text AS cost, started_at, ended_at
        FROM usage_entries WHERE workspace_id = $1 AND user_id = $2 AND id > $3 ORDER BY id LIMIT $4
    ) u ORDER BY id
"""
# The figures are the workspace's books and stay; whose calls they were is forgotten, with the keys that would tell.
_ERASE = (
    "UPDATE usage_entries SET user_id = NULL, key_id = NULL WHERE workspace_id = $1 AND user_id = $2",
    """
    UPDATE usage_reservations SET user_id = NULL, key_id = NULL, expires_at = coalesce(expires_at, now())
    WHERE workspace_id = $1 AND user_id = $2
    """,
)


class UsageData:
    """The ledger's rows of a person. Budgets of theirs go with their membership."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield what was called for the person, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            entry = f"workspaces/{workspace_id}/usage.json"
            async for record in records(open_unit, entry, _EXPORT, workspace_id, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Take the person out of the ledger."""
        for workspace_id in person.workspace_ids:
            async with database.system_unit_of_work() as unit:
                connection = await unit.driver()
                for statement in _ERASE:
                    await connection.execute(statement, workspace_id, person.user_id)
