"""What the ledger, the budgets and the provider say, side by side."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg

from tests.chat.conftest import until
from tests.conftest import Account


async def set_budgets(owner: Account, *budgets: dict[str, Any]) -> list[dict[str, Any]]:
    """Make these the budgets of the owner's workspace."""
    answer = await owner.http.put("/api/v1/budgets", json={"budgets": list(budgets)})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def workspace_budget(limit: str, period: str = "day") -> dict[str, Any]:
    return {"subject": "workspace", "period": period, "limit": limit}


@dataclass(frozen=True)
class Books:
    """Looks at everything that has to do with money, past all rights."""

    admin: asyncpg.Connection

    async def entries(self, **where: object) -> list[asyncpg.Record]:
        """Return rows of the ledger, the first call first."""
        conditions = "".join(f" AND {name} = ${n}" for n, name in enumerate(where, 1))
        rows: list[asyncpg.Record] = await self.admin.fetch(
            f"SELECT * FROM usage_entries WHERE true{conditions} ORDER BY started_at, id",
            *where.values(),
        )
        return rows

    async def counters(self) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self.admin.fetch(
            "SELECT * FROM budget_counters ORDER BY budget_id, starts_on"
        )
        return rows

    async def reserved(self) -> Decimal:
        """Return what all counters have reserved."""
        found: Decimal = await self.admin.fetchval("SELECT coalesce(sum(reserved), 0) FROM budget_counters")
        return found

    async def reservations(self) -> int:
        found: int = await self.admin.fetchval("SELECT count(*) FROM usage_reservations")
        return found

    async def nothing_reserved(self) -> None:
        """Wait until nothing is."""

        async def empty() -> bool:
            return await self.reserved() == 0 and await self.reservations() == 0

        await until(empty, timeout_s=30)

    async def spent(self) -> Decimal:
        """Return what the ledger says was spent."""
        found: Decimal = await self.admin.fetchval("SELECT coalesce(sum(cost), 0) FROM usage_entries")
        return found

    async def balanced(self) -> None:
        """Hold counters against the ledger, and each reply's message against its rows."""
        assert {row["spent"] for row in await self.counters()} <= {await self.spent()}
        rows = await self.admin.fetch(
            """
            SELECT m.id, m.status, m.usage::text AS usage, m.cost, u.*
            FROM messages m LEFT JOIN LATERAL (
                SELECT count(*) AS calls, sum(input_tokens) AS input, sum(cached_tokens) AS cached,
                       sum(output_tokens) AS output, coalesce(sum(cost), 0) AS total
                FROM usage_entries e WHERE e.workspace_id = m.workspace_id AND e.message_id = m.id) u ON true
            WHERE m.role = 'assistant' AND m.status IN ('completed', 'failed', 'cancelled')
            """
        )
        for row in rows:
            if row["usage"] is None:
                # Cancelled before it began.
                assert (row["calls"], row["cost"]) == (0, None), dict(row)
                continue
            usage = _usage(row["usage"])
            assert (usage["input_tokens"], usage["cached_tokens"], usage["output_tokens"], row["cost"]) == (
                row["input"] or 0, row["cached"] or 0, row["output"] or 0, row["total"],
            ), dict(row)  # fmt: skip


def _usage(text: str) -> dict[str, int]:
    import orjson

    found: dict[str, int] = orjson.loads(text)
    return found


async def key_of(owner: Account, **body: Any) -> tuple[UUID, str]:
    """Make an API key; return its id and the key."""
    scopes = ["chat:read", "chat:write", "models:read"]
    answer = await owner.http.post("/api/v1/api-keys", json={"name": "a key", "scopes": scopes, **body})
    assert answer.status_code == 201, answer.text
    return UUID(answer.json()["data"]["id"]), answer.json()["data"]["key"]
