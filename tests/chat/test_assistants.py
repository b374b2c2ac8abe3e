"""Assistants: the built-in ones, a workspace's own, and what a reply is told of them."""

import hashlib
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.chat.assistants.repository import LIMIT
from parley.core.personal_data import Person
from parley.core.settings import Settings
from parley.llm.prompts import SUFFIX
from parley.main import PERSONAL_DATA
from tests.chat.conftest import Talk
from tests.chat.scripted import MODEL, Script, newcomer
from tests.conftest import Account, SignUp, running

PATH = "/api/v1/assistants"


def body(**fields: Any) -> dict[str, Any]:
    """Return a new assistant."""
    return {"name": f"a{uuid4().hex[:12]}", "title": "Helper", "instructions": "Answer in one word.", **fields}


async def make(account: Account, **fields: Any) -> dict[str, Any]:
    """Make an assistant."""
    answer = await account.http.post(PATH, json=body(**fields))
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()["data"]
    return made


async def join(account: Account, workspace: UUID, role: str, admin: asyncpg.Connection) -> Account:
    """Have someone sign in to another workspace, with a role."""
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, $3)", workspace, account.user_id, role
    )
    switched = await account.http.post("/api/v1/auth/switch", json={"workspace_id": str(workspace)})
    account.http.headers["Authorization"] = f"Bearer {switched.json()['data']['access_token']}"
    return account


def refused(answer: httpx.Response) -> tuple[int, str]:
    """Return how an answer refuses."""
    return answer.status_code, answer.json()["error"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The model."""
    return Script().install(monkeypatch)


async def test_the_list_has_those_that_come_along_and_the_workspaces_own(alice: Account, bob: Account) -> None:
    made = await make(alice, name="zoe", tools=["list_tasks"], parameters={"temperature": 0.5})
    await make(bob)
    listed = (await alice.http.get(PATH)).json()["data"]
    assert [(one["name"], one["built_in"]) for one in listed] == [("general", True), ("planner", True), ("zoe", False)]
    general, planner, own = listed
    assert own == made == (await alice.http.get(f"{PATH}/{made['id']}")).json()["data"]
    assert (general["id"], general["tools"], general["prompt"]) == (None, None, "chat/general.md.j2")
    assert planner["tools"] == ["add_task", "complete_task", "list_tasks"]
    assert (own["prompt"], own["version"], own["created_by"]) == (f"assistant:{made['id']}", 1, str(alice.user_id))
    assert own["sha256"] == hashlib.sha256(b"Answer in one word.").hexdigest()
    assert own["parameters"] == {"temperature": 0.5, "max_output_tokens": None}
    assert own["approval"] == "writes", "what changes something is asked for unless the assistant says otherwise"


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "Not-A-Name"},
        {"name": ""},
        {"name": "x" * 65},
        {"title": ""},
        {"title": "x" * 101},
        {"instructions": ""},
        {"instructions": " \n\t"},
        {"instructions": "x" * 16_001},
        {"instructions": "a\0b"},
        {"description": "x" * 1_001},
        {"tools": ["no_such_tool"]},
        {"tools": ["add_task"] * 65},
        {"approval_tools": ["no_such_tool"]},
        {"approval": "sometimes"},
        {"model": "no-such-model"},
        {"parameters": {"temperature": 3}},
        {"parameters": {"temperature": -0.1}},
        {"parameters": {"max_output_tokens": 0}},
        {"parameters": {"max_output_tokens": 1_000_000}},
        {"parameters": {"top_k": 1}},
        {"workspace_id": str(uuid4())},
        {"created_by": str(uuid4())},
        {"version": 7},
    ],
)
async def test_what_does_not_hold_is_refused(alice: Account, fields: dict[str, Any]) -> None:
    answer = await alice.http.post(PATH, json=body(**fields))
    assert answer.status_code == 422, answer.text
    assert answer.json()["details"].get("field", "model").split(".")[0] == next(iter(fields))
    made = await make(alice)
    if "version" not in fields:
        assert (await alice.http.patch(f"{PATH}/{made['id']}", json=fields)).status_code == 422
    assert (await alice.http.get(f"{PATH}/{made['id']}")).json()["data"] == made


async def test_a_tool_that_is_named_twice_is_one(alice: Account) -> None:
    made = await make(alice, tools=["list_tasks", "add_task", "list_tasks"], approval_tools=["add_task", "add_task"])
    assert (made["tools"], made["approval_tools"]) == (["list_tasks", "add_task"], ["add_task"])


async def test_names_are_taken_once(alice: Account, bob: Account) -> None:
    made, other = await make(alice, name="helper"), await make(alice, name="other")
    await make(bob, name="helper")
    for name in ("helper", "general", "planner"):
        assert refused(await alice.http.post(PATH, json=body(name=name))) == (409, "assistant_name_taken")
        answer = await alice.http.patch(f"{PATH}/{other['id']}", json={"name": name})
        assert refused(answer) == (409, "assistant_name_taken")
    again = await alice.http.patch(f"{PATH}/{made['id']}", json={"name": "helper", "title": "The same"})
    assert (again.status_code, again.json()["data"]["title"]) == (200, "The same")


async def test_one_key_makes_one_assistant(alice: Account) -> None:
    sent, headers = body(), {"Idempotency-Key": str(uuid4())}
    first, second = [await alice.http.post(PATH, json=sent, headers=headers) for _ in range(2)]
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["data"] == second.json()["data"]
    assert len([one for one in (await alice.http.get(PATH)).json()["data"] if not one["built_in"]]) == 1


async def test_a_workspace_has_so_many(alice: Account, admin: asyncpg.Connection) -> None:
    await admin.execute(
        "INSERT INTO assistants (workspace_id, id, name, title, description, instructions, approval, approval_tools,"
        " parameters, version) SELECT $1, gen_random_uuid(), 'n' || n, 't', '', 'i', 'never', '[]', '{}', 1"
        " FROM generate_series(1, $2) n",
        alice.workspace_id, LIMIT,
    )  # fmt: skip
    assert refused(await alice.http.post(PATH, json=body())) == (409, "too_many_assistants")
    assert len((await alice.http.get(PATH)).json()["data"]) == LIMIT + 2


async def test_its_maker_and_admins_change_it(
    alice: Account, sign_up: SignUp, admin: asyncpg.Connection, bob: Account
) -> None:
    carol = await join(await sign_up(), alice.workspace_id, "member", admin)
    dave = await join(await sign_up(), alice.workspace_id, "member", admin)
    erin = await join(await sign_up(), alice.workspace_id, "viewer", admin)
    made = await make(carol)
    path = f"{PATH}/{made['id']}"
    for reader in (alice, carol, dave, erin):
        assert (await reader.http.get(path)).json()["data"] == made
    for stranger in (dave, erin):
        assert refused(await stranger.http.patch(path, json={"title": "x"})) == (403, "forbidden")
        assert refused(await stranger.http.delete(path)) == (403, "forbidden")
    assert refused(await erin.http.post(PATH, json=body())) == (403, "forbidden")
    for answer in (
        await bob.http.get(path), await bob.http.patch(path, json={"title": "x"}), await bob.http.delete(path)
    ):  # fmt: skip
        assert refused(answer) == (404, "not_found")
    for changer in (carol, alice):
        changed = await changer.http.patch(path, json={"title": f"By {changer.email}"})
        assert changed.json()["data"]["title"] == f"By {changer.email}"
    assert (await alice.http.delete(path)).status_code == 204
    assert refused(await carol.http.get(path)) == (404, "not_found")
    actions = [
        row["action"] for row in await admin.fetch("SELECT action FROM audit_events WHERE target = $1", made["id"])
    ]
    assert actions == ["assistant.created", "assistant.changed", "assistant.changed", "assistant.deleted"]


async def test_a_key_that_only_chats_does_not_say_what_everyones_chat_goes_by(alice: Account) -> None:
    made = await make(alice)
    wanted = {"name": "chats", "scopes": ["chat:read", "chat:write"]}
    key = (await alice.http.post("/api/v1/api-keys", json=wanted)).json()["data"]["key"]
    alice.http.headers["Authorization"] = f"Bearer {key}"
    assert (await alice.http.get(PATH)).status_code == 200
    assert (await alice.http.post(PATH, json=body())).status_code == 403
    assert (await alice.http.patch(f"{PATH}/{made['id']}", json={"title": "x"})).status_code == 403
    assert (await alice.http.delete(f"{PATH}/{made['id']}")).status_code == 403


async def test_a_change_counts_and_an_old_one_is_refused(alice: Account) -> None:
    made = await make(alice)
    path = f"{PATH}/{made['id']}"
    one = await alice.http.patch(path, json={"title": "One", "version": 1})
    assert (one.status_code, one.json()["data"]["version"]) == (200, 2)
    late = await alice.http.patch(path, json={"title": "Late", "version": 1})
    assert refused(late) == (409, "version_conflict")
    whole = await alice.http.patch(
        path,
        json={"model": "demo", "tools": [], "approval": "always", "approval_tools": ["add_task"],
              "parameters": {"max_output_tokens": 50}, "instructions": "x"},
    )  # fmt: skip
    found = (await alice.http.get(path)).json()["data"]
    assert found == whole.json()["data"]
    assert (found["version"], found["title"], found["tools"]) == (3, "One", [])
    assert found["parameters"] == {"temperature": None, "max_output_tokens": 50}
    freed = (await alice.http.patch(path, json={"tools": None, "model": None})).json()["data"]
    assert (freed["tools"], freed["model"], freed["approval"]) == (None, None, "always")


# -- conversations -----------------------------------------------------------------------------------------------------


async def conversation(account: Account, **fields: Any) -> dict[str, Any]:
    """Make a conversation."""
    answer = await account.http.post("/api/v1/conversations", json={"model": MODEL, **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()["data"]
    return made


async def test_a_conversation_names_an_assistant_that_there_is(alice: Account, bob: Account) -> None:
    made, theirs = await make(alice, name="helper"), await make(bob)
    assert (await conversation(alice))["assistant"] == "general"
    assert (await conversation(alice, assistant="planner"))["assistant"] == "planner"
    by_name = await conversation(alice, assistant="helper")
    by_id = await conversation(alice, assistant=made["id"])
    assert by_name["assistant"] == by_id["assistant"] == made["id"]
    path = f"/api/v1/conversations/{by_id['id']}"
    for unknown in (theirs["id"], str(uuid4()), "nobody", "Not A Name", "", None, "helper2"):
        answers = [await alice.http.patch(path, json={"assistant": unknown})]
        if unknown is not None:
            answers.append(await alice.http.post("/api/v1/conversations", json={"assistant": unknown}))
        assert {answer.status_code for answer in answers} == {422}, unknown
    changed = await alice.http.patch(path, json={"assistant": "planner"})
    assert changed.json()["data"]["assistant"] == "planner"
    assert (await alice.http.patch(path, json={"title": "x"})).json()["data"]["assistant"] == "planner"


async def _talk(account: Account, **fields: Any) -> Talk:
    return Talk(account, UUID((await conversation(account, **fields))["id"]))


async def test_a_reply_goes_by_its_assistant(alice: Account, script: Script, admin: asyncpg.Connection) -> None:
    made = await make(
        alice, instructions="You are {{ name }}.", tools=["list_tasks"],
        parameters={"temperature": 0.25, "max_output_tokens": 77},
    )  # fmt: skip
    talk = await _talk(alice, assistant=made["id"])
    _, reply = await talk.send("hello")
    await talk.ended(reply)
    (request,) = script.requests
    assert script.system == "You are {{ name }}.", "as it was written: it is data and no template"
    assert [spec.name for spec in request.tools] == ["list_tasks"]
    assert (request.temperature, request.max_output_tokens) == (0.25, 77)
    path, hashed = await admin.fetchrow("SELECT prompt_path, prompt_hash FROM messages WHERE id = $1", reply)
    assert (path, hashed) == (made["prompt"], made["sha256"])

    changed = (await alice.http.patch(f"{PATH}/{made['id']}", json={"instructions": "You are new."})).json()["data"]
    assert changed["sha256"] != made["sha256"]
    for again in ("continue", "regenerate"):
        answer = await alice.http.post(f"/api/v1/replies/{reply}/{again}")
        other = UUID(answer.json()["data"]["reply"]["id"])
        await talk.ended(other)
        assert script.system == "You are new."
        hashed = await admin.fetchval("SELECT prompt_hash FROM messages WHERE id = $1", other)
        assert hashed == changed["sha256"]


async def test_a_built_in_one_has_its_file_and_its_tools(
    alice: Account, script: Script, admin: asyncpg.Connection
) -> None:
    talk = await _talk(alice, assistant="planner")
    _, reply = await talk.send("hello")
    await talk.ended(reply)
    planner = (await alice.http.get(PATH)).json()["data"][1]
    assert sorted(spec.name for spec in script.requests[0].tools) == planner["tools"]
    path, hashed = await admin.fetchrow("SELECT prompt_path, prompt_hash FROM messages WHERE id = $1", reply)
    assert (path, hashed) == (planner["prompt"], planner["sha256"])


async def test_its_model_answers_where_nothing_else_is_said(alice: Account, script: Script) -> None:
    made = await make(alice, model=MODEL)
    talk = await _talk(alice, assistant=made["id"], model=None)
    _, reply = await talk.send("hello")
    assert (await talk.ended(reply))["model"] == MODEL
    _, other = await talk.send("deltas=2", model="gpt")
    assert (await talk.ended(other))["model"] == "gpt"
    assert len(script.requests) == 1


async def test_one_that_waits_goes_by_its_assistant_too(alice: Account, script: Script) -> None:
    made = await make(alice, instructions="Mine.")
    talk = await _talk(alice, assistant=made["id"])
    _, first = await talk.send("deltas=100 rate=200", model="gpt")
    _, second = await talk.send("hello")
    assert (await talk.message(second))["status"] == "queued"
    await talk.ended(first)
    await talk.ended(second)
    assert script.system == "Mine."


async def test_without_its_assistant_a_conversation_goes_on_and_calls_nothing(alice: Account, script: Script) -> None:
    made = await make(alice, instructions="Mine.")
    talk = await _talk(alice, assistant=made["id"])
    assert (await alice.http.delete(f"{PATH}/{made['id']}")).status_code == 204
    _, reply = await talk.send("hello")
    assert (await talk.ended(reply))["status"] == "completed"
    assert script.system != "Mine."
    assert not script.requests[0].tools


# -- prompts -----------------------------------------------------------------------------------------------------------


def hashes(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every prompt file."""
    files = root.rglob(f"*{SUFFIX}")
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


async def test_the_prompts_with_their_hashes_and_what_uses_them(
    alice: Account, settings: Settings, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    listed = (await alice.http.get("/api/v1/prompts")).json()["data"]
    assert {prompt["path"]: prompt["sha256"] for prompt in listed} == hashes(settings.llm.prompts)
    for prompt in listed:
        assert prompt["assistants"] or prompt["features"], f"{prompt['path']}: say in llm/prompts.py what uses it"
    by_path = {prompt["path"]: prompt for prompt in listed}
    assert by_path["chat/general.md.j2"]["assistants"] == ["general"]
    assert by_path["chat/continue.md.j2"]["features"] == ["continue"]
    viewer = await join(await sign_up(), alice.workspace_id, "viewer", admin)
    assert (await viewer.http.get("/api/v1/prompts")).status_code == 403


# -- people who go -----------------------------------------------------------------------------------------------------


async def test_whoever_is_erased_leaves_an_assistant_without_a_maker(
    app: FastAPI, alice: Account, script: Script, admin: asyncpg.Connection
) -> None:
    made = await make(alice)
    del script
    person = Person(alice.user_id, (alice.workspace_id,))
    database = app.state.database
    (part,) = [part for part in PERSONAL_DATA if type(part).__name__ == "AssistantData"]
    records = [record async for record in part.export(database, person)]
    assert [record.entry for record in records] == [f"workspaces/{alice.workspace_id}/assistants.json"]
    assert made["id"] in records[0].json
    for _ in range(2):
        await part.erase(database, person)
    row = await admin.fetchrow("SELECT created_by, instructions FROM assistants")
    assert tuple(row) == (None, "Answer in one word.")
    assert not [record async for record in part.export(database, person)]


async def test_an_application_without_the_tools_of_one_does_not_list_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parley import main

    monkeypatch.setattr(main, "TASK_TOOLS", ())
    async with running(settings) as app:
        someone = await newcomer(app)
        assert [one["name"] for one in (await someone.http.get(PATH)).json()["data"]] == ["general"]
        answer = await someone.http.post("/api/v1/conversations", json={"assistant": "planner"})
        assert answer.status_code == 422
