"""Workspaces and members through HTTP: who may, what stays, what goes, and how fast."""

import asyncio
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core.scope import Role, Scope
from parley.tenancy.roles import may_change
from tests.conftest import Account, SignUp
from tests.identity.test_issuers import socket
from tests.tenancy.team import ROLES, Team, close_code, join, make_team, status, switch

API = "/api/v1"


@pytest.fixture
async def team(app: FastAPI, sign_up: SignUp, admin: asyncpg.Connection) -> Team:
    return await make_team(app, sign_up, admin)


# -- workspaces --------------------------------------------------------------------------------------------------------


async def test_make_list_read_rename(alice: Account, bob: Account) -> None:
    made = (await alice.http.post(f"{API}/workspaces", json={"name": "  Research "})).json()["data"]
    assert (made["name"], made["role"]) == ("Research", "owner")
    listed = (await alice.http.get(f"{API}/workspaces")).json()
    assert [row["name"] for row in listed["data"]] == ["alice's workspace", "Research"]
    assert listed["meta"]["total"] == 2
    # Read from where one is; change from within only.
    assert (await alice.http.get(f"{API}/workspaces/{made['id']}")).json()["data"] == made
    assert await status(alice.http, "PATCH", f"{API}/workspaces/{made['id']}", {"name": "X"}) == 404
    there = await switch(alice, UUID(made["id"]))
    renamed = await there.http.patch(f"{API}/workspaces/{made['id']}", json={"name": "Research and more"})
    assert renamed.json()["data"]["name"] == "Research and more"
    assert (await there.http.get(f"{API}/me")).json()["data"]["workspace"]["name"] == "Research and more"
    assert await status(bob.http, "GET", f"{API}/workspaces/{made['id']}") == 404


@pytest.mark.parametrize(
    ("method", "rest", "body"),
    [
        ("PATCH", "", {"name": "X"}), ("DELETE", "", None), ("GET", "/members", None),
        ("PATCH", "/members/{user}", {"role": "viewer"}), ("DELETE", "/members/{user}", None),
        ("GET", "/invitations", None), ("POST", "/invitations", {"email": "x@example.com"}),
        ("DELETE", "/invitations/{user}", None),
    ],
)  # fmt: skip
async def test_another_workspace_of_ones_own_is_as_absent_as_a_random_one(
    alice: Account, method: str, rest: str, body: dict[str, str] | None
) -> None:
    """Only the token says which workspace is meant, not the path."""
    other = (await alice.http.post(f"{API}/workspaces", json={"name": "Other"})).json()["data"]["id"]
    told = []
    for id_ in (other, str(uuid4())):
        answer = await alice.http.request(method, f"{API}/workspaces/{id_}{rest.format(user=alice.user_id)}", json=body)
        content = answer.json()
        content["meta"] = None
        told.append((answer.status_code, content))
    assert told[0] == told[1]
    assert told[0][0] == 404


async def test_a_deleted_workspace_leaves_no_row_anywhere(team: Team, bob: Account) -> None:
    for person in team.people.values():
        await person.http.post(f"{API}/tasks", json={"title": "Goes"})
    owner = team.owner
    conversation = (await owner.http.post(f"{API}/conversations", json={})).json()["data"]["id"]
    await owner.http.post(
        f"{API}/conversations/{conversation}/messages", json={"text": "Hi"}, headers={"Accept": "text/event-stream"}
    )
    await owner.http.post(f"{API}/api-keys", json={"name": "k"})
    await owner.http.post(team.path("/invitations"), json={"email": "x@example.com"}, headers={"Idempotency-Key": "a"})
    await owner.http.post(f"{API}/realtime/tickets")
    await bob.http.post(f"{API}/tasks", json={"title": "Stays"})
    tables = [
        row[0]
        for row in await team.admin.fetch(
            "SELECT table_name FROM information_schema.columns WHERE table_schema = 'public' AND column_name = 'workspace_id'"
        )
    ]
    assert len(tables) > 12

    async def rows(workspace: UUID) -> dict[str, int]:
        counts = {
            table: await team.admin.fetchval(f"SELECT count(*) FROM {table} WHERE workspace_id = $1", workspace)
            for table in tables
        }
        return {table: count for table, count in counts.items() if count}

    before, others = await rows(team.workspace), await rows(bob.workspace_id)
    assert set(before) >= {
        "tasks",
        "conversations",
        "messages",
        "channel_events",
        "api_keys",
        "invitations",
        "sessions",
    }

    assert await status(owner.http, "DELETE", team.path()) == 204

    assert await rows(team.workspace) == {}
    assert await rows(bob.workspace_id) == others
    # Nobody is signed out for good: the next refresh leads home.
    assert await status(owner.http, "GET", f"{API}/me") == 401
    again = await owner.http.post(f"{API}/auth/refresh", json={"refresh_token": owner.refresh_token})
    assert again.status_code == 200, again.text
    assert again.json()["data"]["workspace"]["name"] == "owner's workspace"
    noted = await team.admin.fetchrow("SELECT * FROM audit_events WHERE action = 'workspace.deleted'")
    assert (noted["target"], noted["user_id"]) == (str(team.workspace), owner.user_id)


async def test_sockets_of_a_deleted_workspace_close(team: Team) -> None:
    async with socket(team.app, {"token": team.people[Role.VIEWER].access_token}) as viewer:
        assert (await viewer.receive_json(timeout=5))["t"] == "welcome"
        assert await status(team.owner.http, "DELETE", team.path()) == 204
        assert await close_code(viewer) == 4403


async def test_the_only_workspace_is_not_deleted(alice: Account) -> None:
    answer = await alice.http.delete(f"{API}/workspaces/{alice.workspace_id}")
    assert (answer.status_code, answer.json()["error"]) == (409, "last_workspace")
    assert await status(alice.http, "GET", f"{API}/me") == 200


async def test_of_two_workspaces_that_are_deleted_in_one_moment_one_stays(app: FastAPI, alice: Account) -> None:
    made = (await alice.http.post(f"{API}/workspaces", json={"name": "Second"})).json()["data"]
    both = [Scope(workspace, alice.user_id, Role.OWNER) for workspace in (alice.workspace_id, UUID(made["id"]))]
    deletions = (app.state.workspaces.delete(scope, scope.workspace_id) for scope in both)
    outcomes = await asyncio.gather(*deletions, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["LastWorkspace", "NoneType"]


# -- members -----------------------------------------------------------------------------------------------------------


def test_who_may_change_whom() -> None:
    """The whole table: actor, role before (None: new), role after (None: removed)."""
    allowed = {
        (actor, before, after)
        for actor in ROLES
        for before in (None, *ROLES)
        for after in (None, *ROLES)
        if may_change(actor, before, after)
    }
    others = (None, Role.VIEWER, Role.MEMBER, Role.ADMIN)
    anything = (None, *ROLES)
    assert allowed == {
        *((Role.ADMIN, before, after) for before in others for after in others),
        *((Role.OWNER, before, after) for before in anything for after in anything),
    }


async def test_each_role_against_each_member(team: Team) -> None:
    for actor in ROLES:
        http = team.people[actor].http
        for target in ROLES:
            if target is actor:
                continue
            id_ = team.people[target].user_id
            may_manage = actor.at_least(Role.ADMIN)
            expected = 200 if may_change(actor, target, target) else 403
            assert await status(http, "PATCH", team.path(f"/members/{id_}"), {"role": target.value}) == expected
            # To be made owner, by whoever may manage at all.
            if not may_manage or actor is Role.ADMIN:
                assert await status(http, "PATCH", team.path(f"/members/{id_}"), {"role": "owner"}) == 403
            if not may_change(actor, target, None):
                assert await status(http, "DELETE", team.path(f"/members/{id_}")) == 403
    assert sorted((await team.roles()).values()) == ["admin", "member", "owner", "viewer"]


async def test_members_are_listed_with_their_names(team: Team) -> None:
    answer = (await team.people[Role.VIEWER].http.get(team.path("/members"))).json()
    assert [(row["email"], row["role"]) for row in answer["data"]] == [
        ("owner@example.com", "owner"), ("admin@example.com", "admin"), ("member@example.com", "member"),
        ("viewer@example.com", "viewer"),
    ]  # fmt: skip
    assert answer["meta"]["total"] == 4


async def test_the_last_owner_stays(team: Team) -> None:
    owner = team.owner
    own = team.path(f"/members/{owner.user_id}")
    for method, body in (("DELETE", None), ("PATCH", {"role": "admin"})):
        answer = await owner.http.request(method, own, json=body)
        assert (answer.status_code, answer.json()["error"]) == (409, "last_owner")
    promoted = team.people[Role.ADMIN]
    assert await status(owner.http, "PATCH", team.path(f"/members/{promoted.user_id}"), {"role": "owner"}) == 200
    assert await status(owner.http, "DELETE", own) == 204
    assert (await team.roles())[promoted.user_id] == "owner"


@pytest.mark.parametrize("how", ["leave", "step down"])
async def test_two_owners_who_go_together_leave_one(
    app: FastAPI, sign_up: SignUp, admin: asyncpg.Connection, how: str
) -> None:
    for _ in range(10):
        one = await sign_up()
        made = await one.http.post(f"{API}/workspaces", json={"name": "Race"})
        workspace = UUID(made.json()["data"]["id"])
        one = await switch(one, workspace)
        two = await join(await sign_up(), workspace, Role.OWNER, admin)
        method, body = ("DELETE", None) if how == "leave" else ("PATCH", {"role": "member"})
        answers = await asyncio.gather(
            *(status(p.http, method, f"{API}/workspaces/{workspace}/members/{p.user_id}", body) for p in (one, two))
        )
        assert sorted(answers) in ([200, 409], [204, 409]), answers
        owners = await admin.fetchval(
            "SELECT count(*) FROM memberships WHERE workspace_id = $1 AND role = 'owner'", workspace
        )
        assert owners == 1


async def test_leaving_goes_home_and_the_only_workspace_is_not_left(team: Team, alice: Account) -> None:
    viewer = team.people[Role.VIEWER]
    assert await status(viewer.http, "DELETE", team.path(f"/members/{viewer.user_id}")) == 204
    again = await viewer.http.post(f"{API}/auth/refresh", json={"refresh_token": viewer.refresh_token})
    assert again.json()["data"]["workspace"]["name"] == "viewer's workspace"
    answer = await alice.http.delete(f"{API}/workspaces/{alice.workspace_id}/members/{alice.user_id}")
    assert (answer.status_code, answer.json()["error"]) == (409, "last_workspace")


async def test_a_removal_is_in_force_at_once_everywhere(team: Team) -> None:
    member = team.people[Role.ADMIN]
    key = (await member.http.post(f"{API}/api-keys", json={"name": "k"})).json()["data"]["key"]
    task = (await member.http.post(f"{API}/tasks", json={"title": "Private zebra"})).json()["data"]["id"]
    conversation = (await member.http.post(f"{API}/conversations", json={"title": "Zebra"})).json()["data"]["id"]
    async with socket(team.app, {"token": member.access_token}) as one, socket(team.app, {"api_key": key}) as two:
        for peer in (one, two):
            assert (await peer.receive_json(timeout=5))["t"] == "welcome"
        assert await status(team.owner.http, "DELETE", team.path(f"/members/{member.user_id}")) == 204
        assert [await close_code(peer) for peer in (one, two)] == [4403, 4403]
    assert await status(member.http, "GET", f"{API}/tasks") == 401
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=team.app), base_url="http://t") as http:
        assert (await http.get(f"{API}/tasks", headers={"Authorization": f"Bearer {key}"})).status_code == 401
    # What was private is nobody else's now.
    for path in (f"/tasks/{task}", f"/conversations/{conversation}"):
        assert await status(team.owner.http, "GET", API + path) == 404
    assert "ebra" not in (await team.owner.http.get(f"{API}/conversations")).text


async def test_a_new_role_is_in_force_at_once_everywhere(team: Team) -> None:
    member = team.people[Role.MEMBER]
    assert await status(member.http, "POST", f"{API}/conversations", {}) == 201
    async with socket(team.app, {"token": member.access_token}) as peer:
        assert (await peer.receive_json(timeout=5))["t"] == "welcome"
        path = team.path(f"/members/{member.user_id}")
        assert await status(team.owner.http, "PATCH", path, {"role": "viewer"}) == 200
        # To come back with the new rights.
        assert await close_code(peer) == 4000
    assert await status(member.http, "POST", f"{API}/conversations", {}) == 403
    assert await status(member.http, "GET", f"{API}/conversations") == 200
    # The same once more changes nothing, and closes nothing.
    async with socket(team.app, {"token": member.access_token}) as peer:
        assert (await peer.receive_json(timeout=5))["t"] == "welcome"
        assert await status(team.owner.http, "PATCH", path, {"role": "viewer"}) == 200
        await peer.send_json({"t": "sub", "id": 1, "ch": "tasks"})
        assert (await peer.receive_json(timeout=5))["t"] == "subbed"
