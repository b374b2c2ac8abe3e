"""A workspace with people in every role."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import httpx
from fastapi import FastAPI
from httpx_ws import AsyncWebSocketSession

from parley.core.scope import Role
from tests.conftest import Account, SignUp

ROLES = tuple(Role)


@dataclass
class Team:
    """`owner` made the workspace; the others were put into it and have switched there."""

    app: FastAPI
    workspace: UUID
    people: dict[Role, Account]
    admin: asyncpg.Connection

    @property
    def owner(self) -> Account:
        return self.people[Role.OWNER]

    def path(self, rest: str = "") -> str:
        return f"/api/v1/workspaces/{self.workspace}{rest}"

    async def roles(self) -> dict[UUID, str]:
        """Return who is in, past all policies."""
        rows = await self.admin.fetch("SELECT user_id, role FROM memberships WHERE workspace_id = $1", self.workspace)
        return {row["user_id"]: row["role"] for row in rows}


async def join(account: Account, workspace: UUID, role: Role, admin: asyncpg.Connection) -> Account:
    """Put someone into a workspace and switch there; return them with the tokens for it."""
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, $3)",
        workspace,
        account.user_id,
        role.value,
    )
    return await switch(account, workspace)


async def switch(account: Account, workspace: UUID) -> Account:
    """Switch someone's session to a workspace of theirs."""
    answer = await account.http.post("/api/v1/auth/switch", json={"workspace_id": str(workspace)})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    account.http.headers["Authorization"] = f"Bearer {data['access_token']}"
    return Account(account.http, account.email, account.user_id, workspace, data["access_token"], data["refresh_token"])


async def make_team(app: FastAPI, sign_up: SignUp, admin: asyncpg.Connection) -> Team:
    """Make a workspace with one person in each role; everyone has another workspace of their own."""
    owner = await sign_up("owner@example.com")
    made = await owner.http.post("/api/v1/workspaces", json={"name": "Team"})
    assert made.status_code == 201, made.text
    workspace = UUID(made.json()["data"]["id"])
    people = {Role.OWNER: await switch(owner, workspace)}
    for role in (Role.ADMIN, Role.MEMBER, Role.VIEWER):
        people[role] = await join(await sign_up(f"{role.value}@example.com"), workspace, role, admin)
    return Team(app, workspace, people, admin)


async def status(http: httpx.AsyncClient, method: str, path: str, body: Any = None) -> int:
    """Return the status of an answer."""
    return (await http.request(method, path, json=body)).status_code


async def close_code(socket: AsyncWebSocketSession) -> int:
    """Read a socket to its end and return the code."""
    from httpx_ws import WebSocketDisconnect

    try:
        while True:
            await socket.receive_json(timeout=5)
    except WebSocketDisconnect as ended:
        return ended.code
