"""Titles that a model finds: once, within the budgets, and never in place of a person's."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_provider import FakeProvider
from parley.chat.messages import TITLE_LENGTH, first_words
from parley.chat.titles import TITLE, tidy
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, Settings
from parley.jobs.registry import JobRun
from tests.chat.conftest import REGISTRY, Talk, start_talk, until
from tests.chat.people import change, inbox
from tests.conftest import Account, SignUp, make_settings

# The model says the same as a reply and as a title; the first words of the question are others.
QUESTION = "Please deltas=2 rate=0 say=Blue_skies over there"


@pytest.fixture
def registry_file(tmp_path: Path, provider: FakeProvider) -> Path:
    """The registry, with an alias for titles."""
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url) + "  fast: [claude]\n")
    return path


async def jobs(admin: asyncpg.Connection) -> list[str]:
    return [row["status"] for row in await admin.fetch("SELECT status FROM jobs WHERE kind = $1", TITLE)]


async def done(admin: asyncpg.Connection) -> None:
    """Wait until no title is being looked for."""

    async def settled() -> bool:
        return not set(await jobs(admin)) & {"queued", "running"}

    await until(settled, timeout_s=30)


async def title_of(talk: Talk) -> str | None:
    answer = await talk.owner.http.get(f"/api/v1/conversations/{talk.id}")
    found: str | None = answer.json()["data"]["title"]
    return found


async def test_a_title_that_is_given_back_is_the_first_words_again(talk: Talk, alice: Account) -> None:
    path = f"/api/v1/conversations/{talk.id}"
    for text in ("the very first words", "second thing"):
        _, reply = await talk.send(text)
        await talk.ended(reply)
    assert (await alice.http.patch(path, json={"title": "Mine"})).json()["data"]["title"] == "Mine"
    assert (await alice.http.patch(path, json={"title": None})).json()["data"]["title"] == "the very first words"


async def ask(talk: Talk, text: str = QUESTION) -> None:
    _, reply = await talk.send(text)
    await talk.ended(reply)


async def test_the_first_whole_reply_brings_a_title(
    talk: Talk, alice: Account, provider: FakeProvider, admin: asyncpg.Connection, log_of: Any
) -> None:
    _, reply = await talk.send(QUESTION)
    assert await title_of(talk) == first_words(QUESTION)
    await talk.ended(reply)
    await done(admin)
    assert await title_of(talk) == "Blue_skies"
    assert [d["title"] for e, d in await inbox(admin, alice) if e == "conversation.updated"][-1] == "Blue_skies"
    assert [d["title"] for _, e, d in await log_of(talk.id) if e == "conversation.changed"] == ["Blue_skies"]
    # It is in the ledger, as what it was for.
    row = await admin.fetchrow("SELECT * FROM usage_entries WHERE purpose = 'title'")
    assert (row["user_id"], row["conversation_id"], row["status"]) == (alice.user_id, talk.id, "completed")
    # Nobody's list of jobs has it.
    assert (await alice.http.get("/api/v1/jobs")).json()["data"] == []
    # The second one brings none.
    await ask(talk, "deltas=2 rate=0 say=Other x")
    await done(admin)
    assert await title_of(talk) == "Blue_skies"
    assert len(provider.requests) == 3
    assert await jobs(admin) == ["completed"]


async def test_what_is_shown_to_the_model_is_bounded_and_only_named(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    await ask(talk, QUESTION + " x" * 8000)
    await done(admin)
    body = provider.requests[-1].body
    assert "name conversations" in str(body["system"])
    assert not body.get("tools")
    assert len(str(body["messages"])) < 6000


async def test_a_failed_reply_brings_none_and_the_next_whole_one_does(talk: Talk, admin: asyncpg.Connection) -> None:
    await ask(talk, "fail=500 at first")
    assert await jobs(admin) == []
    await ask(talk)
    await done(admin)
    assert await title_of(talk) == "Blue_skies"


async def test_a_persons_title_stays(talk: Talk, alice: Account, admin: asyncpg.Connection) -> None:
    await change(alice, talk.id, title="Mine")
    await ask(talk)
    assert await jobs(admin) == []
    named = await alice.http.post("/api/v1/conversations", json={"title": "Also mine"})
    other = Talk(alice, UUID(named.json()["data"]["id"]))
    await ask(other)
    assert await jobs(admin) == []
    assert (await title_of(talk), await title_of(other)) == ("Mine", "Also mine")
    # Given back, it is found again.
    await change(alice, talk.id, title=None)
    await ask(talk)
    await done(admin)
    assert await title_of(talk) == "Blue_skies"


async def test_a_title_that_a_person_sets_meanwhile_stays(
    app: FastAPI, talk: Talk, alice: Account, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = app.state.chat.titles
    find = titles._find

    async def slow(*arguments: Any) -> str | None:
        await change(alice, talk.id, title="Mine")
        found: str | None = await find(*arguments)
        return found

    monkeypatch.setattr(titles, "_find", slow)
    await ask(talk)
    await done(admin)
    assert await title_of(talk) == "Mine"


async def test_a_title_of_a_version_that_does_not_say_whose_it_is_stays(talk: Talk, admin: asyncpg.Connection) -> None:
    await admin.execute("UPDATE conversations SET title = 'Theirs', title_by = NULL")
    await ask(talk)
    await done(admin)
    assert await title_of(talk) == "Theirs"


async def test_a_job_that_is_done_twice_changes_nothing(
    app: FastAPI, talk: Talk, alice: Account, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(QUESTION)
    await talk.ended(reply)
    await done(admin)
    before, asked = await inbox(admin, alice), len(provider.requests)
    payload = {"conversation": str(talk.id), "reply": str(reply), "key": None}
    run = JobRun(uuid4(), alice.workspace_id, alice.user_id, payload, 2, app.state.database)
    for one in (run, replace(run, payload={**payload, "conversation": str(uuid4())}), replace(run, user_id=None)):
        assert await app.state.chat.titles.make(one) is None
    assert (await inbox(admin, alice), len(provider.requests)) == (before, asked)


async def test_without_budget_the_first_words_stay(
    talk: Talk, alice: Account, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    budget = {"subject": "workspace", "period": "day", "limit": "0.00000001"}
    assert (await alice.http.put("/api/v1/budgets", json={"budgets": [budget]})).status_code == 200
    # The reply is let in, and uses it up.
    await ask(talk)
    await done(admin)
    assert await title_of(talk) == first_words(QUESTION)
    assert len(provider.requests) == 1
    assert await admin.fetchval("SELECT title_by FROM conversations") == "words"
    # It is not tried again and again.
    await alice.http.put("/api/v1/budgets", json={"budgets": []})
    await ask(talk)
    assert await jobs(admin) == ["completed"]


Run = Callable[[Settings], AbstractAsyncContextManager[FastAPI]]


@pytest.mark.parametrize(
    ("fast", "titles"), [("", True), ("  fast: [demo]\n", True), ("  fast: [claude]\n", False)],
    ids=["no such alias", "only the demo model", "turned off"],
)  # fmt: skip
async def test_where_none_is_looked_for(
    tmp_path: Path, urls: DatabaseUrls, provider: FakeProvider, running_app: Run, sign_up: SignUp,
    admin: asyncpg.Connection, fast: str, titles: bool,
) -> None:  # fmt: skip
    path = tmp_path / "other.yaml"
    path.write_text(REGISTRY.format(url=provider.url) + fast)
    settings = make_settings(tmp_path, urls, llm=LlmSettings(registry=path, titles=titles))
    async with running_app(settings) as app:
        talk = await start_talk(await sign_up(app=app))
        await ask(talk)
        assert await jobs(admin) == []
        assert await title_of(talk) == first_words(QUESTION)


async def test_a_provider_that_fails_leaves_the_first_words(
    tmp_path: Path, urls: DatabaseUrls, provider: FakeProvider, running_app: Run, sign_up: SignUp,
    admin: asyncpg.Connection,
) -> None:  # fmt: skip
    path = tmp_path / "other.yaml"
    text = REGISTRY.format(url=provider.url)
    text = text.replace("models:\n", '  gone: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: x}\nmodels:\n')
    text = text.replace("aliases:\n", "  lost: {provider: gone, name: x, retries: 0}\naliases:\n  fast: [lost]\n")
    path.write_text(text)
    async with running_app(make_settings(tmp_path, urls, llm=LlmSettings(registry=path))) as app:
        talk = await start_talk(await sign_up(app=app))
        await ask(talk)
        await done(admin)
        assert await jobs(admin) == ["completed"]
        assert await title_of(talk) == first_words(QUESTION)


@pytest.mark.parametrize(
    ("said", "title"),
    [
        ("Blue skies", "Blue skies"), ('"Blue skies."', "Blue skies"), ("# Title: Blue skies\nmore", "Blue skies"),
        ("\n\n**Blue skies**\n", "Blue skies"), ("", None), ("...", None), ("Is it blue?", "Is it blue?"),
        ("Blue\u202e\x07 skies", "Blue skies"), ("word " * 30, "word " * 11 + "word"),
    ],
)  # fmt: skip
def test_what_a_model_says_is_made_a_title(said: str, title: str | None) -> None:
    assert tidy(said) == title


@given(st.text())
def test_a_title_is_one_short_line(said: str) -> None:
    for title in (tidy(said), first_words(said)):
        assert title is None or (0 < len(title) <= TITLE_LENGTH and title == title.strip() and "\n" not in title)
