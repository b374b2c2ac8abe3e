"""What this module has of a person: the jobs that were done for them."""

from collections.abc import AsyncIterator

from parley.core.db import Database
from parley.core.personal_data import Person, Record, records

_EXPORT = """
    SELECT id, row_to_json(j)::text AS row FROM (
        SELECT id, workspace_id, kind, status, progress, result, error, created_at, started_at, finished_at
        FROM jobs WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3
    ) j ORDER BY id
"""
# Work of the installation names its user in the payload only. What is running now is left to end by itself.
_ERASE = """
    DELETE FROM jobs WHERE user_id = $1
       OR (workspace_id = '00000000-0000-0000-0000-000000000000' AND status <> 'running'
           AND payload::text LIKE '%' || $1::text || '%')
"""


class JobData:
    """The jobs of a person."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield the person's jobs."""
        async for record in records(database.system_unit_of_work, "jobs.json", _EXPORT, person.user_id):
            yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove the person's jobs."""
        async with database.system_unit_of_work() as unit:
            connection = await unit.driver()
            await connection.execute(_ERASE, person.user_id)
