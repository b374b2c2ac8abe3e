"""SQL of conversations and messages.

The paths that a message takes are SQL on asyncpg inside the unit's transaction; the rest are Core statements.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg
import orjson
from sqlalchemy import ColumnElement, Select, case, delete, exists, select, update
from sqlalchemy.engine import RowMapping

from parley.chat.errors import ConversationNotFound, NotTheOwner, ReadOnly
from parley.chat.models import Conversation, ConversationPin
from parley.core.db import UnitOfWork
from parley.core.repository import ScopedRepository
from parley.core.scope import Scope

_table = Conversation.__table__  # type: ignore[attr-defined]  # SQLModel does not type it
_pins = ConversationPin.__table__  # type: ignore[attr-defined]  # as above

# How far back a send reads: no model is given more, however long the conversation is. The second is in characters of
# the stored parts; the message that passes it is the last.
HISTORY = 400
HISTORY_CHARACTERS = 1_000_000

_COLUMNS = """
    m.id, m.conversation_id, m.role, m.parts::text AS parts, m.status, m.model, m.parent_id, m.usage::text AS usage,
    m.cost, m.error::text AS error, m.created_at, m.completed_at, m.cid, m.body_hash
"""
# Every message statement joins the conversation: whoever may not see it sees none of its messages.
_VISIBLE = """
    FROM messages m JOIN conversations c ON c.workspace_id = m.workspace_id AND c.id = m.conversation_id
    WHERE m.workspace_id = $1 AND (c.owner_id = $2 OR c.shared)
"""
_PAGE = f"""
    SELECT {_COLUMNS} {_VISIBLE} AND m.conversation_id = $3 AND ($4::uuid IS NULL OR m.id < $4)
    ORDER BY m.id DESC LIMIT $5
"""
# Up from a message to the first one, a stretch at a time: the next begins above the last one of this.
_BRANCH = f"""
    WITH RECURSIVE up AS (
        SELECT s.id, s.parent_id, 1 AS depth FROM messages s
        WHERE s.workspace_id = $1 AND s.conversation_id = $3
          AND s.id = coalesce((SELECT b.parent_id FROM messages b WHERE b.workspace_id = $1 AND b.id = $5), $4)
          AND ($5::uuid IS NULL OR EXISTS (
              SELECT 1 FROM messages b
              WHERE b.workspace_id = $1 AND b.conversation_id = $3 AND b.id = $5 AND b.parent_id IS NOT NULL))
        UNION ALL
        SELECT s.id, s.parent_id, up.depth + 1 FROM messages s
        JOIN up ON s.workspace_id = $1 AND s.id = up.parent_id WHERE up.depth < $6
    )
    SELECT {_COLUMNS} {_VISIBLE} AND m.conversation_id = $3 AND m.id IN (SELECT id FROM up)
    ORDER BY (SELECT up.depth FROM up WHERE up.id = m.id)
"""  # noqa: S608 - the columns stand above
# Down from a message, by the newest answer or version each time.
_END_OF = f"""
    WITH RECURSIVE down AS (
        SELECT m.id, 1 AS depth {_VISIBLE} AND m.conversation_id = $3 AND m.id = $4
        UNION ALL
        SELECT below.id, down.depth + 1 FROM down CROSS JOIN LATERAL (
            SELECT n.id FROM messages n WHERE n.workspace_id = $1 AND n.parent_id = down.id ORDER BY n.id DESC LIMIT 1
        ) below
    )
    SELECT id FROM down ORDER BY depth DESC LIMIT 1
"""  # noqa: S608 - the condition stands above
_BY_ID = f"SELECT {_COLUMNS} {_VISIBLE} AND m.id = ANY($3::uuid[])"
_OPENING = f"""
    SELECT (SELECT f.parts::text FROM messages f
            WHERE f.workspace_id = $1 AND f.conversation_id = $3 AND f.role = 'user' ORDER BY f.id LIMIT 1) AS first,
           q.parts::text AS question, a.parts::text AS answer
    FROM messages a JOIN messages q ON q.workspace_id = $1 AND q.id = a.parent_id
    WHERE a.workspace_id = $1 AND a.conversation_id = $3 AND a.id = (SELECT m.id {_VISIBLE} AND m.id = $4)
"""  # noqa: S608 - the condition stands above
_FIRST = f"SELECT m.parts::text {_VISIBLE} AND m.conversation_id = $3 AND m.role = 'user' ORDER BY m.id LIMIT 1"
_BY_CID = f"SELECT {_COLUMNS} {_VISIBLE} AND m.author_id = $2 AND m.cid = $3"
_ANSWER_TO = f"SELECT {_COLUMNS} {_VISIBLE} AND m.parent_id = $3 AND m.role = 'assistant' ORDER BY m.id LIMIT 1"

_LOCK = """
    SELECT id, title, model, owner_id, current_id, shared, shared_access, archived, pinned, created_at, updated_at,
           assistant, title_by,
           -- A name has no dash, an id of one of the workspace's own assistants has some.
           CASE WHEN assistant LIKE '%-%' THEN (
               SELECT row_to_json(a)::text FROM assistants a
               WHERE a.workspace_id = conversations.workspace_id AND a.id = conversations.assistant::uuid
           ) END AS own_assistant
    FROM conversations WHERE workspace_id = $1 AND (owner_id = $2 OR shared) AND id = $3 FOR UPDATE
"""
_NAME = """
    UPDATE conversations SET title = coalesce($3, title), title_by = CASE WHEN $3 IS NULL THEN 'words' ELSE 'model' END
    WHERE workspace_id = $1 AND id = $2 AND title_by IS NULL AND title IS NOT DISTINCT FROM $4
    RETURNING *
"""
_HOLD = "SELECT id FROM conversations WHERE workspace_id = $1 AND id = $2 FOR UPDATE"
_PIN = """
    INSERT INTO conversation_pins (workspace_id, user_id, conversation_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
"""
_UNPIN = "DELETE FROM conversation_pins WHERE workspace_id = $1 AND user_id = $2 AND conversation_id = $3"
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
        EXISTS (SELECT FROM budgets b WHERE b.workspace_id = $1) AS budgeted,
        (WITH RECURSIVE path AS (
            SELECT m.id, m.parent_id, m.role, m.parts, 1 AS depth, length(m.parts::text)::bigint AS size
            FROM messages m WHERE m.workspace_id = $1 AND m.id = coalesce($6, $7::uuid)
            UNION ALL
            SELECT m.id, m.parent_id, m.role, m.parts, path.depth + 1, path.size + length(m.parts::text)
            FROM messages m JOIN path ON m.workspace_id = $1 AND m.id = path.parent_id
            WHERE path.depth < $8 AND path.size < $9
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
    FROM conversations c
    WHERE m.workspace_id = $1 AND m.id = $2 AND c.workspace_id = m.workspace_id AND c.id = m.conversation_id
    RETURNING {_COLUMNS}, c.title_by
"""  # noqa: S608 - the columns stand above
_PATH = """
    WITH RECURSIVE path AS (
        SELECT m.id, m.parent_id, m.role, m.parts::text AS parts, 1 AS depth, length(m.parts::text)::bigint AS size
        FROM messages m WHERE m.workspace_id = $1 AND m.id = $2
        UNION ALL
        SELECT m.id, m.parent_id, m.role, m.parts::text, path.depth + 1, path.size + length(m.parts::text)
        FROM messages m JOIN path ON m.workspace_id = $1 AND m.id = path.parent_id
        WHERE path.depth < $3 AND path.size < $4
    )
    SELECT role, parts FROM path ORDER BY depth DESC
"""
_RUN = """
    SELECT r.id, r.status, r.start_seq, r.options::text AS options, m.conversation_id, m.parent_id, m.model,
           c.owner_id = $2 OR coalesce(c.shared_access = 'write', false) AS writable
    FROM replies r JOIN messages m ON m.workspace_id = r.workspace_id AND m.id = r.id
    JOIN conversations c ON c.workspace_id = m.workspace_id AND c.id = m.conversation_id
    WHERE r.workspace_id = $1 AND (c.owner_id = $2 OR c.shared) AND r.id = $3
"""
_RUN_STATUS = "SELECT status FROM replies WHERE workspace_id = $1 AND id = $2"
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
    """Conversations of the scope's user and those that others share: private by this rule, whatever one's role."""

    model = Conversation
    not_found = ConversationNotFound

    def _visible(self) -> ColumnElement[bool]:
        mine_or_shared = (_table.c.owner_id == self._scope.user_id) | _table.c.shared
        return super()._visible() & mine_or_shared  # type: ignore[no-any-return]  # as above

    @property
    def mine(self) -> ColumnElement[bool]:
        """Whether a conversation is the user's own."""
        return _table.c.owner_id == self._scope.user_id  # type: ignore[no-any-return]  # as above

    @property
    def pinned(self) -> ColumnElement[bool]:
        """Whether the user has pinned it: the owner in the conversation itself, everybody else beside it."""
        beside = exists().where(
            _pins.c.workspace_id == self._scope.workspace_id,
            _pins.c.user_id == self._scope.user_id,
            _pins.c.conversation_id == _table.c.id,
        )
        return case((self.mine, _table.c.pinned), else_=beside)

    def _select(self) -> Select[tuple[object, ...]]:
        columns = (column for column in _table.c if column is not _table.c.pinned)
        return select(*columns, self.pinned.label("pinned")).where(self._visible())

    async def lock(self, id: UUID, *, owner: bool = False) -> asyncpg.Record:
        """Return a conversation that nobody else changes until the transaction ends.

        Raises `ConversationNotFound`; `ReadOnly` where the user may read and not write, and `NotTheOwner` with `owner`.
        """
        connection = await self._unit.driver()
        row = await connection.fetchrow(_LOCK, self._scope.workspace_id, self._scope.user_id, id)
        if row is None:
            raise ConversationNotFound
        self._check(row, owner=owner)
        return row

    def _check(self, row: Mapping[str, Any], *, owner: bool) -> None:
        if row["owner_id"] != self._scope.user_id:
            if owner:
                raise NotTheOwner
            if row["shared_access"] != "write":
                raise ReadOnly

    async def hold(self, id: UUID) -> None:
        """Do the same for what follows from somebody's right of before. Raises `ConversationNotFound`."""
        connection = await self._unit.driver()
        if await connection.fetchrow(_HOLD, self._scope.workspace_id, id) is None:
            raise ConversationNotFound

    async def change(self, id: UUID, values: dict[str, Any]) -> RowMapping:
        """Change columns of a conversation whose lock is held; return the row, or raise."""
        connection = await self._unit.connection()
        statement = update(_table).where(self._visible(), _table.c.id == id).values(**values).returning(*_table.c)
        row = (await connection.execute(statement)).mappings().one_or_none()
        if row is None:
            raise ConversationNotFound
        return row

    async def pin(self, id: UUID, *, pinned: bool) -> None:
        """Keep a conversation of somebody else's at the top of the user's lists, or no longer."""
        connection = await self._unit.driver()
        await connection.execute(_PIN if pinned else _UNPIN, self._scope.workspace_id, self._scope.user_id, id)

    async def name(self, id: UUID, title: str | None, *, before: str | None) -> dict[str, Any] | None:
        """Give a conversation the title that a model found, or leave it the one of `before` for good.

        Returns the row; None, and nothing has happened, where someone was faster.
        """
        connection = await self._unit.driver()
        row = await connection.fetchrow(_NAME, self._scope.workspace_id, id, title, before)
        return None if row is None else dict(row)

    async def delete(self, id: UUID) -> None:
        """Remove a conversation, whose owner's lock is held, with its messages, or raise."""
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

    async def branch(
        self, conversation_id: UUID, *, end: UUID, before: UUID | None, limit: int
    ) -> list[dict[str, Any]]:
        """Return the messages that lead to one, itself included, newest first; or those above one of them."""
        connection = await self._unit.driver()
        rows = await connection.fetch(_BRANCH, *self._who, conversation_id, end, before, limit)
        return [_decoded(row) for row in rows]

    async def end_of(self, conversation_id: UUID, id: UUID) -> UUID | None:
        """Return the newest end below a message, itself if nothing follows it; None where there is no such message."""
        connection = await self._unit.driver()
        found: UUID | None = await connection.fetchval(_END_OF, *self._who, conversation_id, id)
        return found

    async def first_text(self, conversation_id: UUID) -> str:
        """Return the text of a conversation's first message; empty before there is one."""
        connection = await self._unit.driver()
        parts = orjson.loads(await connection.fetchval(_FIRST, *self._who, conversation_id) or "[]")
        return " ".join(part["text"] for part in parts if part["type"] == "text")

    async def find_all(self, ids: Sequence[UUID]) -> dict[UUID, dict[str, Any]]:
        """Return messages by id; those that are not there, or not visible, are left out."""
        connection = await self._unit.driver()
        return {row["id"]: _decoded(row) for row in await connection.fetch(_BY_ID, *self._who, list(ids))}

    async def opening(self, conversation_id: UUID, reply_id: UUID) -> list[list[dict[str, Any]]] | None:
        """Return the parts of a conversation's first message, of a reply's question and of the reply."""
        connection = await self._unit.driver()
        row = await connection.fetchrow(_OPENING, *self._who, conversation_id, reply_id)
        return None if row is None else [orjson.loads(row[name]) for name in ("first", "question", "answer")]

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
            _BEFORE_SEND, *self._who, conversation_id, channel, cid, parent, current, HISTORY, HISTORY_CHARACTERS
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
        rows = await connection.fetch(_PATH, self._scope.workspace_id, id, HISTORY, HISTORY_CHARACTERS)
        return [(row["role"], orjson.loads(row["parts"])) for row in rows]

    async def find_run(self, reply_id: UUID) -> asyncpg.Record | None:
        """Return the run of a reply that the user may see; `writable` says whether they may do more than that."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_RUN, *self._who, reply_id)

    async def run_status(self, reply_id: UUID) -> str | None:
        """Return how a reply of the workspace stands, whoever may see it by now."""
        connection = await self._unit.driver()
        found: str | None = await connection.fetchval(_RUN_STATUS, self._scope.workspace_id, reply_id)
        return found

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
