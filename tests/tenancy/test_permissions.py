"""The table of permissions, and each role against each route, frame and channel."""

import itertools
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from parley import api
from parley.core.scope import PERMISSION_KEY, Role
from parley.tenancy.permissions import KEY_SCOPES, PERMISSIONS, Permission, permissions_of
from tests.conftest import SignUp
from tests.core.test_hostile_http import operations
from tests.identity.test_issuers import socket
from tests.tenancy.team import ROLES, make_team

DECISION = Path(__file__).parents[2] / "docs/decisions/0015-workspaces-and-roles.md"
# They would end what the other calls need.
ENDS = {"delete_sessions", "delete_me", "switch_workspace"}


def test_every_permission_has_a_role_and_a_later_role_has_all_of_an_earlier_one() -> None:
    assert set(PERMISSIONS) == set(Permission)
    for earlier, later in itertools.pairwise(ROLES):
        assert permissions_of(earlier) <= permissions_of(later)
    assert permissions_of(Role.OWNER) == {permission.value for permission in Permission}


def test_keys_are_given_nothing_that_touches_access() -> None:
    touching = re.compile(r"^(account|workspaces?|members|keys|provider_keys|providers|audit|budgets)")
    assert [scope for scope in KEY_SCOPES if touching.match(scope)] == []
    assert {scope for scope in Permission if not touching.match(scope)} == KEY_SCOPES


def test_the_page_says_what_the_table_says() -> None:
    rows = re.findall(r"^\| `([\w:]+)` \| (\w+) \| (yes|) ?\|$", DECISION.read_text(), re.MULTILINE)
    assert {(name, role, bool(mark)) for name, role, mark in rows} == {
        (permission.value, role.value, permission in KEY_SCOPES) for permission, role in PERMISSIONS.items()
    }
    assert len(rows) == len(PERMISSIONS)


def test_a_route_without_a_permission_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    router = APIRouter()

    @router.get("/open")
    async def get_open() -> str:
        return "open"

    monkeypatch.setattr(api, "_ROUTERS", (("/api/v1", router, True),))
    with pytest.raises(api.PermissionNotDeclared, match="/api/v1/open"):
        api.install_routes(FastAPI())


def test_every_route_names_a_permission_that_there_is(app: FastAPI) -> None:
    known = {"public", *(permission.value for permission in Permission)}
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path.startswith(("/api", "/v1"))]
    assert len(routes) > 50
    assert [route.path for route in routes if (route.openapi_extra or {}).get(PERMISSION_KEY) not in known] == []


async def test_each_role_against_each_route(app: FastAPI, sign_up: SignUp, admin: asyncpg.Connection) -> None:
    """403 `forbidden` for the permission exactly where the table says so; ids are random, so nothing is found else."""
    team = await make_team(app, sign_up, admin)
    tried = {True: 0, False: 0}
    components = app.openapi()["components"]["schemas"]
    for method, path, operation in operations(app):
        permission = operation[PERMISSION_KEY]
        if permission == "public" or operation["operationId"] in ENDS:
            continue
        body: Any = None
        if "requestBody" in operation:
            # A file's body is none of JSON; whoever may not send one is told so before it is read.
            content = operation["requestBody"]["content"].get("application/json", {})
            reference = content.get("schema", {}).get("$ref", "")
            body = next(iter(components.get(reference.rsplit("/", 1)[-1], {}).get("examples", [{}])))
        for role in ROLES:
            person = team.people[role]
            url = path.replace("/api/{user_id}", f"/api/{person.user_id}").replace("{workspace_id}", str(uuid4()))
            url = re.sub(r"\{\w+\}", lambda _: str(uuid4()), url.replace("{channel}", "tasks"))
            if operation["operationId"] == "stream_channel_events":
                url = url.replace("tasks", f"conversation:{uuid4()}")
            answer = await person.http.request(method, url, json=body)
            missing = answer.status_code == 403 and answer.json()["details"].get("permission") == permission
            assert missing == (not role.at_least(PERMISSIONS[Permission(permission)])), (
                role,
                method,
                path,
                answer.text,
            )
            tried[missing] += 1
    assert min(tried.values()) > 15


async def test_each_role_against_frames_and_channels(app: FastAPI, sign_up: SignUp, admin: asyncpg.Connection) -> None:
    team = await make_team(app, sign_up, admin)
    for role in ROLES:
        async with socket(app, {"token": team.people[role].access_token}) as peer:
            assert (await peer.receive_json(timeout=5))["t"] == "welcome"
            send = {"t": "chat.send", "id": 1, "ch": f"conversation:{uuid4()}", "cid": str(uuid4()),
                    "parts": [{"type": "text", "text": "Hi"}]}  # fmt: skip
            for frame in (send, {"t": "reply.cancel", "id": 2, "reply": str(uuid4())}):
                await peer.send_json(frame)
                answer = await peer.receive_json(timeout=5)
                assert answer["code"] == ("not_found" if role.at_least(Role.MEMBER) else "forbidden")
            await peer.send_json({"t": "sub", "id": 3, "ch": "tasks"})
            assert (await peer.receive_json(timeout=5))["t"] == "subbed"
