"""SQL of attachments."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg

from parley.core.db import UnitOfWork
from parley.core.scope import Scope

_SHOWN = "a.id, a.kind, a.media_type, a.name, a.size, a.width, a.height, a.conversation_id, a.created_at"

# Who may read a conversation may read what its messages carry. What no message has is its user's.
_VISIBLE = """
    FROM attachments a
    LEFT JOIN conversations c ON c.workspace_id = a.workspace_id AND c.id = a.conversation_id
    WHERE a.workspace_id = $1 AND a.complete AND a.kind <> 'import'
      AND (c.owner_id = $2 OR c.shared OR (a.conversation_id IS NULL AND a.user_id = $2))
"""
_FIND = f"SELECT {_SHOWN}, a.store {_VISIBLE} AND a.id = $3"
_ADD = """
    INSERT INTO attachments (workspace_id, id, user_id, kind, media_type, name, size, sha256, width, height, store,
                             complete)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, false)
"""
_ADD_OBJECT = "INSERT INTO stored_objects (workspace_id, id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
# Two uploads at once: the second one waits here and then sees the first.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('attachments:' || $1::text, 0))"
_USED = "SELECT coalesce(sum(size), 0)::bigint FROM attachments WHERE workspace_id = $1"
_COMPLETE = f"""
    UPDATE attachments a SET complete = true WHERE a.workspace_id = $1 AND a.id = $2 AND a.user_id = $3
    RETURNING {_SHOWN}
"""  # noqa: S608 - the columns stand above
_TAKE = """
    UPDATE attachments SET conversation_id = $3
    WHERE workspace_id = $1 AND id = ANY($4::uuid[]) AND complete AND kind <> 'import'
      AND (conversation_id = $3 OR (conversation_id IS NULL AND user_id = $2))
    RETURNING id, kind, media_type, name, size, width, height
"""
_DELETE_UNUSED = """
    DELETE FROM attachments WHERE workspace_id = $1 AND user_id = $2 AND id = $3 AND conversation_id IS NULL
    RETURNING id
"""
_OF_CONVERSATION = """
    SELECT a.id, a.store FROM messages m
    JOIN attachments a ON a.workspace_id = m.workspace_id AND a.conversation_id = m.conversation_id
    WHERE m.workspace_id = $1 AND m.id = $2 AND a.id = ANY($3::uuid[]) AND a.complete
"""
_OWN_UPLOAD = """
    SELECT id, store, size FROM attachments
    WHERE workspace_id = $1 AND user_id = $2 AND id = $3 AND kind = 'import' AND complete
"""


class AttachmentRepository:
    """Attachments that the scope's user may see, or is about to use."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    async def find(self, id: UUID) -> asyncpg.Record | None:
        """Return an attachment, or None."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_FIND, self._scope.workspace_id, self._scope.user_id, id)

    async def used(self) -> int:
        """Return how many bytes the workspace has, also those that are being uploaded; others wait until the end."""
        connection = await self._unit.driver()
        await connection.execute(_LOCK, str(self._scope.workspace_id))
        used: int = await connection.fetchval(_USED, self._scope.workspace_id)
        return used

    async def add(self, id: UUID, *values: object, outside: bool) -> None:
        """Add an attachment whose bytes are still to be stored. `outside`: in the store outside the database."""
        connection = await self._unit.driver()
        await connection.execute(_ADD, self._scope.workspace_id, id, self._scope.user_id, *values)
        if outside:
            await connection.execute(_ADD_OBJECT, self._scope.workspace_id, id)

    async def complete(self, id: UUID) -> asyncpg.Record | None:
        """Note that the bytes are stored; return the attachment, or None when it was removed meanwhile."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_COMPLETE, self._scope.workspace_id, id, self._scope.user_id)

    async def take(self, conversation_id: UUID, ids: Sequence[UUID]) -> dict[UUID, asyncpg.Record]:
        """Make attachments the conversation's; return those that are its now. Whoever calls may write there."""
        connection = await self._unit.driver()
        values = (self._scope.workspace_id, self._scope.user_id, conversation_id, list(ids))
        return {row["id"]: row for row in await connection.fetch(_TAKE, *values)}

    async def delete_unused(self, id: UUID) -> bool:
        """Remove an attachment of the user's that no message has; returns whether there was one."""
        connection = await self._unit.driver()
        found = await connection.fetchval(_DELETE_UNUSED, self._scope.workspace_id, self._scope.user_id, id)
        return found is not None

    async def stores(self, message_id: UUID, ids: Sequence[UUID]) -> dict[UUID, str]:
        """Return where the bytes of attachments are, of those that the message's conversation has."""
        connection = await self._unit.driver()
        rows = await connection.fetch(_OF_CONVERSATION, self._scope.workspace_id, message_id, list(ids))
        return {row["id"]: row["store"] for row in rows}

    async def find_upload(self, id: UUID) -> asyncpg.Record | None:
        """Return an upload of the user's that is to be imported."""
        connection = await self._unit.driver()
        return await connection.fetchrow(_OWN_UPLOAD, self._scope.workspace_id, self._scope.user_id, id)


def part_of(row: Any) -> dict[str, Any]:
    """Return the part of a message that carries an attachment."""
    part = {
        "type": row["kind"],
        "attachment": str(row["id"]),
        "media_type": row["media_type"],
        "name": row["name"],
        "size": row["size"],
    }
    return {**part, "width": row["width"], "height": row["height"]} if row["kind"] == "image" else part
