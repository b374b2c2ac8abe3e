"""SQL of conversations and messages.

The paths that a message takes are SQL on asyncpg inside the unit's transaction; the rest are Core statements.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg
import orjson
from sqlalchemy import ColumnElement, delete, update
from sqlalchemy.engine import RowMapping

from parley.chat.errors import ConversationNotFound
from parley.chat.models import Conversation
from parley.core.db import UnitOfWork
from parley.core.repository import ScopedRepository
from parley.core.scope import Scope

_table = Conversation.__table__  # type: ignore[attr-defined]  # SQLModel does not type it

# How many messages a model is given at most.
HISTORY = 200

_COLUMNS = """
    m.id, m.conversation_id, m.role, m.parts::text AS parts, m.status, m.model, m.parent_id, m.usage::text AS usage,
    m.cost, m.error::text AS error, m.created_at, m.completed_at, m.cid, m.body_hash
"""
# Every message statement joins the conversation: whoever may not see it sees none of its messages.
_VISIBLE = """
    FROM messages m JOIN conversations c ON c.workspace_id = m.workspace_id AND c.id = m.conversation_id
    WHERE m.workspace_id = $1 AND c.owner_id = $2
"""
_PAGE = f"""
    SELECT {_COLUMNS} {_VISIBLE} AND m.conversation_id = $3 AND ($4::uuid IS NULL OR m.id < $4)
    ORDER BY m.id DESC LIMIT $5
"""
_BY_ID = f"SELECT {_COLUMNS} {_VISIBLE} AND m.id = ANY($3::uuid[])"
_BY_CID = f"SELECT {_COLUMNS} {_VISIBLE} AND m.author_id = $2 AND m.cid = $3"
_ANSWER_TO = f"SELECT {_COLUMNS} {_VISIBLE} AND m.parent_id = $3 AND m.role = 'assistant' ORDER BY m.id LIMIT 1"

_LOCK = """
    SELECT id, title, model, owner_id, current_id, shared, archived, created_at, updated_at, assistant
    FROM conversations WHERE workspace_id = $1 AND owner_id = $2 AND id = $3 FOR UPDATE
"""
# What a send must know, in one look: was this key used, how many replies are open, is the parent one of ours, and
# what was said before, since most replies begin at once.
_BEFORE_SEND = """
    SELECT
        (SELECT m.id FROM messages m WHERE m.workspace_id = $1 AND m.author_id = $2 AND m.cid = $5) AS known_id,
        (SELECT count(*) FROM replies r
         WHERE r.workspace_id = $1 AND r.channel = $4 AND r.status IN ('queued', 'streaming')) AS open,
        (SELECT r.id FROM replies r
         WHERE r.workspace_id = $1 AND r.channel = $4 AND r.status = 'streaming') AS streaming_id,
        (SELECT count(*) FROM replies r
         WHERE r.workspace_id = $1 AND r.user_id = $2 AND r.status IN ('queued', 'streaming')) AS open_of_user,
        $6::uuid IS NULL OR EXISTS (
            SELECT 1 FROM messages m WHERE m.workspace_id = $1 AND m.conversation_id = $3 AND m.id = $6) AS parent_ok,
        (WITH RECURSIVE path AS (
            SELECT m.id, m.parent_id, m.role, m.parts, 1 AS depth
            FROM messages m WHERE m.workspace_id = $1 AND m.id = coalesce($6, $7::uuid)
            UNION ALL
            SELECT m.id, m.parent_id, m.role, m.parts, path.depth + 1
            FROM messages m JOIN path ON m.workspace_id = $1 AND m.id = path.parent_id WHERE path.depth < $8
        ) SELECT json_agg(json_build_array(role, parts) ORDER BY depth DESC)::text FROM path) AS history
"""
_ADD_TURN = """
    WITH added AS (
        INSERT INTO messages (workspace_id, id, conversation_id, parent_id, role, parts, status, model, author_id, cid,
                              body_hash, created_at, completed_at)
        VALUES ($1, $3, $2, $5, 'user', $6::json, 'completed', NULL, $7, $8, $9, $10, $10),
               ($1, $4, $2, $3, 'assistant', '[]'::json, 'queued', $11, $7, NULL, NULL, $10, NULL)
    ), run AS (
        INSERT INTO replies (workspace_id, id, channel, user_id, question_id, status, options, owner, fence, attempt,
                             appended, start_seq, lease_until, cancel_requested)
        VALUES ($1, $4, $12, $7, $3, $13, $14::json, $15, 1, $16, 0, $17,
                now() + make_interval(secs => $18), false)
    )
    UPDATE conversations SET current_id = $4, updated_at = $10, title = $19 WHERE workspace_id = $1 AND id = $2
"""
_ADD_REPLY = """
    WITH added AS (
        INSERT INTO messages (workspace_id, id, conversation_id, parent_id, role, parts, status, model, author_id, cid,
                              body_hash, created_at, completed_at)
        VALUES ($1, $3, $2, $4, 'assistant', '[]'::json, 'queued', $9, $5, $6, $7, $8, NULL)
    ), run AS (
        INSERT INTO replies (workspace_id, id, channel, user_id, question_id, status, options, owner, fence, attempt,
                             appended, start_seq, lease_until, cancel_requested)
        VALUES ($1, $3, $10, $5, $4, $11, $12::json, $13, 1, $14, 0, $15,
                now() + make_interval(secs => $16), false)
    )
    UPDATE conversations SET current_id = $3, updated_at = $8 WHERE workspace_id = $1 AND id = $2
"""
_FINISH = f"""
    UPDATE messages m SET parts = $3::json, status = $4, model = $5, usage = $6::json, cost = $7, error = $8::json,
        completed_at = $9, prompt_path = $10, prompt_hash = $11
    WHERE m.workspace_id = $1 AND m.id = $2
    RETURNING {_COLUMNS}
"""  # noqa: S608 - the columns stand above
_PATH = """
    WITH RECURSIVE path AS (
        SELECT m.id, m.parent_id, m.role, m.parts::text AS parts, 1 AS depth
        FROM messages m WHERE m.workspace_id = $1 AND m.id = $2
        UNION ALL
        SELECT m.id, m.parent_id, m.role, m.parts::text, path.depth + 1
        FROM messages m JOIN path ON m.workspace_id = $1 AND m.id = path.parent_id WHERE path.depth < $3
    )
    SELECT role, parts FROM path ORDER BY depth DESC
"""
_RUN = """
    SELECT r.id, r.status, r.start_seq, r.options::text AS options, m.conversation_id, m.parent_id, m.model
    FROM replies r JOIN messages m ON m.workspace_id = r.workspace_id AND m.id = r.id
    JOIN conversations c ON c.workspace_id = m.workspace_id AND c.id = m.conversation_id
    WHERE r.workspace_id = $1 AND c.owner_id = $2 AND r.id = $3
"""
_REQUEST_CANCEL = """
    UPDATE replies SET cancel_requested = true, cancelled_by = $3
    WHERE workspace_id = $1 AND id = $2 AND status = 'streaming' AND NOT cancel_requested
"""
_END_QUEUED = """
    UPDATE replies SET status = 'cancelled', cancel_requested = true, cancelled_by = $3, ended_at = now()
    WHERE workspace_id = $1 AND id = $2 AND status = 'queued' RETURNING id
"""
_NEXT = """
    SELECT r.id, r.fence FROM replies r
    WHERE r.workspace_id = $1 AND r.channel = $2 AND r.status = 'queued'
      AND NOT EXISTS (SELECT 1 FROM replies s
                      WHERE s.workspace_id = $1 AND s.channel = $2 AND s.status = 'streaming')
    ORDER BY r.id LIMIT 1
"""
_OPEN_EVENTS = """
    SELECT r.id, e.e, e.d::text AS d FROM replies r
    JOIN channel_events e ON e.workspace_id = r.workspace_id AND e.channel = r.channel AND e.seq > r.start_seq
    WHERE r.workspace_id = $1 AND r.id = ANY($2::uuid[]) AND e.e LIKE 'reply.%' ORDER BY e.seq
"""
_CANCELLED_BY = "SELECT cancelled_by FROM replies WHERE workspace_id = $1 AND id = $2"


def _decoded(row: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(row)
    for key in ("parts", "usage", "error"):
        if found[key] is not None:
            found[key] = orjson.loads(found[key])
    return found


class ConversationRepository(ScopedRepository[Conversation]):
    """Conversations of the scope's user: private by this rule, since others may come to read them."""

    model = Conversation
    not_found = ConversationNotFound

    def _visible(self) -> ColumnElement[bool]:
        return super()._visible() & (_table.c.owner_id == self._scope.user_id)  # type: ignore[no-any-return]  # as above

    async def lock(self, id: UUID) -> asyncpg.Record:
        """Return a conversation that nobody else changes until the transaction ends, or raise."""
        connection = await self._unit.driver()
        row = await connection.fetchrow(_LOCK, self._scope.workspace_id, self._scope.user_id, id)
        if row is None:
            raise ConversationNotFound
        return row

    async def change(self, id: UUID, values: dict[str, Any]) -> RowMapping:
        """Change columns; return the row, or raise."""
        connection = await self._unit.connection()
        statement = update(_table).where(self._visible(), _table.c.id == id).values(**values).returning(*_table.c)
        row = (await connection.execute(statement)).mappings().one_or_none()
        if row is None:
            raise ConversationNotFound
        return row

    async def delete(self, id: UUID) -> None:
        """Remove a conversation with its messages, or raise."""
        connection = await self._unit.connection()
        statement = delete(_table).where(self._visible(), _table.c.id == id).returning(_table.c.id)
        if (await connection.execute(statement)).one_or_none() is None:
            raise ConversationNotFound


class MessageRepository:
    """Messages of conversations that the scope's user may see."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    @property
    def _who(self) -> tuple[UUID, UUID]:
        return (self._scope.workspace_id, self._scope.user_id)

    async def page(self, conversation_id: UUID, *, before: UUID | None, limit: int) -> list[dict[str, Any]]:
        """Return the newest messages before one, newest first."""
        connection = await self._unit.driver()
        return [_decoded(row) for row in await connection.fetch(_PAGE, *self._who, conversation_id, before, limit)]

    async def find_all(self, ids: Sequence[UUID]) -> dict[UUID, dict[str, Any]]:
        """Return messages by id; those that are not there, or not visible, are left out."""
        connection = await self._unit.driver()
        return {row["id"]: _decoded(row) for row in await connection.fetch(_BY_ID, *self._who, list(ids))}

    async def find_sent(self, cid: UUID, body_hash: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return what was sent under a key and its reply; None when the key was used for something else."""
        connection = await self._unit.driver()
        row = await connection.fetchrow(_BY_CID, *self._who, cid)
        if row is None or row["body_hash"] != body_hash:
            return None
        if row["role"] == "assistant":
            # A reply that was asked for by itself: what it answers was there before.
            answered = await connection.fetchrow(_BY_ID, *self._who, [row["parent_id"]])
            return _decoded(answered), _decoded(row)
        answer = await connection.fetchrow(_ANSWER_TO, *self._who, row["id"])
        return _decoded(row), _decoded(answer)

    async def before_send(
        self, conversation_id: UUID, *, channel: str, cid: UUID, parent: UUID | None, current: UUID | None
    ) -> asyncpg.Record:
        """Return what decides a send, and the messages that lead to it; the conversation is locked."""
        connection = await self._unit.driver()
        return await connection.fetchrow(
            _BEFORE_SEND, *self._who, conversation_id, channel, cid, parent, current, HISTORY
        )

    async def add_turn(self, *values: object) -> None:
        """Store question, empty reply, run record and the conversation's new end in one statement."""
        connection = await self._unit.driver()
        await connection.execute(_ADD_TURN, self._scope.workspace_id, *values)

    async def add_reply(self, *values: object) -> None:
        """Store an empty reply, its run record and the conversation's new end in one statement."""
        connection = await self._unit.driver()
        await connection.execute(_ADD_REPLY, self._scope.workspace_id, *values)

    async def finish(self, id: UUID, *values: object) -> dict[str, Any] | None:
        """Store a reply's end; return the whole message, or None when its conversation was deleted."""
        connection = await self._unit.driver()
        row = await connection.fetchrow(_FINISH, self._scope.workspace_id, id, *values)
        return None if row is None else _decoded(row)

    async def path_to(self, id: UUID) -> list[tuple[str, list[dict[str, Any]]]]:
        """Return role and parts of the messages that lead to one, oldest first."""
        connection = await self._unit.driver()
        rows = await connection.fetch(_PATH, self._scope.workspace_id, id, HISTORY)
        return [(row["role"], orjson.loads(row["parts"])) for row in rows]

    async def find_run(self, reply_id: UUID) -> asyncpg.Record | None:
        """Return the run of a reply that the user may see."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_RUN, *self._who, reply_id)

    async def request_cancel(self, reply_id: UUID) -> None:
        """Note that a running reply is to stop."""
        connection = await self._unit.driver()
        await connection.execute(_REQUEST_CANCEL, self._scope.workspace_id, reply_id, self._scope.user_id)

    async def end_queued(self, reply_id: UUID) -> bool:
        """End a reply that has not begun; returns whether it had not."""
        connection = await self._unit.driver()
        row = await connection.fetchrow(_END_QUEUED, self._scope.workspace_id, reply_id, self._scope.user_id)
        return row is not None

    async def next_queued(self, channel: str) -> asyncpg.Record | None:
        """Return the next reply that may begin: none while one is running."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_NEXT, self._scope.workspace_id, channel)

    async def open_events(self, reply_ids: Sequence[UUID]) -> list[tuple[UUID, str, dict[str, Any]]]:
        """Return what the log has of replies that are being written, in order."""
        connection = await self._unit.driver()
        rows = await connection.fetch(_OPEN_EVENTS, self._scope.workspace_id, list(reply_ids))
        events = ((row["id"], row["e"], orjson.loads(row["d"])) for row in rows)
        # Replies that wait share the channel with the one that runs.
        return [(id_, e, d) for id_, e, d in events if d.get("reply") == str(id_)]

    async def cancelled_by(self, reply_id: UUID) -> UUID | None:
        """Return who stopped a reply."""
        connection = await self._unit.driver()
        found: UUID | None = await connection.fetchval(_CANCELLED_BY, self._scope.workspace_id, reply_id)
        return found
