"""Export: the whole tree as JSON, the shown branch as Markdown, piece by piece."""

import base64
import json
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.chat.transfer import exporting
from parley.chat.transfer.exporting import Exporter, file_name
from parley.chat.transfer.markdown import escaped, message_text
from parley.chat.transfer.schemas import ConversationExport
from parley.core.scope import Role, Scope
from tests.chat.conftest import Talk, start_talk
from tests.chat.pictures import png
from tests.conftest import Account


async def export(account: Account, id: UUID | str, **params: Any) -> httpx.Response:
    return await account.http.get(f"/api/v1/conversations/{id}/export", params=params)


async def answered(talk: Talk, text: str = "deltas=3 rate=0", **body: Any) -> tuple[UUID, UUID]:
    question, reply = await talk.send(text, **body)
    await talk.ended(reply)
    return question, reply


async def attach(talk: Talk, data: bytes, name: str) -> dict[str, Any]:
    """Send a message with a file and wait for its answer; return the attachment."""
    made: dict[str, Any] = (
        await talk.owner.http.post("/api/v1/attachments", params={"name": name}, content=data)
    ).json()["data"]
    parts = [{"type": "text", "text": "deltas=1 rate=0"}, {"type": made["kind"], "attachment": made["id"]}]
    sent = await talk.owner.http.post(talk.path, json={"parts": parts})
    assert sent.status_code == 202, sent.text
    await talk.ended(UUID(sent.json()["data"]["reply"]["id"]))
    return made


async def test_every_branch_is_in_the_json(alice: Account, talk: Talk) -> None:
    first, _ = await answered(talk)
    await answered(talk, "deltas=2 rate=0")
    await answered(talk, "deltas=4 rate=0", parent=str(first))
    answer = await export(alice, talk.id)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert (found["format"], found["version"]) == ("parley.conversation", 1)
    assert found["messages"] == await talk.messages()
    assert len(found["messages"]) == 6
    shown = await alice.http.get(f"/api/v1/conversations/{talk.id}")
    assert found["conversation"] == shown.json()["data"]
    ConversationExport.model_validate(found)


async def test_an_empty_conversation_is_an_export_too(alice: Account, talk: Talk) -> None:
    found = (await export(alice, talk.id)).json()
    assert (found["messages"], found["attachments"]) == ([], [])
    assert (await export(alice, talk.id, format="markdown")).text.startswith("# Conversation\n")


async def test_only_the_shown_branch_is_in_the_markdown(alice: Account, talk: Talk) -> None:
    _, reply = await answered(talk)
    await answered(talk, "deltas=2 rate=0 seed=8")
    _, last = await answered(talk, "deltas=4 rate=0 seed=9", parent=str(reply))
    answer = await export(alice, talk.id, format="markdown")
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    messages = {message["id"]: message for message in await talk.messages()}
    text = answer.text
    assert "deltas=3 rate=0" in text
    assert messages[str(last)]["parts"][0]["text"] in text
    assert "seed=9" in text
    assert "seed=8" not in text
    assert text.count("\n## You ·") == 2
    assert text.count("\n## fake ·") + text.count("\n## gpt ·") == 2


async def test_more_messages_than_a_page_come_in_order(
    alice: Account, talk: Talk, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_PAGE", 3)
    for _ in range(4):
        await answered(talk, "deltas=1 rate=0")
    found = (await export(alice, talk.id)).json()
    assert [message["id"] for message in found["messages"]] == [message["id"] for message in await talk.messages()]
    assert (await export(alice, talk.id, format="markdown")).text.count("\n## ") == 8


async def test_a_running_reply_is_exported_as_far_as_it_is(alice: Account, talk: Talk) -> None:
    _, reply = await talk.send("deltas=1000 rate=50")
    await talk.when(reply, lambda message: bool(message["parts"]))
    found = (await export(alice, talk.id)).json()
    assert found["messages"][1]["status"] == "streaming"
    assert found["messages"][1]["parts"][0]["text"]
    await alice.http.post(f"/api/v1/replies/{reply}/cancel")
    await talk.ended(reply)


async def test_files_are_named_or_put_in(alice: Account, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = await attach(talk, b"remember", "my [notes].md")
    more = await attach(talk, b"more", "b.txt")
    named = (await export(alice, talk.id)).json()["attachments"]
    assert [(one["id"], one["data"]) for one in named] == [(notes["id"], None), (more["id"], None)]
    whole = (await export(alice, talk.id, inline="true")).json()["attachments"]
    assert [base64.b64decode(one["data"]) for one in whole] == [b"remember", b"more"]
    assert len(whole[0]["sha256"]) == 64
    monkeypatch.setattr(exporting, "INLINE_BYTES", 10)
    bounded = (await export(alice, talk.id, inline="true")).json()["attachments"]
    assert [one["data"] is None for one in bounded] == [False, True]
    text = (await export(alice, talk.id, format="markdown")).text
    assert f"[my \\[notes\\].md](/api/v1/attachments/{notes['id']})" in text


async def test_nobody_else_exports_it(alice: Account, bob: Account, talk: Talk) -> None:
    await answered(talk)
    for params in ({}, {"format": "markdown"}):
        assert (await export(bob, talk.id, **params)).status_code == 404
        assert (await export(alice, str(uuid4()), **params)).status_code == 404
    assert (await export(alice, talk.id, format="pdf")).status_code == 422


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Why is the sky blue?", "Why is the sky blue.json"),
        ("../../etc/passwd", "etc-passwd.json"),
        ('a"b\r\nX: y', "a-bX- y.json"),
        ("\u202etxt.exe", "txt.exe.json"),
        (None, "conversation.json"),
        ("...", "conversation.json"),
        ("x" * 200, "x" * 80 + ".json"),
    ],
)
def test_file_names_are_safe(title: str | None, name: str) -> None:
    assert file_name({"title": title}, "json") == name


async def test_the_header_is_one_line(alice: Account) -> None:
    made = await alice.http.post("/api/v1/conversations", json={"title": 'é"\t\\x; filename=evil.exe'})
    answer = await export(alice, made.json()["data"]["id"])
    id_ = made.json()["data"]["id"]
    assert answer.headers["content-disposition"].startswith(
        f"attachment; filename=\"conversation-{id_}.json\"; filename*=UTF-8''%C3%A9"
    )
    assert "evil" not in answer.headers["content-disposition"].replace("filename%3Devil.exe", "")


def message(*parts: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"role": "assistant", "model": "m", "created_at": "2026-11-21T09:00:00Z", "status": "completed",
            "parts": list(parts), **values}  # fmt: skip


def test_markdown_of_every_kind_of_part() -> None:
    image = {"type": "image", "attachment": "1", "media_type": "image/png", "name": "a](b", "size": 3}
    tool = {"type": "tool", "call": "c", "name": "add_task", "state": "done", "input": {"x": "```"}, "output": {"y": 1}}
    text = message_text(
        message({"type": "reasoning", "text": "hm"}, tool, image, {"type": "text", "text": "**so**"}, status="failed"),
        {"1": png()},
    )
    assert "<details><summary>Reasoning</summary>\n\nhm" in text
    assert "Tool add\\_task (done):\n\n````json" in text
    assert f"![a\\]\\(b](data:image/png;base64,{base64.b64encode(png()).decode()})" in text
    assert "\n\n**so**\n\n_(failed)_\n" in text


def test_a_heading_stays_a_heading() -> None:
    assert escaped("# x\n<script>*[a](b)") == "\\# x \\<script\\>\\*\\[a\\]\\(b\\)"


async def test_the_export_is_streamed(app: FastAPI, alice: Account, talk: Talk, admin: asyncpg.Connection) -> None:
    """Five thousand messages come in many pieces and as valid JSON."""
    await answered(talk, "deltas=1 rate=0")
    await admin.execute(
        """
        INSERT INTO messages (workspace_id, id, conversation_id, parent_id, role, parts, status, author_id, created_at)
        SELECT m.workspace_id, gen_random_uuid(), m.conversation_id, m.id, 'user', m.parts, 'completed', m.author_id, now()
        FROM messages m, generate_series(1, 5000) WHERE m.role = 'user'
        """
    )
    exporter: Exporter = app.state.files.exporter
    scope = Scope(alice.workspace_id, alice.user_id, Role.OWNER)
    about = await exporter.conversation(scope, talk.id)
    pieces = [piece async for piece in exporter.as_json(scope, about, inline=False)]
    assert len(json.loads(b"".join(pieces))["messages"]) == 5002
    assert len(pieces) > 50
    assert max(map(len, pieces)) < 100_000


async def test_two_conversations_do_not_mix(alice: Account, talk: Talk) -> None:
    await answered(talk)
    other = await start_talk(alice)
    await answered(other, "deltas=2 rate=0")
    found = (await export(alice, other.id)).json()
    assert {one["conversation_id"] for one in found["messages"]} == {str(other.id)}
