"""What this module has of a person: that they have set a key of a provider. The key is the workspace's and stays."""

from collections.abc import AsyncIterator

from parley.core.db import Database
from parley.core.personal_data import Person, Record

_EXPORT = """
    SELECT row_to_json(k)::text AS row FROM (
        SELECT provider, created_at, updated_at FROM provider_keys
        WHERE workspace_id = $1 AND created_by = $2 ORDER BY provider
    ) k
"""
_ERASE = "UPDATE provider_keys SET created_by = NULL WHERE workspace_id = $1 AND created_by = $2"


class ProviderKeyData:
    """The keys of providers that a person has set for their workspaces."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield for which providers, and when: nothing of the keys."""
        for workspace_id in person.workspace_ids:
            async with database.unit_of_work(person.scope(workspace_id)) as unit:
                connection = await unit.driver()
                rows = await connection.fetch(_EXPORT, workspace_id, person.user_id)
            for row in rows:
                yield Record(f"workspaces/{workspace_id}/provider_keys.json", row["row"])

    async def erase(self, database: Database, person: Person) -> None:
        """Forget who it was."""
        for workspace_id in person.workspace_ids:
            async with database.unit_of_work(person.scope(workspace_id)) as unit:
                connection = await unit.driver()
                await connection.execute(_ERASE, workspace_id, person.user_id)
