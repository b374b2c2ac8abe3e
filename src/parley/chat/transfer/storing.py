"""Stores imported conversations: what is not there yet, many in one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import orjson

from parley.chat.messages import conversation_json
from parley.chat.transfer.drafts import DraftConversation, Placed, hash_of
from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import Publisher, append

_TITLE_WORDS: Final = 60

# Whoever imports the same at the same time waits here.
_KNOWN = """
    SELECT id, current_id FROM conversations WHERE workspace_id = $1 AND owner_id = $2 AND id = ANY($3::uuid[])
    ORDER BY id FOR UPDATE
"""
_KNOWN_MESSAGES = "SELECT id FROM messages WHERE workspace_id = $1 AND conversation_id = ANY($2::uuid[])"
_ADD_CONVERSATIONS = """
    INSERT INTO conversations (workspace_id, id, owner_id, title, title_by, assistant, current_id, shared, archived,
                               created_at, updated_at)
    SELECT $1, id, $2, title, title_by, 'general', NULL, false, archived, created_at, updated_at
    FROM json_to_recordset($3::json) AS new (
        id uuid, title text, title_by text, archived boolean, created_at timestamptz, updated_at timestamptz)
    ON CONFLICT (workspace_id, id) DO NOTHING
"""
_ADD_MESSAGES = """
    INSERT INTO messages (workspace_id, id, conversation_id, parent_id, role, parts, status, model, author_id,
                          created_at, completed_at)
    SELECT $1, id, conversation_id, parent_id, role, parts, status, model, $2, created_at, created_at
    FROM json_to_recordset($3::json) AS new (
        id uuid, conversation_id uuid, parent_id uuid, role text, parts json, status text, model text,
        created_at timestamptz)
"""
# An answer of another product can be asked for anew here, as one of ours.
_ADD_RUNS = """
    INSERT INTO replies (workspace_id, id, channel, user_id, question_id, status, options, fence, attempt, appended,
                         start_seq, cancel_requested, created_at, ended_at)
    SELECT $1, id, 'conversation:' || conversation_id, $2, parent_id, status, '{"model": null}', 1, 1, 0, 0, false,
           created_at, created_at
    FROM json_to_recordset($3::json) AS new (
        id uuid, conversation_id uuid, parent_id uuid, status text, created_at timestamptz)
"""
_END = """
    UPDATE conversations c SET current_id = new.current_id
    FROM unnest($2::uuid[], $3::uuid[]) AS new (id, current_id)
    WHERE c.workspace_id = $1 AND c.id = new.id RETURNING c.*
"""


@dataclass(slots=True)
class Ready:
    """A conversation that is ready to be stored. `parts` are those of its messages, their files stored."""

    number: int
    id: UUID
    draft: DraftConversation
    placed: list[Placed]
    end: UUID | None
    parts: dict[UUID, list[dict[str, Any]]] = field(default_factory=dict)

    def parts_of(self, message: Placed) -> list[dict[str, Any]]:
        """Return a message's parts as they are stored."""
        return self.parts.get(message.id, message.draft.parts)


@dataclass(slots=True)
class Stored:
    """What a transaction did, by number."""

    new: int = 0
    changed: int = 0
    unchanged: int = 0
    messages: int = 0


class ImportRepository:
    """Writes imported conversations of the scope's user."""

    def __init__(self, unit: UnitOfWork, scope: Scope, publisher: Publisher) -> None:
        self._unit = unit
        self._scope = scope
        self._publisher = publisher

    async def add_conversation(self, one: Ready) -> None:
        """Add a conversation without messages, for files to belong to. One that is there stays as it is."""
        connection = await self._unit.driver()
        await connection.execute(
            _ADD_CONVERSATIONS, self._scope.workspace_id, self._scope.user_id, _json([_conversation(one)])
        )

    async def store(self, batch: Sequence[Ready]) -> Stored:
        """Add what is not there yet. Of a conversation that is, the messages that it lacks; nothing is changed."""
        connection = await self._unit.driver()
        who = (self._scope.workspace_id, self._scope.user_id)
        known = {row["id"]: row["current_id"] for row in await connection.fetch(_KNOWN, *who, [r.id for r in batch])}
        there: dict[int, UUID] = {}
        if known:
            rows = await connection.fetch(_KNOWN_MESSAGES, self._scope.workspace_id, list(known))
            there = {hash_of(row["id"]): row["id"] for row in rows}
        done, new, messages, ends = Stored(), [], [], {}
        for one in batch:
            added = _missing(one, there)
            ends_here = known.get(one.id)
            if ends_here is None:
                # Also one that was only made for its files.
                done.new += 1
                new.append(_conversation(one))
            elif not added:
                done.unchanged += 1
                continue
            else:
                done.changed += 1
            messages += added
            done.messages += len(added)
            # Where its user has gone on, the end stays theirs.
            if one.end is not None and (ends_here is None or hash_of(ends_here) in {m.hash for m in one.placed}):
                ends[one.id] = there.get(hash_of(one.end), one.end)
            elif ends_here is not None:
                ends[one.id] = ends_here
        if new:
            await connection.execute(_ADD_CONVERSATIONS, *who, _json(new))
        if messages:
            await connection.execute(_ADD_MESSAGES, *who, _json(messages))
            await connection.execute(_ADD_RUNS, *who, _json(_answers(messages)))
        if ends:
            rows = await connection.fetch(_END, self._scope.workspace_id, list(ends), list(ends.values()))
            await self._tell([dict(row) for row in rows], new={one["id"] for one in new})
        return done

    async def _tell(self, rows: Sequence[dict[str, Any]], *, new: set[UUID]) -> None:
        """Tell the user's inbox, last in the transaction: all sends of a user meet there."""
        inbox = user_channel(self._scope.workspace_id, self._scope.user_id)
        events = [
            NewEvent(
                inbox, "conversation.created" if row["id"] in new else "conversation.updated", conversation_json(row)
            )
            for row in rows
        ]
        await append(self._unit, self._publisher, events)


def _conversation(one: Ready) -> dict[str, Any]:
    title, by = one.draft.title, "person"
    if title is None:
        said = (
            part["text"]
            for m in one.placed
            if m.draft.role == "user"
            for part in m.draft.parts
            if part["type"] == "text"
        )
        title, by = " ".join(next(said, "").split())[:_TITLE_WORDS].strip() or None, "words"
    first, last = one.placed[0].at, one.placed[-1].at
    return {
        "id": one.id,
        "title": title,
        "title_by": by,
        "archived": one.draft.archived,
        "created_at": min(one.draft.at or first, first),
        "updated_at": max(one.draft.changed_at or last, last),
    }


def _missing(one: Ready, there: Mapping[int, UUID]) -> list[dict[str, Any]]:
    added = []
    for message in one.placed:
        if message.hash in there:
            continue
        parent = message.parent_id
        added.append(
            {
                "id": message.id,
                "conversation_id": one.id,
                "parent_id": there.get(hash_of(parent), parent) if parent is not None else None,
                "role": message.draft.role,
                "parts": one.parts_of(message),
                "status": message.draft.status,
                "model": message.draft.model,
                "created_at": message.at,
            }
        )
    return added


def _answers(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers to a question among messages: those that could be asked for anew."""
    return [
        {name: one[name] for name in ("id", "conversation_id", "parent_id", "status", "created_at")}
        for one in messages
        if one["role"] == "assistant" and one["parent_id"] is not None
    ]


def _json(rows: Sequence[dict[str, Any]]) -> str:
    # asyncpg's ids are of a class of their own.
    return orjson.dumps(rows, default=str).decode()
