"""Import, end to end: a file goes up, a job reads it, conversations are there, and twice is once."""

import asyncio
import base64
import copy
import io
import json
import time
import tracemalloc
import zipfile
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parley.chat.transfer.importing import Importer
from parley.chat.transfer.storing import ImportRepository
from parley.core.ids import new_id
from parley.core.scope import Role, Scope
from parley.core.settings import AttachmentSettings, Settings
from parley.jobs.registry import JobFailed, JobRun
from tests.chat.conftest import Talk, until
from tests.chat.others_exports import chatgpt, claude
from tests.chat.pictures import png
from tests.conftest import Account, SignUp, running
from tests.live import greet, live

PATH = "/api/v1/conversations/import"


def packed(*values: Any) -> bytes:
    return json.dumps(list(values)).encode()


def zipped(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", data)
    return target.getvalue()


async def upload(account: Account, data: bytes, **headers: str) -> httpx.Response:
    return await account.http.post(PATH, content=data, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def job_of(account: Account, id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    async def ended() -> bool:
        found.update((await account.http.get(f"/api/v1/jobs/{id}")).json()["data"])
        return found["status"] in {"completed", "failed"}

    await until(ended, timeout_s=120)
    return found


async def import_(account: Account, data: bytes) -> dict[str, Any]:
    """Import; return the job's result."""
    answer = await upload(account, data)
    assert answer.status_code == 202, answer.text
    job = await job_of(account, answer.json()["data"]["job"]["id"])
    assert job["status"] == "completed", job
    result: dict[str, Any] = job["result"]
    return result


async def conversations(account: Account) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await account.http.get("/api/v1/conversations", params={"per_page": 100})).json()[
        "data"
    ]
    return found


async def messages_of(account: Account, id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        await account.http.get(f"/api/v1/conversations/{id}/messages", params={"limit": 100})
    ).json()["data"]
    return found


async def export(account: Account, id: str, **params: Any) -> dict[str, Any]:
    found: dict[str, Any] = (await account.http.get(f"/api/v1/conversations/{id}/export", params=params)).json()
    return found


NOTHING = {"conversations": 0, "extended": 0, "unchanged": 0, "empty": 0, "failed": 0, "messages": 0, "problems": [],
           "more_problems": 0}  # fmt: skip


# -- the formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [lambda data: data, zipped])
async def test_chatgpts_conversations_are_there(alice: Account, pack: Any) -> None:
    assert await import_(alice, pack(packed(chatgpt()))) == {**NOTHING, "conversations": 1, "messages": 8}
    (made,) = await conversations(alice)
    assert (made["title"], made["model"], made["archived"], made["shared"]) == ("Sums and cats", None, False, False)
    assert made["created_at"] == "2024-03-01T07:59:59Z"
    assert made["updated_at"] == "2024-03-01T08:00:07Z"
    messages = await messages_of(alice, made["id"])
    by_text = {message["parts"][0]["text"]: message for message in messages}
    question = by_text["What is two and two?"]
    assert question["parent_id"] is None
    assert {by_text[text]["parent_id"] for text in ("Four.", "It is 4.")} == {question["id"]}
    last = by_text["A cat."]
    assert made["current_id"] == last["id"]
    assert (last["model"], last["status"], last["usage"], last["cost"]) == ("o3", "completed", None, None)
    assert last["created_at"] == "2024-03-01T08:00:07Z"


async def test_the_images_of_chatgpts_zip_come_along(alice: Account) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("export/conversations.json", packed(chatgpt()))
        archive.writestr("export/file-AbC-cat.png", png(640, 480))
        archive.writestr("export/file-Other-dog.png", png())
    assert (await import_(alice, target.getvalue()))["conversations"] == 1
    (made,) = await conversations(alice)
    question = next(m for m in await messages_of(alice, made["id"]) if m["parts"][0]["type"] == "image")
    image, text = question["parts"]
    assert (image["name"], image["media_type"], image["width"]) == ("file-AbC-cat.png", "image/png", 640)
    assert text == {"type": "text", "text": "What is on it?"}
    assert (await alice.http.get(f"/api/v1/attachments/{image['attachment']}")).content == png(640, 480)


async def test_an_image_that_is_none_becomes_a_note(alice: Account) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", packed(chatgpt()))
        archive.writestr("file-AbC.png", b"\x00" * 20_000_000)
    assert (await import_(alice, target.getvalue()))["conversations"] == 1
    (made,) = await conversations(alice)
    texts = [
        part["text"] for m in await messages_of(alice, made["id"]) for part in m["parts"] if part["type"] == "text"
    ]
    assert "[file-AbC.png: not taken]" in texts


async def test_claudes_conversations_are_there_with_their_files(alice: Account) -> None:
    assert await import_(alice, packed(claude())) == {**NOTHING, "conversations": 1, "messages": 3}
    (made,) = await conversations(alice)
    question = (await messages_of(alice, made["id"]))[0]
    text, file, missing = question["parts"]
    assert text == {"type": "text", "text": "Sum this up"}
    assert (file["type"], file["name"], file["media_type"], file["size"]) == ("file", "notes.txt", "text/plain", 17)
    assert missing["text"] == "[cow.png: not in the export]"
    answer = await alice.http.get(f"/api/v1/attachments/{file['attachment']}")
    assert answer.content == b"remember the milk"


async def test_both_products_in_one_file_and_a_title_from_the_first_words(alice: Account) -> None:
    result = await import_(alice, packed(chatgpt(title=None), claude(name="")))
    assert (result["conversations"], result["failed"]) == (2, 0)
    assert {made["title"] for made in await conversations(alice)} == {"What is two and two?", "Sum this up"}


async def test_what_is_imported_can_be_gone_on_with(alice: Account) -> None:
    await import_(alice, packed(chatgpt()))
    (made,) = await conversations(alice)
    talk = Talk(alice, UUID(made["id"]))
    question, reply = await talk.send("deltas=2 rate=0")
    assert (await talk.ended(reply))["status"] == "completed"
    messages = await talk.messages()
    assert messages[-2]["id"] == str(question)
    assert messages[-2]["parent_id"] == made["current_id"]


async def test_an_imported_answer_can_be_asked_for_anew(alice: Account) -> None:
    await import_(alice, packed(chatgpt()))
    (made,) = await conversations(alice)
    talk = Talk(alice, UUID(made["id"]))
    old = next(m for m in await talk.messages() if m["parts"][0]["text"] == "Four.")
    again = await alice.http.post(f"/api/v1/replies/{old['id']}/regenerate")
    assert again.status_code == 202, again.text
    reply = again.json()["data"]["reply"]
    assert reply["parent_id"] == old["parent_id"]
    assert (await talk.ended(UUID(reply["id"])))["status"] == "completed"


async def test_what_is_imported_is_found(alice: Account) -> None:
    await import_(alice, packed(claude()))
    found = await alice.http.get("/api/v1/search", params={"q": "milk"})
    assert found.status_code == 200, found.text
    assert "Buy" in found.text


# -- twice is once -------------------------------------------------------------------------------------------------


async def test_the_same_file_again_doubles_nothing(alice: Account, admin: asyncpg.Connection) -> None:
    data = packed(chatgpt(), claude(), chatgpt())
    assert await import_(alice, data) == {**NOTHING, "conversations": 2, "messages": 11, "unchanged": 1}
    before = await admin.fetch("SELECT * FROM messages ORDER BY id")
    assert await import_(alice, data) == {**NOTHING, "unchanged": 3}
    assert await admin.fetch("SELECT * FROM messages ORDER BY id") == before
    assert await admin.fetchval("SELECT count(*) FROM conversations") == 2
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 1


async def test_a_later_export_adds_what_is_new(alice: Account) -> None:
    await import_(alice, packed(chatgpt()))
    (before,) = await conversations(alice)
    later = chatgpt(current_node="a4")
    later["mapping"]["a4"] = {**copy.deepcopy(later["mapping"]["a3"]), "id": "a4", "parent": "q2"}
    later["mapping"]["a4"]["message"]["content"]["parts"] = ["A dog."]
    assert await import_(alice, packed(later)) == {**NOTHING, "extended": 1, "messages": 1}
    (after,) = await conversations(alice)
    messages = {message["id"]: message for message in await messages_of(alice, after["id"])}
    assert len(messages) == 9
    assert messages[after["current_id"]]["parts"][0]["text"] == "A dog."
    assert after["current_id"] != before["current_id"]


async def test_where_a_user_has_gone_on_the_end_stays_theirs(alice: Account) -> None:
    await import_(alice, packed(chatgpt()))
    (made,) = await conversations(alice)
    talk = Talk(alice, UUID(made["id"]))
    _, reply = await talk.send("deltas=2 rate=0")
    await talk.ended(reply)
    later = chatgpt(current_node="a4")
    later["mapping"]["a4"] = {**copy.deepcopy(later["mapping"]["a3"]), "id": "a4", "parent": "q2"}
    assert (await import_(alice, packed(later)))["extended"] == 1
    (after,) = await conversations(alice)
    assert after["current_id"] == str(reply)


async def test_two_users_have_a_copy_each(alice: Account, bob: Account, admin: asyncpg.Connection) -> None:
    for account in (alice, bob):
        assert (await import_(account, packed(chatgpt())))["conversations"] == 1
    (mine,), (theirs,) = await conversations(alice), await conversations(bob)
    assert mine["id"] != theirs["id"]
    assert (await bob.http.get(f"/api/v1/conversations/{mine['id']}")).status_code == 404


async def test_the_same_key_is_one_job(alice: Account, admin: asyncpg.Connection) -> None:
    key = str(uuid4())
    first = await upload(alice, packed(chatgpt()), idempotency_key=key)
    again = await upload(alice, packed(chatgpt()), idempotency_key=key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["data"] == again.json()["data"]
    await job_of(alice, first.json()["data"]["job"]["id"])
    assert await admin.fetchval("SELECT count(*) FROM jobs WHERE kind = 'import'") == 1
    assert await admin.fetchval("SELECT count(*) FROM attachments WHERE kind = 'import'") == 0


async def test_an_attempt_that_is_repeated_finds_what_is_there(
    app: FastAPI, alice: Account, monkeypatch: pytest.MonkeyPatch, admin: asyncpg.Connection
) -> None:
    """The first attempt dies between two batches; the second one stores the rest and nothing twice."""
    stored = 0
    real = ImportRepository.store

    async def dies(self: ImportRepository, batch: Any) -> Any:
        nonlocal stored
        stored += 1
        if stored == 2:
            raise ConnectionError("the database is away")
        return await real(self, batch)

    monkeypatch.setattr(ImportRepository, "store", dies)
    data = packed(*(chatgpt(f"67c0-{number}") for number in range(60)))
    result = await import_(alice, data)
    assert await admin.fetchval("SELECT count(*) FROM conversations") == 60
    assert await admin.fetchval("SELECT count(*) FROM messages") == 60 * 8
    assert (result["conversations"] + result["unchanged"], result["failed"]) == (60, 0)


# -- what is broken ------------------------------------------------------------------------------------------------


async def test_a_broken_conversation_is_reported_and_costs_no_other(alice: Account) -> None:
    no_id = chatgpt(id="", conversation_id="")
    hidden = chatgpt("67c0-3", mapping={}, current_node=None)
    data = packed(no_id, chatgpt(), {"a": 1}, "text", claude(uuid=None), hidden, claude())
    result = await import_(alice, data[:-1] + b', {"mapping": nonsense}]')
    problems = result.pop("problems")
    assert result == {**{k: v for k, v in NOTHING.items() if k != "problems"}, "conversations": 2, "messages": 11,
                      "empty": 1, "failed": 4}  # fmt: skip
    assert [(one["item"], one["problem"]) for one in problems] == [
        (0, "It has no id."),
        (2, "It is no conversation of a kind that is known."),
        (3, "It has no id."),
        (6, "It is not valid JSON."),
    ]


async def test_what_the_database_refuses_is_reported_alone(alice: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ImportRepository.store

    async def refuses(self: ImportRepository, batch: Any) -> Any:
        if any(one.draft.title == "Bad" for one in batch):
            raise asyncpg.CheckViolationError("no")
        return await real(self, batch)

    monkeypatch.setattr(ImportRepository, "store", refuses)
    data = packed(chatgpt("67c0-1"), chatgpt("67c0-2", title="Bad"), chatgpt("67c0-3"))
    result = await import_(alice, data)
    assert (result["conversations"], result["failed"]) == (2, 1)
    assert result["problems"] == [{"item": 1, "title": "Bad", "problem": "It could not be stored."}]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"hello", "This is no export"),
        (b"[]", "This is no export"),
        (b"PK\x03\x04nothing", "The ZIP cannot be read"),
        (zipped(b"hello"), "This is no export"),
    ],
)
async def test_what_is_no_export_fails_with_the_reason(
    alice: Account, admin: asyncpg.Connection, data: bytes, error: str
) -> None:
    answer = await upload(alice, data)
    job = await job_of(alice, answer.json()["data"]["job"]["id"])
    assert job["status"] == "failed"
    assert job["error"].startswith(error)
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 0


async def test_many_problems_are_counted_and_some_are_named(alice: Account) -> None:
    result = await import_(alice, packed(*({"a": number} for number in range(250))))
    assert (result["failed"], len(result["problems"]), result["more_problems"]) == (250, 100, 150)


async def test_uploads_are_bounded(settings: Settings) -> None:
    small = settings.model_copy(update={"attachments": AttachmentSettings(import_bytes=2000)})
    async with running(small) as app:
        from tests.conftest import http_client

        async with http_client(app) as http:
            body = {"email": "ann@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
            session = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]
            http.headers["Authorization"] = f"Bearer {session['access_token']}"
            assert (await http.post(PATH, content=b"x" * 2001)).status_code == 413
            assert (await http.post(PATH, content=b"")).status_code == 422


async def test_a_viewer_may_not(alice: Account, sign_up: SignUp, admin: asyncpg.Connection) -> None:
    carol = await sign_up("carol@example.com")
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'viewer')",
        alice.workspace_id,
        carol.user_id,
    )
    switched = await carol.http.post("/api/v1/auth/switch", json={"workspace_id": str(alice.workspace_id)})
    carol.http.headers["Authorization"] = f"Bearer {switched.json()['data']['access_token']}"
    assert (await upload(carol, packed(chatgpt()))).status_code == 403


async def test_who_has_left_the_workspace_imports_nothing(
    app: FastAPI, alice: Account, admin: asyncpg.Connection
) -> None:
    importer: Importer = app.state.files.importer
    run = JobRun(new_id(), alice.workspace_id, alice.user_id, {"upload": str(new_id())}, 1, app.state.database)
    with pytest.raises(JobFailed, match="no longer there"):
        await importer.run(run)
    await admin.execute("DELETE FROM memberships WHERE user_id = $1", alice.user_id)
    with pytest.raises(JobFailed, match="not in this workspace"):
        await importer.run(run)


async def test_a_full_workspace_takes_the_words_without_the_files(
    app: FastAPI, alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = app.state.files.attachments
    data = packed(claude())
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"workspace_bytes": len(data) + 10}))
    assert (await import_(alice, data))["conversations"] == 1
    (made,) = await conversations(alice)
    question = (await messages_of(alice, made["id"]))[0]
    assert question["parts"][1] == {"type": "text", "text": "[notes.txt: not taken]"}


# -- progress ------------------------------------------------------------------------------------------------------


async def test_the_inbox_hears_of_the_job_and_of_what_it_made(settings: Settings) -> None:
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        body = {"email": "ann@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        session = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]
        http.headers["Authorization"] = f"Bearer {session['access_token']}"
        async with await greet(server, session["access_token"], subs=[{"ch": "user:me"}]) as socket:
            await socket.of_type("live")
            await http.post(PATH, content=packed(*(chatgpt(f"67c0-{number}") for number in range(80))))
            made: set[str] = set()
            jobs: list[dict[str, Any]] = []
            while not jobs or jobs[-1]["status"] != "completed":
                frame = await socket.of_type("ev", timeout_s=60)
                if frame["e"] == "conversation.created":
                    made.add(frame["d"]["id"])
                elif frame["e"] == "job.updated":
                    jobs.append(frame["d"])
    assert len(made) == 80
    assert jobs[-1]["result"]["conversations"] == 80
    assert any(job["progress"] and job["progress"]["note"] == "conversations" for job in jobs)


# -- ours, there and back ------------------------------------------------------------------------------------------


def normal(export: dict[str, Any], *, original: bool = False) -> dict[str, Any]:
    """Return an export without what an import cannot keep: ids as places, and whose it is.

    `original`: also without what only what was written here has.
    """
    places = {message["id"]: number for number, message in enumerate(export["messages"])}
    files = {one["id"]: one["sha256"] for one in export["attachments"]}
    about = export["conversation"]
    messages = []
    for message in export["messages"]:
        kept = {name: message[name] for name in ("role", "status", "model", "created_at")}
        parts = [{**part, "attachment": files[part["attachment"]]} if "attachment" in part else part
                 for part in message["parts"]]  # fmt: skip
        messages.append({**kept, "parts": parts, "parent": places.get(message["parent_id"])})
        if not original:
            messages[-1].update({name: message[name] for name in ("usage", "cost", "error", "completed_at")})
    return {
        "title": about["title"],
        "archived": about["archived"],
        "times": (about["created_at"], about["updated_at"]),
        "current": places.get(about["current_id"]),
        "messages": messages,
        "files": sorted((one["sha256"], one["name"], one["media_type"], one["data"]) for one in export["attachments"]),
    }


async def test_what_was_written_here_comes_back_the_same(alice: Account, bob: Account, talk: Talk) -> None:
    picture = (await alice.http.post("/api/v1/attachments", params={"name": "n.md"}, content=b"remember")).json()[
        "data"
    ]
    first, reply = await talk.send("deltas=3 rate=0")
    await talk.ended(reply)
    sent = await alice.http.post(
        talk.path,
        json={
            "parts": [
                {"type": "text", "text": "deltas=4 rate=0 tool=list_tasks:{}"},
                {"type": "file", "attachment": picture["id"]},
            ]
        },
    )
    await talk.ended(UUID(sent.json()["data"]["reply"]["id"]))
    _, other = await talk.send("deltas=2 rate=0", parent=str(first))
    await talk.ended(other)
    original = await export(alice, str(talk.id), inline="true")
    assert (await import_(bob, json.dumps(original).encode()))["conversations"] == 1
    (made,) = await conversations(bob)
    copied = await export(bob, made["id"], inline="true")
    assert normal(copied, original=True) == normal(original, original=True)
    assert all(message["usage"] is None and message["cost"] is None for message in copied["messages"])
    # Into the same account it is a copy of its own, once.
    assert (await import_(alice, json.dumps(original).encode()))["conversations"] == 1
    assert await import_(alice, json.dumps(original).encode()) == {**NOTHING, "unchanged": 1}
    assert len(await conversations(alice)) == 2


_text = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
_json = st.dictionaries(
    _text, st.none() | st.integers(-(2**53), 2**53) | _text | st.lists(_text, max_size=2), max_size=3
)
_image = base64.b64encode(png()).decode()
_parts = st.lists(
    st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, _text),
        st.builds(lambda text: {"type": "reasoning", "text": text}, _text),
        st.builds(
            lambda state, given, found: {"type": "tool", "call": str(UUID(int=7)), "name": "look", "state": state,
                                         "input": given, "output": found},
            st.sampled_from(["done", "failed", "unknown"]), st.none() | _json, st.none() | _json,
        ),
        st.builds(lambda which: {"type": ("image", "file")[which], "attachment": f"f{which}"}, st.integers(0, 1)),
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def _exports(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 8))
    messages = [
        {
            "id": f"m{number}",
            "parent_id": f"m{draw(st.integers(0, number - 1))}" if number and draw(st.integers(0, 4)) else None,
            "role": draw(st.sampled_from(["user", "assistant", "system"])),
            "parts": draw(_parts),
            "status": draw(st.sampled_from(["completed", "failed", "cancelled", "streaming"])),
            "model": draw(st.none() | st.just("gpt-x")),
            "created_at": f"2025-03-01T08:00:{draw(st.integers(0, 59)):02}.{draw(st.integers(0, 999999)):06}Z",
        }
        for number in range(count)
    ]
    return {
        "format": "parley.conversation",
        "version": 1,
        "conversation": {
            "id": str(uuid4()),
            "title": draw(st.none() | _text),
            "current_id": f"m{draw(st.integers(0, count - 1))}",
            "archived": False,
            "created_at": "2025-03-01T07:00:00Z",
            "updated_at": "2025-03-02T07:00:00Z",
        },
        "messages": messages,
        "attachments": [
            {"id": "f0", "name": "a.png", "data": _image},
            {"id": "f1", "name": "b.txt", "data": base64.b64encode("é漢".encode()).decode()},
        ],
    }


async def _imported(app: FastAPI, account: Account, data: bytes) -> dict[str, Any]:
    """Import in this very task and export what came of it."""
    before = {one["id"] for one in await conversations(account)}
    importer: Importer = app.state.files.importer
    scope = Scope(account.workspace_id, account.user_id, Role.OWNER)
    run = JobRun(new_id(), scope.workspace_id, scope.user_id, {}, 1, app.state.database)
    result = await importer._import(run, scope, io.BytesIO(data))
    assert (result["conversations"], result["failed"]) == (1, 0), result
    (made,) = [one for one in await conversations(account) if one["id"] not in before]
    found = await export(account, made["id"], inline="true")
    assert (await account.http.delete(f"/api/v1/conversations/{made['id']}")).status_code == 204
    return found


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=_exports())
async def test_export_import_export_is_the_same(app: FastAPI, alice: Account, document: dict[str, Any]) -> None:
    first = await _imported(app, alice, json.dumps(document).encode())
    second = await _imported(app, alice, json.dumps(first).encode())
    assert normal(second) == normal(first)
    texts = [part["text"] for message in document["messages"] for part in message["parts"] if part["type"] == "text"]
    kept = [part["text"] for message in first["messages"] for part in message["parts"] if part["type"] == "text"]
    assert sorted(kept) == sorted(texts)


# -- large ---------------------------------------------------------------------------------------------------------


async def test_two_thousand_conversations(app: FastAPI, alice: Account, admin: asyncpg.Connection) -> None:
    """In bounded time and memory, and nobody waits long for the process meanwhile."""
    pieces = ",".join(json.dumps(chatgpt(f"67c0-{number}", title=f"Talk {number}")) for number in range(2000))
    data = zipped(f"[{pieces}]".encode())
    del pieces
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - began)
            await asyncio.sleep(0.005)

    importer: Importer = app.state.files.importer
    scope = Scope(alice.workspace_id, alice.user_id, Role.OWNER)
    run = JobRun(new_id(), scope.workspace_id, scope.user_id, {}, 1, app.state.database)
    watcher = asyncio.create_task(watch())
    tracemalloc.start()
    began = time.perf_counter()
    result = await importer._import(run, scope, io.BytesIO(data))
    took = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    watcher.cancel()
    print(
        f"2,000 conversations, 16,000 messages: {took:.1f} s, {peak / 1e6:.1f} MB, longest wait {longest * 1e3:.0f} ms"
    )
    assert (result["conversations"], result["messages"], result["failed"]) == (2000, 16_000, 0)
    assert await admin.fetchval("SELECT count(*) FROM messages") == 16_000
    assert peak < 40_000_000
    assert took < 120
    assert longest < 1.0
