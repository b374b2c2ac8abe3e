"""What this module has of a person: conversations, and the messages in them."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from parley.chat.messages import conversation_channel, message_json
from parley.chat.payments import abandon, waiting_in
from parley.chat.repository import ConversationRepository
from parley.core.db import Database
from parley.core.personal_data import Person, Record, records
from parley.realtime.events import LoggedEvent, NewEvent
from parley.realtime.log import append, forget_channel

_CONVERSATIONS = """
    SELECT id, row_to_json(c)::text AS row FROM (
        SELECT id, title, model, assistant, owner_id, current_id, shared, shared_access, archived, pinned, created_at,
               updated_at
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
_PINS = """
    SELECT id, row_to_json(p)::text AS row FROM (
        SELECT conversation_id AS id FROM conversation_pins
        WHERE workspace_id = $1 AND user_id = $2 AND conversation_id > $3 ORDER BY conversation_id LIMIT $4
    ) p ORDER BY id
"""
_UNPIN = "DELETE FROM conversation_pins WHERE workspace_id = $1 AND user_id = $2"
_ELSEWHERE = """
    SELECT conversation_id FROM messages
    WHERE workspace_id = $1 AND author_id = $2 AND (parts::text <> '[]' OR cid IS NOT NULL) LIMIT 1
"""
# What is in the log up to where the oldest reply begins that is still open: it has the text of messages too.
_TRIM = """
    WITH old AS (
        SELECT coalesce(
            (SELECT min(r.start_seq) - 2 FROM replies r
             WHERE r.workspace_id = $1 AND r.channel = $2 AND r.status IN ('queued', 'streaming')),
            (SELECT h.seq FROM channel_heads h WHERE h.workspace_id = $1 AND h.channel = $2)) AS until
    ), gone AS (
        DELETE FROM channel_events e USING old WHERE e.workspace_id = $1 AND e.channel = $2 AND e.seq <= old.until
    )
    UPDATE channel_heads h SET floor = greatest(h.floor, old.until) FROM old
    WHERE h.workspace_id = $1 AND h.channel = $2
"""
# In a conversation of somebody else's the answers below it stay, so the row does too.
_EMPTY = """
    UPDATE messages m SET parts = '[]'::json, error = NULL, cid = NULL, body_hash = NULL
    WHERE m.workspace_id = $1 AND m.conversation_id = $3 AND m.id IN (
        SELECT w.id FROM messages w
        WHERE w.workspace_id = $1 AND w.author_id = $2 AND w.conversation_id = $3
          AND (w.parts::text <> '[]' OR w.cid IS NOT NULL) LIMIT 200)
    RETURNING m.id, m.conversation_id, m.role, m.status, m.model, m.parent_id, m.usage::text AS usage, m.cost,
              m.created_at, m.completed_at
"""


class ChatData:
    """The conversations of a person."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield conversations and messages, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            for name, statement in (
                ("conversations", _CONVERSATIONS),
                ("messages", _MESSAGES),
                ("conversation_pins", _PINS),
            ):
                entry = f"workspaces/{workspace_id}/{name}.json"
                async for record in records(open_unit, entry, statement, workspace_id, person.user_id):
                    yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove conversations with their messages and their log, some at a time.

        What the person said in conversations of others is emptied there, and its readers are told.
        """
        for workspace_id in person.workspace_ids:
            while await self._erase_some(database, person, workspace_id):
                pass
            while await self._empty_some(database, person, workspace_id):
                pass

    async def _erase_some(self, database: Database, person: Person, workspace_id: UUID) -> bool:
        async with database.unit_of_work(person.scope(workspace_id)) as unit:
            connection = await unit.driver()
            ids = [row["id"] for row in await connection.fetch(_SOME, workspace_id, person.user_id)]
            await connection.execute(_ERASE, workspace_id, person.user_id, ids)
            waiting = {}
            for id_ in ids:
                channel = conversation_channel(workspace_id, id_)
                waiting[id_] = await waiting_in(unit, channel)
                await forget_channel(unit, channel)
            if not ids:
                await connection.execute(_UNPIN, workspace_id, person.user_id)
            await abandon(unit, workspace_id, waiting)
        return bool(ids)

    async def _empty_some(self, database: Database, person: Person, workspace_id: UUID) -> bool:
        scope = person.scope(workspace_id)
        async with database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            conversation_id = await connection.fetchval(_ELSEWHERE, workspace_id, person.user_id)
            if conversation_id is None:
                return False
            channel = conversation_channel(workspace_id, conversation_id)
            await ConversationRepository(unit, scope).hold(conversation_id)
            await connection.execute(_TRIM, *channel.address)
            rows = await connection.fetch(_EMPTY, workspace_id, person.user_id, conversation_id)
            events = [
                NewEvent(channel, "message.updated", {**message_json(_emptied(row)), "cid": None}) for row in rows
            ]
            # Whoever reads along finds them in the log: nobody here publishes.
            await append(unit, _Nobody(), events)
        return True


class _Nobody:
    def publish(self, address: tuple[UUID, str], events: Sequence[LoggedEvent]) -> None:
        pass


def _emptied(row: asyncpg.Record) -> dict[str, Any]:
    usage = row["usage"]
    return {**row, "parts": [], "error": None, "usage": None if usage is None else orjson.loads(usage)}
