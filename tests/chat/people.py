"""Several people in one workspace."""

from dataclasses import replace
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from parley.core.scope import Role, Scope
from parley.tenancy.permissions import permissions_of
from tests.conftest import Account


async def join(admin: asyncpg.Connection, host: Account, guest: Account, role: str = "member") -> Account:
    """Make someone a member of another one's workspace, signed in there."""
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, $3)",
        host.workspace_id, guest.user_id, role,
    )  # fmt: skip
    answer = await guest.http.post("/api/v1/auth/switch", json={"workspace_id": str(host.workspace_id)})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    guest.http.headers["Authorization"] = f"Bearer {data['access_token']}"
    return replace(
        guest, workspace_id=host.workspace_id, access_token=data["access_token"], refresh_token=data["refresh_token"]
    )


def scope_of(account: Account, role: Role = Role.OWNER) -> Scope:
    """Return the scope that an account's requests have."""
    return Scope(account.workspace_id, account.user_id, role, permissions=permissions_of(role))


async def change(who: Account, conversation: UUID | str, **fields: Any) -> dict[str, Any]:
    """Change a conversation, which must be allowed."""
    answer = await who.http.patch(f"/api/v1/conversations/{conversation}", json=fields)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def inbox(admin: asyncpg.Connection, who: Account) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of someone's inbox as they are stored."""
    rows = await admin.fetch(
        "SELECT e, d::text AS d FROM channel_events WHERE channel = $1 ORDER BY seq", f"user:{who.user_id}"
    )
    return [(row["e"], orjson.loads(row["d"])) for row in rows]
