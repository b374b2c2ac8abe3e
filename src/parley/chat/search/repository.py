"""SQL of the search.

Every entry that the caller may see is looked at, found by its conversation, and none that they may not: what is the
caller's comes first and the words second. It is how row-level security has it in any case (decision 0028).
"""

from typing import Any
from uuid import UUID

import asyncpg

from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.scope import Scope

# The words are folded by the caller. The last one may go on (`:*`) where it is still being typed.
_SEARCH = """
    WITH question AS MATERIALIZED (
        SELECT (nullif(websearch_to_tsquery('simple', $3)::text, '') || CASE WHEN $4 THEN ':*' ELSE '' END)::tsquery q
    ), found AS MATERIALIZED (
        SELECT e.conversation_id, e.id,
               ts_rank(e.tsv, q.q) * CASE WHEN e.id = e.conversation_id THEN 4 ELSE 1 END AS rank
        FROM question q, conversations c
        JOIN search_entries e ON e.workspace_id = c.workspace_id AND e.conversation_id = c.id
        WHERE c.workspace_id = $1 AND (c.owner_id = $2 OR c.shared) AND e.tsv @@ q.q
    ), page AS (
        SELECT * FROM found ORDER BY rank DESC, id DESC LIMIT $5 OFFSET $6
    )
    SELECT (SELECT count(*) FROM found) AS total, p.conversation_id, c.title, m.id AS message_id, m.role,
           CASE WHEN p.id = p.conversation_id THEN c.title ELSE message_text(m.parts) END AS text,
           coalesce(m.created_at, c.created_at) AS created_at
    FROM (SELECT) nothing LEFT JOIN page p ON true
    LEFT JOIN conversations c ON c.workspace_id = $1 AND c.id = p.conversation_id
    LEFT JOIN messages m ON m.workspace_id = $1 AND m.id = p.id
    ORDER BY p.rank DESC, p.id DESC
"""


class SearchRepository:
    """What the scope's user may find."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    async def search(self, words: str, *, last_goes_on: bool, page: PageRequest) -> tuple[list[dict[str, Any]], int]:
        """Return a page of what holds the words, best first, and how much there is in all."""
        who: tuple[UUID, UUID] = (self._scope.workspace_id, self._scope.user_id)
        connection = await self._unit.driver()
        rows: list[asyncpg.Record] = await connection.fetch(
            _SEARCH, *who, words, last_goes_on, page.per_page, page.offset
        )
        return [dict(row) for row in rows if row["conversation_id"] is not None], rows[0]["total"]
