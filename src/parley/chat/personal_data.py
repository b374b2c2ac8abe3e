"""What this module has of a person: conversations, and the messages in them."""

from collections.abc import AsyncIterator
from functools import partial
from uuid import UUID

from parley.chat.messages import conversation_channel
from parley.core.db import Database
from parley.core.personal_data import Person, Record, records
from parley.realtime.log import forget_channel

_CONVERSATIONS = """
    SELECT id, row_to_json(c)::text AS row FROM (
        SELECT id, title, model, assistant, owner_id, current_id, shared, archived, created_at, updated_at
        FROM conversations WHERE workspace_id = $1 AND owner_id = $2 AND id > $3 ORDER BY id LIMIT $4
    ) c ORDER BY id
"""
# A reply's author is whoever asked for it.
_MESSAGES = """
    SELECT id, row_to_json(m)::text AS row FROM (
        SELECT id, conversation_id, parent_id, role, parts, status, model, usage, cost, error, created_at, completed_at
        FROM messages WHERE workspace_id = $1 AND author_id = $2 AND id > $3 ORDER BY id LIMIT $4
    ) m ORDER BY id
"""
# The lock first, then the log's rows: the order in which a send takes them.
_SOME = """
    SELECT id FROM conversations WHERE workspace_id = $1 AND owner_id = $2 ORDER BY id LIMIT 50 FOR UPDATE
"""
_ERASE = "DELETE FROM conversations WHERE workspace_id = $1 AND owner_id = $2 AND id = ANY($3::uuid[])"
# In a conversation of somebody else's the answers below it stay, so the row does too.
_EMPTY = """
    UPDATE messages SET parts = '[]'::json, error = NULL, cid = NULL, body_hash = NULL
    WHERE workspace_id = $1 AND author_id = $2
"""


class ChatData:
    """The conversations of a person."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield conversations and messages, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            for name, statement in (("conversations", _CONVERSATIONS), ("messages", _MESSAGES)):
                entry = f"workspaces/{workspace_id}/{name}.json"
                async for record in records(open_unit, entry, statement, workspace_id, person.user_id):
                    yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove conversations with their messages and their log, some at a time."""
        for workspace_id in person.workspace_ids:
            while await self._erase_some(database, person, workspace_id):
                pass

    async def _erase_some(self, database: Database, person: Person, workspace_id: UUID) -> bool:
        async with database.unit_of_work(person.scope(workspace_id)) as unit:
            connection = await unit.driver()
            ids = [row["id"] for row in await connection.fetch(_SOME, workspace_id, person.user_id)]
            await connection.execute(_ERASE, workspace_id, person.user_id, ids)
            for id_ in ids:
                await forget_channel(unit, conversation_channel(workspace_id, id_))
            if not ids:
                await connection.execute(_EMPTY, workspace_id, person.user_id)
        return bool(ids)
