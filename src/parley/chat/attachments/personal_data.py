"""What attachments are a person's: those that the person uploaded."""

import base64
from collections.abc import AsyncIterator
from uuid import UUID

import orjson

from parley.core.db import Database
from parley.core.personal_data import Person, Record

_PAGE = 100

_UPLOADED = """
    SELECT id, store, row_to_json(a)::text AS row FROM (
        SELECT id, conversation_id, kind, media_type, name, size, width, height, store, created_at
        FROM attachments WHERE workspace_id = $1 AND user_id = $2 AND complete AND id > $3 ORDER BY id LIMIT $4
    ) a ORDER BY id
"""
_DATA = "SELECT data FROM attachment_chunks WHERE workspace_id = $1 AND attachment_id = $2 ORDER BY number"
# Some at a time: their bytes go with them.
_ERASE = """
    DELETE FROM attachments WHERE workspace_id = $1 AND id IN (
        SELECT id FROM attachments WHERE workspace_id = $1 AND user_id = $2 ORDER BY id LIMIT 50)
    RETURNING id
"""


class AttachmentData:
    """The files of a person. Those in a store outside the database are named; their bytes are had over the API."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield what there is about each file, with its bytes in base64, one file in memory at a time."""
        for workspace_id in person.workspace_ids:
            entry, after = f"workspaces/{workspace_id}/attachments.json", UUID(int=0)
            while True:
                async with database.unit_of_work(person.scope(workspace_id)) as unit:
                    connection = await unit.driver()
                    rows = await connection.fetch(_UPLOADED, workspace_id, person.user_id, after, _PAGE)
                for row in rows:
                    data = await self._data(database, person, workspace_id, row["id"])
                    yield Record(entry, orjson.dumps({**orjson.loads(row["row"]), "data": data}).decode())
                if len(rows) < _PAGE:
                    break
                after = rows[-1]["id"]

    async def _data(self, database: Database, person: Person, workspace_id: UUID, id: UUID) -> str | None:
        async with database.unit_of_work(person.scope(workspace_id)) as unit:
            connection = await unit.driver()
            pieces = [row["data"] for row in await connection.fetch(_DATA, workspace_id, id)]
        return base64.b64encode(b"".join(pieces)).decode() if pieces else None

    async def erase(self, database: Database, person: Person) -> None:
        """Remove the person's files, also in conversations of others; objects outside follow within the hour."""
        for workspace_id in person.workspace_ids:
            more = True
            while more:
                async with database.unit_of_work(person.scope(workspace_id)) as unit:
                    connection = await unit.driver()
                    more = bool(await connection.fetch(_ERASE, workspace_id, person.user_id))
