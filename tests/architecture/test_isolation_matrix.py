"""Every operation, channel and frame with someone else's ids: absent, and nothing of theirs moves.

Run with all layers of isolation, then with the repositories' filters taken away, then without row-level security.
What is served but has no recipe here fails the build.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from parley.core.ids import new_id
from tests.architecture.worlds import (
    MARKER,
    Layers,
    Person,
    Things,
    World,
    add_person,
    fill,
    socket_of,
    world_of,
)
from tests.canaries import PROVIDER_KEY
from tests.conftest import TestDatabases
from tests.held import held

_PATIENCE_S = 10

# -- recipes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A place for an id: of what, and how someone else's is refused. None: it only says where a stretch begins."""

    of: str
    status: int | None = 404
    required: bool = False
    """The body must have it."""


CONVERSATION, MESSAGE, REPLY, TASK = Slot("conversation"), Slot("message"), Slot("reply"), Slot("task")
JOB = Slot("job")
EXPORT = Slot("export")
USER_IN_PATH = Slot("user", status=401)  # as seed 004 has it
API_KEY = Slot("api_key")
CHANNEL = Slot("channel")
SESSION, INVITATION = Slot("session"), Slot("invitation")
ASSISTANT, TOOL_CALL = Slot("assistant"), Slot("tool_call")
ATTACHMENT = Slot("attachment")
WORKSPACE, MEMBER = Slot("workspace"), Slot("user")


@dataclass(frozen=True)
class Recipe:
    """How an operation is called: with a body that holds, and with ids in these places."""

    slots: Mapping[str, Slot] = field(default_factory=dict)
    body: Callable[[], dict[str, Any]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    path: Mapping[str, str] = field(default_factory=dict)
    """What stands in the path beside ids."""
    public: bool = False
    lists: bool = False
    ends_caller: bool = False
    """It ends the caller's account or sessions, so it is called by someone who came for it."""
    of_workspace: bool = False
    """What it shows or changes is every colleague's business: only those of other workspaces are kept out."""
    refused: tuple[int, ...] = ()
    """How it may be refused to its own caller, for a reason that is not the id."""


def _task() -> dict[str, Any]:
    return {"title": "A chore", "completed": True}


def _account() -> dict[str, Any]:
    return {"email": f"{new_id()}@example.com", "password": "a walk 1842", "confirmPassword": "a walk 1842"}


def _budgets() -> dict[str, Any]:
    return {"budgets": [{"subject": "workspace", "period": "day", "limit": "5"}]}


RECIPES: dict[str, Recipe] = {
    "sign_up": Recipe(body=_account, public=True),
    "sign_in": Recipe(body=lambda: {"email": "nobody@example.com", "password": "a walk 1842"}, public=True),
    "refresh_session": Recipe(body=lambda: {"refresh_token": "parley_rt_x"}, public=True),
    "sign_out": Recipe(body=lambda: {"refresh_token": "parley_rt_x"}, public=True),
    "forgot_password": Recipe(body=lambda: {"email": "nobody@example.com"}, public=True),
    "reset_password": Recipe(
        body=lambda: {"token": "parley_ot_x", "password": "a walk 1842", "confirmPassword": "a walk 1842"}, public=True
    ),
    "verify_email": Recipe(body=lambda: {"token": "parley_ot_x"}, public=True),
    "resend_confirmation": Recipe(body=lambda: {"email": "nobody@example.com"}, public=True),
    "change_password": Recipe(
        body=lambda: {
            "current_password": "correct horse 1",
            "password": "correct horse 2",
            "confirmPassword": "correct horse 2",
        },
        ends_caller=True,
    ),
    "switch_workspace": Recipe({"workspace_id": replace(WORKSPACE, required=True)}, of_workspace=True),
    "list_sessions": Recipe(),
    "delete_sessions": Recipe(ends_caller=True),
    "delete_session": Recipe({"session_id": SESSION}, ends_caller=True),
    "list_workspaces": Recipe(),
    "create_workspace": Recipe(body=lambda: {"name": "Another"}),
    "get_workspace": Recipe({"workspace_id": WORKSPACE}, of_workspace=True),
    "update_workspace": Recipe({"workspace_id": WORKSPACE}, body=lambda: {"name": "Renamed"}, of_workspace=True),
    # Their only one, so it may not go; tests/tenancy has the rest.
    "delete_workspace": Recipe({"workspace_id": WORKSPACE}, of_workspace=True, ends_caller=True, refused=(409,)),
    "list_members": Recipe({"workspace_id": WORKSPACE}, of_workspace=True),
    "update_member": Recipe(
        {"workspace_id": WORKSPACE, "user_id": MEMBER}, body=lambda: {"role": "owner"}, of_workspace=True
    ),
    "remove_member": Recipe(
        {"workspace_id": WORKSPACE, "user_id": MEMBER}, of_workspace=True, ends_caller=True, refused=(409,)
    ),
    "list_invitations": Recipe({"workspace_id": WORKSPACE}, of_workspace=True),
    "create_invitation": Recipe(
        {"workspace_id": WORKSPACE}, body=lambda: {"email": f"{new_id()}@example.com"}, of_workspace=True
    ),
    "revoke_invitation": Recipe({"workspace_id": WORKSPACE, "invitation_id": INVITATION}, of_workspace=True),
    "accept_invitation": Recipe(body=lambda: {"token": "parley_in_x"}, refused=(422,)),
    "list_audit_events": Recipe({"user_id": Slot("user", status=None)}, of_workspace=True),
    "take_clerk_webhook": Recipe(public=True),
    "get_liveness": Recipe(public=True),
    "get_readiness": Recipe(public=True),
    "get_me": Recipe(),
    "update_me": Recipe(body=lambda: {"name": "Someone"}),
    "delete_me": Recipe(body=lambda: {"current_password": "correct horse 1"}, ends_caller=True),
    "request_export": Recipe(),
    "fetch_export": Recipe({"export_id": EXPORT}),
    "list_models": Recipe(),
    "list_providers": Recipe(of_workspace=True),
    "list_provider_keys": Recipe(of_workspace=True),
    # With a key the workspace's calls go to the real provider: nobody else's tests may be in it.
    "set_provider_key": Recipe(
        path={"provider": "openai"}, body=lambda: {"key": f"{PROVIDER_KEY}nobody"}, of_workspace=True, ends_caller=True
    ),
    "delete_provider_key": Recipe(path={"provider": "openai"}, of_workspace=True, ends_caller=True, refused=(404,)),
    "list_conversations": Recipe(lists=True),
    "create_conversation": Recipe(body=lambda: {"title": "New"}),
    "get_conversation": Recipe({"conversation_id": CONVERSATION}),
    "update_conversation": Recipe(
        {"conversation_id": CONVERSATION, "current_id": MESSAGE}, body=lambda: {"title": "Taken"}
    ),
    "delete_conversation": Recipe({"conversation_id": CONVERSATION}),
    "list_messages": Recipe(
        {
            "conversation_id": CONVERSATION,
            "cursor": Slot("message", status=None),
            "branch": Slot("message", status=None),
        }
    ),
    "edit_message": Recipe(
        {"message_id": MESSAGE}, body=lambda: {"text": "Hello"}, headers={"Accept": "text/event-stream"}
    ),
    # The body is the file itself: JSON is a text.
    "upload_attachment": Recipe(body=lambda: {"a": "file"}),
    "download_attachment": Recipe({"attachment_id": ATTACHMENT}),
    "delete_attachment": Recipe({"attachment_id": ATTACHMENT}),
    "export_conversation": Recipe({"conversation_id": CONVERSATION}),
    "import_conversations": Recipe(body=lambda: {"format": "parley.conversation"}),
    "search_conversations": Recipe(query={"q": "question"}, lists=True),
    # As a stream the answer ends with the reply, so no case runs while the rows of one before still change.
    "send_message": Recipe(
        {"conversation_id": CONVERSATION, "parent": MESSAGE},
        body=lambda: {"text": "Hello"},
        headers={"Accept": "text/event-stream"},
    ),
    "cancel_reply": Recipe({"reply_id": REPLY}),
    "continue_reply": Recipe({"reply_id": REPLY}),
    "regenerate_reply": Recipe({"reply_id": REPLY}),
    "approve_tool_call": Recipe({"call_id": TOOL_CALL}, body=lambda: {"approved": True}),
    "list_assistants": Recipe(of_workspace=True),
    "create_assistant": Recipe(
        body=lambda: {"name": f"a{new_id().hex}", "title": "Helper", "instructions": "Help."}, of_workspace=True
    ),
    "get_assistant": Recipe({"assistant_id": ASSISTANT}, of_workspace=True),
    "update_assistant": Recipe({"assistant_id": ASSISTANT}, body=lambda: {"title": "Taken"}, of_workspace=True),
    "delete_assistant": Recipe({"assistant_id": ASSISTANT}, of_workspace=True),
    "list_prompts": Recipe(),
    "list_api_keys": Recipe(lists=True),
    "create_api_key": Recipe(body=lambda: {"name": "Import"}),
    "revoke_api_key": Recipe({"key_id": API_KEY}),
    "create_realtime_ticket": Recipe(),
    "stream_channel_events": Recipe({"channel": CHANNEL}),
    "list_jobs": Recipe(lists=True),
    "read_usage": Recipe(
        {"user_id": Slot("user", status=None), "key_id": Slot("api_key", status=None)},
        query={"group_by": "user"},
        of_workspace=True,
    ),
    "list_budgets": Recipe(of_workspace=True),
    "set_budgets": Recipe(body=_budgets, of_workspace=True),
    "get_job": Recipe({"job_id": JOB}),
    "list_tasks": Recipe(lists=True),
    "create_task": Recipe(body=_task),
    "get_task": Recipe({"task_id": TASK}),
    "replace_task": Recipe({"task_id": TASK}, body=_task),
    "change_task": Recipe({"task_id": TASK}, body=_task),
    "delete_task": Recipe({"task_id": TASK}),
    "list_user_tasks": Recipe({"user_id": USER_IN_PATH}, lists=True),
    "create_user_task": Recipe({"user_id": USER_IN_PATH}, body=_task),
    "get_user_task": Recipe({"user_id": USER_IN_PATH, "task_id": TASK}),
    "replace_user_task": Recipe({"user_id": USER_IN_PATH, "task_id": TASK}, body=_task),
    "change_user_task": Recipe({"user_id": USER_IN_PATH, "task_id": TASK}, body=_task),
    "delete_user_task": Recipe({"user_id": USER_IN_PATH, "task_id": TASK}),
}


def _conversation(things: Things) -> str:
    return f"conversation:{things.conversation}"


# Kind of channel → the name under which someone's would be found, and the one that they use themselves.
CHANNELS: dict[str, tuple[Callable[[Things], str], Callable[[Things], str]]] = {
    "conversation": (_conversation, _conversation),
    "user": (lambda things: f"user:{things.user}", lambda _: "user:me"),
    "tasks": (lambda things: f"tasks:{things.user}", lambda _: "tasks"),
}

Frame = Callable[[Things, Things], dict[str, Any]]


def _send(things: Things) -> dict[str, Any]:
    return {"ch": _conversation(things), "cid": new_id(), "parts": [{"type": "text", "text": "Hello"}]}


# Kind of frame → frames of someone with these things that name someone else's.
# Whose body is a file: nothing in it is a field.
FILES = {"upload_attachment", "import_conversations"}

FRAMES: dict[str, tuple[Frame, ...]] = {
    "chat.send": (
        lambda own, other: {**_send(own), "parts": [{"type": "file", "attachment": other.attachment}]},
        lambda _, other: _send(other),
        lambda own, other: {**_send(own), "parent": other.message},
    ),
    "reply.cancel": (lambda _, other: {"reply": other.reply},),
    "reply.continue": (lambda _, other: {"reply": other.reply, "cid": new_id()},),
    "reply.regenerate": (lambda _, other: {"reply": other.reply, "cid": new_id()},),
    "tool.approve": (
        lambda _, other: {"reply": other.reply, "call": other.tool_call, "approved": True},
        lambda own, other: {"reply": own.reply, "call": other.tool_call, "approved": True},
    ),
}

# -- what there is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """An operation of the document."""

    id: str
    method: str
    path: str
    slots: Mapping[str, str]
    """The places for ids, and where each is: path, query or body."""
    has_body: bool


def _is_id(name: str, schema: Mapping[str, Any]) -> bool:
    kinds = [schema, *schema.get("anyOf", ()), *schema.get("items", {}).get("anyOf", ()), schema.get("items", {})]
    return name.endswith("_id") or name in {"id", "channel"} or any(kind.get("format") == "uuid" for kind in kinds)


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    for option in (schema, *schema.get("anyOf", ())):
        if "$ref" in option:
            found: Mapping[str, Any] = document["components"]["schemas"][option["$ref"].rpartition("/")[2]]
            return found
    return schema


def operations(app: FastAPI) -> dict[str, Operation]:
    """Return the operations of an application, by id."""
    document = app.openapi()
    found = {}
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            slots = {
                parameter["name"]: parameter["in"]
                for parameter in about.get("parameters", ())
                if _is_id(parameter["name"], parameter["schema"])
            }
            content = about.get("requestBody", {}).get("content", {}).get("application/json", {})
            body = _resolved(document, content.get("schema", {}))
            slots |= {name: "body" for name, schema in body.get("properties", {}).items() if _is_id(name, schema)}
            found[about["operationId"]] = Operation(about["operationId"], method.upper(), path, slots, bool(content))
    return found


def _value(things: Things, slot: Slot) -> str:
    return _conversation(things) if slot is CHANNEL else str(getattr(things, slot.of))


async def call(
    app: FastAPI,
    id: str,
    caller: Person,
    *,
    others: Mapping[str, str] | None = None,
    more: dict[str, Any] | None = None,
) -> httpx.Response:
    """Call an operation with the caller's own ids, but for those of `others`. `more` is added to the body."""
    operation, recipe = operations(app)[id], RECIPES[id]
    given: dict[str, dict[str, Any]] = {
        "path": dict(recipe.path),
        "query": dict(recipe.query),
        "body": dict(recipe.body()) if recipe.body else {},
    }
    for name, slot in recipe.slots.items():
        if others and name in others:
            given[operation.slots[name]][name] = others[name]
        elif operation.slots[name] == "path" or slot.required:
            given[operation.slots[name]][name] = _value(caller.things, slot)
    body = given["body"] | (more or {})
    # A stream that should have been refused has no end.
    async with asyncio.timeout(_PATIENCE_S):
        return await caller.http.request(
            operation.method,
            operation.path.format(**given["path"]),
            params=given["query"],
            # A route that takes a file reads its body itself.
            json=body if operation.has_body or recipe.body else None,
            headers=recipe.headers,
        )


def _told(answer: httpx.Response) -> tuple[int, Any, dict[str, str]]:
    """Return all that an answer tells but the request's own id."""
    body = answer.json()
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    if "meta" in body:
        body["meta"].pop("request_id")
    return answer.status_code, body, headers


def _leaks(text: str, other: Things) -> list[str]:
    """Return what of someone else's stands in a text. The workspace's own id may be the reader's too."""
    ids = set(other) - {str(other.workspace)}
    return sorted(word for word in {MARKER, *ids} if word in text)


CASES = [(id_, name) for id_, recipe in RECIPES.items() for name, slot in recipe.slots.items() if slot is not CHANNEL]
READS = [
    id_ for id_, recipe in RECIPES.items()
    if id_.startswith(("get_", "list_")) and not recipe.public and not recipe.slots
]  # fmt: skip
OWN_CALLS = [id_ for id_, recipe in RECIPES.items() if not recipe.public and CHANNEL not in recipe.slots.values()]

# -- the matrix --------------------------------------------------------------------------------------------------------


only_all_layers = pytest.mark.parametrize("world", [Layers.ALL], indirect=True, ids=lambda layers: layers.value)


@pytest.fixture(
    scope="module", params=[Layers.ALL, Layers.NO_FILTERS, Layers.NO_POLICIES], ids=lambda layers: layers.value
)
async def world(
    request: pytest.FixtureRequest, databases: TestDatabases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """The people, once for each set of layers."""
    context = world_of(databases, tmp_path_factory.mktemp("data"), request.param)
    async with held(context) as made:
        yield made


def _intruders(world: World, recipe: Recipe) -> tuple[Person, ...]:
    return (world.bob,) if recipe.of_workspace else world.intruders


def test_every_operation_has_a_recipe(world: World) -> None:
    served = {id_: set(operation.slots) for id_, operation in operations(world.app).items()}

    assert served == {id_: set(recipe.slots) for id_, recipe in RECIPES.items()}


def test_every_channel_and_frame_has_a_recipe(world: World) -> None:
    assert set(world.app.state.realtime.channels.prefixes) == set(CHANNELS)
    assert set(world.app.state.realtime.handlers) == set(FRAMES)


@pytest.mark.parametrize(("id", "slot"), CASES)
async def test_someone_elses_id_is_as_absent_as_a_random_one(world: World, id: str, slot: str) -> None:
    of = RECIPES[id].slots[slot]
    before = await world.rows()
    for intruder in _intruders(world, RECIPES[id]):
        answer = await call(world.app, id, intruder, others={slot: _value(world.alice.things, of)})
        random = await call(world.app, id, intruder, others={slot: _value(Things.random(), of)})

        assert answer.status_code == (of.status or 200), (intruder.name, answer.text)
        assert _leaks(answer.text, world.alice.things) == []
        if of.status is not None:
            assert _told(answer) == _told(random)
    assert await world.rows() == before


@only_all_layers
@pytest.mark.parametrize("id", OWN_CALLS)
async def test_with_ones_own_ids_it_works_and_touches_nothing_of_others(world: World, id: str) -> None:
    """So the refusals elsewhere are for the id and for nothing else."""
    for intruder in _intruders(world, RECIPES[id]):
        person = intruder
        if RECIPES[id].ends_caller:
            person = await add_person(world.app, f"guest-of-{intruder.name}-{new_id()}", "guest's")
        elif operations(world.app)[id].method == "DELETE":
            own = intruder.things
            spent = await fill(intruder.http, "to spend", user=own.user, workspace=own.workspace, cid=new_id())
            person = replace(intruder, things=spent)
        before = {row for row in await world.rows() if any(word in row[1] for word in _ids_of(world.alice))}
        answer = await call(world.app, id, person)

        assert answer.is_success or answer.status_code in RECIPES[id].refused, (person.name, answer.text)
        assert _leaks(answer.text, world.alice.things) == []
        assert before - await world.rows() == set()


def _ids_of(person: Person) -> set[str]:
    return set(person.things) - {str(person.things.workspace)}


@pytest.mark.parametrize("id", [id_ for id_, recipe in RECIPES.items() if recipe.lists])
async def test_lists_hold_the_callers_rows_and_no_others(world: World, id: str) -> None:
    hers = await call(world.app, id, world.alice)

    # Filters are what a list consists of: without them alice's holds the whole workspace.
    assert MARKER in hers.text
    for intruder in world.intruders:
        theirs = await call(world.app, id, intruder)
        assert theirs.status_code == 200
        things = intruder.things
        own = {
            "list_conversations": things.conversation,
            "list_api_keys": things.api_key,
            "list_jobs": things.job,
            "search_conversations": things.conversation,
        }
        assert str(own.get(id, things.task)) in theirs.text
        assert _leaks(theirs.text, world.alice.things) == []


@only_all_layers
@pytest.mark.parametrize("id", READS)
async def test_no_header_or_query_chooses_the_workspace(world: World, id: str) -> None:
    path, alice = operations(world.app)[id].path, world.alice.things
    headers = {name: str(alice.workspace) for name in ("X-Tenant-ID", "X-Workspace-ID", "X-Parley-Workspace")}
    query = {"workspace_id": str(alice.workspace), "user_id": str(alice.user), "owner_id": str(alice.user)}
    for intruder in world.intruders:
        plain = await intruder.http.get(path)
        asked = await intruder.http.get(path, headers=headers, params=query)
        assert plain.status_code == 200
        assert _told(asked) == _told(plain)


@only_all_layers
@pytest.mark.parametrize("id", [id_ for id_, recipe in RECIPES.items() if recipe.body is not None and id_ not in FILES])
async def test_no_body_chooses_what_the_server_decides(world: World, id: str) -> None:
    before, alice = await world.rows(), world.alice.things
    for name in ("workspace_id", "user_id", "owner_id", "author_id", "id", "role", "created_at"):
        answer = await call(
            world.app, id, world.bob, more={name: str(alice.workspace if "work" in name else alice.user)}
        )

        assert answer.status_code == 422, (name, answer.text)
        assert answer.json()["details"]["field"] == name
    assert await world.rows() == before


async def test_someone_elses_idempotency_key_is_free(world: World) -> None:
    for intruder in world.intruders:
        before = {row for row in await world.rows() if any(word in row[1] for word in _ids_of(world.alice))}
        answer = await intruder.http.post(
            f"/api/v1/conversations/{intruder.things.conversation}/messages",
            json={"text": "Hello"},
            headers={"Idempotency-Key": str(world.alice.cid), "Accept": "text/event-stream"},
        )

        assert "event: reply.completed" in answer.text
        assert _leaks(answer.text, world.alice.things) == []
        assert before - await world.rows() == set()


# -- channels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", CHANNELS)
async def test_someone_elses_channel_is_as_absent_as_a_random_one(world: World, prefix: str) -> None:
    name, _ = CHANNELS[prefix]
    before = await world.rows()
    for intruder in world.intruders:
        hers, nobodys = name(world.alice.things), name(Things.random())
        async with asyncio.timeout(_PATIENCE_S):
            answer = await intruder.http.get(f"/api/v1/channels/{hers}/events")
            random = await intruder.http.get(f"/api/v1/channels/{nobodys}/events")
        assert answer.status_code == 404
        assert _told(answer) == _told(random)

        async with socket_of(world.app, intruder, subs=(hers,)) as socket:
            first = await socket.until("err")
            refused = await socket.ask(t="sub", ch=hers)
            told = await socket.ask(t="sub", ch=nobodys)
            replayed = await socket.ask(t="sub", ch=hers, since={"seq": 0})
        assert refused["code"] == "not_found"
        assert {**refused, "ch": None} == {**told, "ch": None}
        assert replayed == refused
        assert (first["code"], first["ch"]) == ("not_found", hers)
    assert await world.rows() == before


@pytest.mark.parametrize("prefix", CHANNELS)
async def test_ones_own_channel_shows_nothing_of_others(world: World, prefix: str) -> None:
    _, own = CHANNELS[prefix]
    for person in (world.alice, *world.intruders):
        async with socket_of(world.app, person) as socket:
            assert (await socket.ask(t="sub", ch=own(person.things)))["t"] == "subbed"
            state = str((await socket.until("snap"))["state"])
        if person is world.alice:
            assert MARKER in state
        else:
            assert _leaks(state, world.alice.things) == []


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, frames in FRAMES.items() for n in range(len(frames))])
async def test_a_frame_with_someone_elses_id_is_refused(world: World, kind: str, number: int) -> None:
    make = FRAMES[kind][number]
    before = await world.rows()
    for intruder in world.intruders:
        async with socket_of(world.app, intruder) as socket:
            answer = await socket.ask(t=kind, **make(intruder.things, world.alice.things))
            random = await socket.ask(t=kind, **make(intruder.things, Things.random()))
        assert answer["code"] == "not_found"
        # The channel is the one that was asked for.
        assert {**answer, "ch": None} == {**random, "ch": None}
    assert await world.rows() == before


# -- the matrix itself -------------------------------------------------------------------------------------------------


async def test_without_both_layers_everything_is_open(
    databases: TestDatabases, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is taken away above is what protects: with neither, the same calls show alice's things to bob."""
    async with world_of(databases, tmp_path_factory.mktemp("data"), Layers.NONE) as world:
        alice = world.alice.things
        for id_, recipe in RECIPES.items():
            for name, slot in recipe.slots.items():
                if slot in {CONVERSATION, TASK} and id_.startswith(("get_", "list_")):
                    answer = await call(world.app, id_, world.bob, others={name: _value(alice, slot)})
                    assert _leaks(answer.text, alice) != [], (id_, answer.text)
        for id_ in ("list_conversations", "list_tasks", "list_provider_keys"):
            assert MARKER in (await call(world.app, id_, world.bob)).text
        async with socket_of(world.app, world.bob) as socket:
            assert (await socket.ask(t="sub", ch=f"conversation:{alice.conversation}"))["t"] == "subbed"
            assert MARKER in str((await socket.until("snap"))["state"])
        assert (
            await call(world.app, "delete_conversation", world.bob, others={"conversation_id": str(alice.conversation)})
        ).is_success
        assert not [row for row in await world.rows() if row[0] == "conversations" and MARKER in row[1]]
