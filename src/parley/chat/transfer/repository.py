"""SQL of exports: a conversation in the order in which it was written, and the branch that is shown."""

from uuid import UUID

import asyncpg

from parley.core.db import UnitOfWork
from parley.core.scope import Scope

_READABLE = """
    FROM conversations c WHERE c.workspace_id = $1 AND (c.owner_id = $2 OR c.shared) AND c.id = $3
"""
_NEXT_IDS = f"""
    SELECT m.id FROM messages m
    WHERE m.workspace_id = $1 AND m.conversation_id = (SELECT c.id {_READABLE}) AND m.id > $4 ORDER BY m.id LIMIT $5
"""  # noqa: S608 - the condition stands above
_BRANCH = f"""
    WITH RECURSIVE up AS (
        SELECT m.id, m.parent_id, 1 AS depth FROM messages m
        WHERE m.workspace_id = $1 AND m.id = (SELECT c.current_id {_READABLE})
        UNION ALL
        SELECT m.id, m.parent_id, up.depth + 1 FROM messages m
        JOIN up ON m.workspace_id = $1 AND m.id = up.parent_id
    )
    SELECT id FROM up ORDER BY depth DESC
"""  # noqa: S608 - the condition stands above
_ATTACHMENTS = f"""
    SELECT a.id, a.kind, a.media_type, a.name, a.size, a.width, a.height, a.conversation_id, a.created_at,
           encode(a.sha256, 'hex') AS sha256
    FROM attachments a
    WHERE a.workspace_id = $1 AND a.conversation_id = (SELECT c.id {_READABLE}) AND a.complete ORDER BY a.id
"""  # noqa: S608 - the condition stands above


class ExportRepository:
    """What an export reads of a conversation that the scope's user may read."""

    def __init__(self, unit: UnitOfWork, scope: Scope, conversation_id: UUID) -> None:
        self._unit = unit
        self._who = (scope.workspace_id, scope.user_id, conversation_id)

    async def next_ids(self, after: UUID, limit: int) -> list[UUID]:
        """Return the messages after one, of all branches, ascending."""
        connection = await self._unit.driver()
        return [row["id"] for row in await connection.fetch(_NEXT_IDS, *self._who, after, limit)]

    async def branch_ids(self) -> list[UUID]:
        """Return the messages of the branch that is shown, the first one first."""
        connection = await self._unit.driver()
        return [row["id"] for row in await connection.fetch(_BRANCH, *self._who)]

    async def attachments(self) -> list[asyncpg.Record]:
        """Return the conversation's attachments."""
        connection = await self._unit.driver()
        found: list[asyncpg.Record] = await connection.fetch(_ATTACHMENTS, *self._who)
        return found
