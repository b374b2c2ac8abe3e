"""The audit log: everything that touches access is in it, for admins, and nothing changes it."""

from typing import Any
from uuid import UUID

import asyncpg
import pytest
from fastapi import FastAPI

from tests.canaries import secrets_in
from tests.conftest import Account, http_client
from tests.tenancy.team import switch

API = "/api/v1"


async def actions(admin: asyncpg.Connection) -> list[tuple[str, str, str]]:
    rows = await admin.fetch("SELECT action, outcome, actor FROM audit_events ORDER BY id")
    return [tuple(row) for row in rows]


async def test_what_touches_access_is_written_down(
    app: FastAPI, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    http = alice.http
    workspace = (await http.post(f"{API}/workspaces", json={"name": "Team"})).json()["data"]["id"]
    await http.patch(f"{API}/workspaces/{alice.workspace_id}", json={"name": "Mine"})
    there = await switch(alice, UUID(workspace))
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'member')", UUID(workspace), bob.user_id
    )
    await http.patch(f"{API}/workspaces/{workspace}/members/{bob.user_id}", json={"role": "viewer"})
    await http.delete(f"{API}/workspaces/{workspace}/members/{bob.user_id}")
    invited = (await http.post(f"{API}/workspaces/{workspace}/invitations", json={"email": "x@example.com"})).json()
    await http.delete(f"{API}/workspaces/{workspace}/invitations/{invited['data']['id']}")
    key = (await http.post(f"{API}/api-keys", json={"name": "k"})).json()["data"]
    await http.delete(f"{API}/api-keys/{key['id']}")
    await http.post(f"{API}/me/export")
    new = {"password": "correct horse 2", "confirmPassword": "correct horse 2"}
    await http.post(f"{API}/auth/password/change", json={"current_password": "wrong 1", **new})
    await http.post(f"{API}/auth/password/change", json={"current_password": "correct horse 1", **new})
    await http.delete(f"{API}/workspaces/{workspace}")
    async with http_client(app) as nobody:
        await nobody.post(f"{API}/auth/signin", json={"email": alice.email, "password": "wrong 1"})
        await nobody.post(f"{API}/auth/signin", json={"email": "nobody@example.com", "password": "wrong 1"})
        await nobody.post(f"{API}/auth/password/forgot", json={"email": alice.email})
        signed = (
            await nobody.post(f"{API}/auth/signin", json={"email": bob.email, "password": "correct horse 1"})
        ).json()
        await nobody.post(f"{API}/auth/signout", json={"refresh_token": signed["data"]["refresh_token"]})
    # The session that is left is the one from before.
    again = (await http.post(f"{API}/auth/refresh", json={"refresh_token": there.refresh_token})).json()["data"]
    for _ in range(2):
        again = (await http.post(f"{API}/auth/refresh", json={"refresh_token": again["refresh_token"]})).json()["data"]
    await http.post(f"{API}/auth/refresh", json={"refresh_token": there.refresh_token})

    found = await actions(admin)
    expected = {
        ("account.created", "success", "user"), ("session.started", "success", "user"),
        ("workspace.renamed", "success", "user"), ("workspace.deleted", "success", "user"),
        ("password.reset_requested", "success", "anonymous"),
        ("session.refused", "failure", "anonymous"), ("session.ended", "success", "user"),
        ("session.reused", "failure", "user"),
    }  # fmt: skip
    assert expected <= set(found)
    assert [entry[:2] for entry in found].count(("session.refused", "failure")) == 2
    # The workspace's own went with it; so they are looked at before, below.


async def test_the_workspace_reads_its_own(app: FastAPI, alice: Account, bob: Account) -> None:
    http = alice.http
    await http.patch(
        f"{API}/workspaces/{alice.workspace_id}", json={"name": "Mine"}, headers={"X-Request-ID": "req_of_mine_1"}
    )
    key = (await http.post(f"{API}/api-keys", json={"name": "k"})).json()["data"]
    await http.delete(f"{API}/api-keys/{key['id']}")
    invited = (
        await http.post(f"{API}/workspaces/{alice.workspace_id}/invitations", json={"email": "x@example.com"})
    ).json()
    await http.delete(f"{API}/workspaces/{alice.workspace_id}/invitations/{invited['data']['id']}")
    await http.post(f"{API}/me/export")
    await bob.http.patch(f"{API}/workspaces/{bob.workspace_id}", json={"name": "Bob's own"})

    body = (await http.get(f"{API}/audit?per_page=100")).json()
    rows: list[dict[str, Any]] = body["data"]
    assert [row["action"] for row in rows] == [
        "account.export_requested", "invitation.revoked", "invitation.created", "api_key.revoked", "api_key.created",
        "workspace.renamed", "session.started", "account.created",
    ]  # fmt: skip
    assert body["meta"]["total"] == 8
    renamed = rows[5]
    assert (renamed["actor"], renamed["user_id"], renamed["target"]) == (
        "user",
        str(alice.user_id),
        str(alice.workspace_id),
    )
    assert (renamed["request_id"], renamed["address"]) == ("req_of_mine_1", "127.0.0.1")
    assert renamed["user_agent"].startswith("python-httpx")
    assert rows[4]["target"] == key["id"]
    assert secrets_in(str(rows), key["key"]) == []

    by_action = (await http.get(f"{API}/audit", params={"action": "api_key.created"})).json()["data"]
    assert [row["action"] for row in by_action] == ["api_key.created"]
    assert (await http.get(f"{API}/audit", params={"user_id": str(bob.user_id)})).json()["data"] == []
    middle = renamed["at"]
    since = (await http.get(f"{API}/audit", params={"since": middle})).json()["meta"]["total"]
    before = (await http.get(f"{API}/audit", params={"until": middle})).json()["meta"]["total"]
    assert (since, before) == (6, 2)
    for bad in ({"since": "0.5"}, {"since": "2026-01-01"}, {"until": "x"}, {"action": "a b"}, {"user_id": "x"}):
        assert (await http.get(f"{API}/audit", params=bad)).status_code == 422, bad


@pytest.mark.parametrize(("role", "status"), [("viewer", 403), ("member", 403), ("admin", 200), ("owner", 200)])
async def test_admins_read_it(alice: Account, bob: Account, admin: asyncpg.Connection, role: str, status: int) -> None:
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, $3)",
        alice.workspace_id,
        bob.user_id,
        role,
    )
    there = await switch(bob, alice.workspace_id)
    assert (await there.http.get(f"{API}/audit")).status_code == status
