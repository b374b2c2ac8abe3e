"""What a provider does wrong, through the whole stack: one end, the question and the partial kept, no word of theirs."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.core.settings import LlmSettings
from parley.llm import retry
from tests.conftest import Account, TestDatabases
from tests.held import held
from tests.realtime.conftest import (
    QUICK,
    Frame,
    LiveServer,
    Peer,
    Serve,
    conversation_of,
    serve_with,
    visible_text,
)

__all__ = ["serve_with"]

KINDS = ("openai", "anthropic")
REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: sk-canary-key-of-openai}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: sk-canary-key-of-anthropic}}
  closed: {{kind: openai, base_url: "http://127.0.0.1:{closed}/v1", api_key: sk-canary-key-of-closed}}
models:
  openai: {{provider: openai, name: fake, retries: 0, timeouts: &quick {{connect: 1, first_token: 1, idle: 1, total: 2.5}}}}
  anthropic: {{provider: anthropic, name: fake, retries: 0, timeouts: *quick}}
  openai-again: {{provider: openai, name: fake, retries: 2, timeouts: *quick}}
  anthropic-again: {{provider: anthropic, name: fake, retries: 2, timeouts: *quick}}
  closed: {{provider: closed, name: fake, retries: 1, timeouts: *quick}}
  rescued: {{provider: closed, name: fake, retries: 0, fallbacks: [openai], timeouts: *quick}}
aliases: {{default: [openai]}}
"""
SECRETS = ("secret", "sk-canary", "canary-key")
"""The fake provider's refusals and errors hold the first, the registry the others."""


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[FakeProvider]:
    """A provider that does what the prompt says."""
    async with FakeProvider() as made:
        yield made


@pytest.fixture(scope="module")
async def server(
    serve_with: Serve, provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveServer]:
    """A server whose models are that provider's, with short timeouts."""
    directory: Path = tmp_path_factory.mktemp("models")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
    registry = directory / "llm_registry.yaml"
    registry.write_text(REGISTRY.format(url=provider.url, closed=closed))
    prompts = directory / "prompts"
    (prompts / "chat").mkdir(parents=True)
    (prompts / "fallback.md.j2").write_text("Help.")
    (prompts / "chat" / "general.md.j2").write_text("Be brief.")
    (prompts / "chat" / "broken.md.j2").write_text("Hello {{ somebody }}.")
    # Every test here is a failure of the same two providers: their breakers are tested where they are made.
    llm = LlmSettings(registry=registry, prompts=prompts, breaker_failures=0)
    async with held(serve_with(realtime=QUICK, llm=llm)) as made:
        yield made


@pytest.fixture(scope="module")
async def owner(server: LiveServer) -> AsyncIterator[Account]:
    """Who asks."""
    async with server.sign_up() as account:
        yield account


@pytest.fixture
async def peer(server: LiveServer, owner: Account) -> AsyncIterator[Peer]:
    """The asker's connection; every frame on it is checked against the protocol."""
    async with server.join(owner) as joined:
        yield joined


@pytest.fixture(autouse=True)
def no_pause_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once: how long they wait is tested where they are made."""
    monkeypatch.setattr(retry, "BACKOFF_CAP_S", 0.01)


async def turn(peer: Peer, channel: str, text: str, model: str, **fields: Any) -> tuple[Frame, Frame]:
    """Send, and read up to the end of the reply: returns the `ok` and the terminal event."""
    if channel not in peer.logs:
        await peer.sub(channel)
    sent = await peer.say(channel, text, opts={"model": model}, **fields)
    assert sent["t"] == "ok", sent
    ended = await peer.event("reply.completed", "reply.failed", "reply.cancelled", reply=sent["reply"])
    return sent, ended


async def messages_of(owner: Account, channel: str) -> list[dict[str, Any]]:
    """Return the conversation's messages."""
    answer = await owner.http.get(f"/api/v1/conversations/{channel.partition(':')[2]}/messages")
    assert answer.status_code == 200
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


FAULTS = [
    ("401", "provider_auth", False, 0),
    ("403", "provider_auth", False, 0),
    ("404", "provider_unavailable", False, 0),
    ("400", "provider_unavailable", False, 0),
    ("400ctx", "context_too_long", False, 0),
    ("400filter", "content_filtered", False, 0),
    ("413", "context_too_long", False, 0),
    ("429", "provider_rate_limited", True, 0),
    ("429quota", "provider_rate_limited", False, 0),
    ("500", "provider_unavailable", True, 0),
    ("503", "provider_unavailable", True, 0),
    ("302", "provider_unavailable", False, 0),
    ("html", "bad_output", True, 0),
    ("nothing", "provider_unavailable", True, 0),
    ("garbage:0", "bad_output", True, 0),
    ("garbage:7", "bad_output", True, 7),
    ("huge_line:7", "bad_output", True, 7),
    ("die_at:0", "provider_unavailable", True, 0),
    ("die_at:7", "provider_unavailable", True, 7),
    ("end_at:7", "provider_unavailable", True, 7),
    ("error_event_at:7", "provider_unavailable", True, 7),
    ("slow_headers", "provider_timeout", True, 0),
    ("stall_at:0", "provider_timeout", True, 0),
    ("stall_at:7", "provider_timeout", True, 7),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fault", "code", "retryable", "kept"), FAULTS, ids=[row[0] for row in FAULTS])
async def test_each_fault_ends_the_reply_once_and_loses_nothing(
    peer: Peer, owner: Account, provider: FakeProvider, caplog: pytest.LogCaptureFixture,
    kind: str, fault: str, code: str, retryable: bool, kept: int,
) -> None:  # fmt: skip
    channel = await conversation_of(owner)
    question = f"deltas=20 seed=5 fail={fault}"
    with caplog.at_level(logging.DEBUG):
        sent, ended = await turn(peer, channel, question, kind)
        record = provider.requests[-1]
        await provider.ended(record, 2)
    d = ended["d"]
    assert ended["e"] == "reply.failed"
    assert (d["error"]["code"], d["error"]["retryable"]) == (code, retryable)
    assert "regenerate" in d["can"]
    text = "".join(script(5, 20, 4)[:kept])
    assert visible_text(d["message"]) == peer.logs[channel].text(sent["reply"]) == text
    assert d["partial"] is True or not kept
    assert (d["message"]["status"], d["message"]["error"]) == ("failed", d["error"])
    rows = await messages_of(owner, channel)
    assert [row["id"] for row in rows] == [sent["message"], sent["reply"]]
    assert rows[0]["parts"] == [{"type": "text", "text": question}]
    assert rows[1] == d["message"]
    shown = json.dumps(peer.seen) + json.dumps(rows) + caplog.text
    for word in SECRETS:
        assert word not in shown, word
    assert question not in caplog.text, "no message content in the logs"
    # Nothing is stuck: the conversation goes on. (Neighbouring questions reach Anthropic as one: the last word counts.)
    _, after = await turn(peer, channel, "deltas=3 fail=", kind)
    assert after["e"] == "reply.completed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("manner", ["", "burst=1", "fail=split_utf8", "fail=surrogates", "fail=no_done", "reasoning=5"])
async def test_an_odd_but_whole_answer_is_whole(peer: Peer, owner: Account, kind: str, manner: str) -> None:
    channel = await conversation_of(owner)
    sent, ended = await turn(peer, channel, f"deltas=600 seed=9 {manner}", kind)
    assert ended["e"] == "reply.completed"
    assert visible_text(ended["d"]["message"]) == "".join(script(9, 600, 4))
    if "reasoning" in manner:
        assert ended["d"]["message"]["parts"][0] == {
            "type": "reasoning",
            "text": "".join(f"thought {n} " for n in range(1, 6)),
        }
    else:
        assert peer.logs[channel].text(sent["reply"]) == "".join(script(9, 600, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["429", "500", "503", "nothing", "die_at:0", "garbage:0", "stall_at:0", "html"])
async def test_a_fault_before_the_first_word_is_tried_again_unseen(
    peer: Peer, owner: Account, provider: FakeProvider, kind: str, fault: str
) -> None:
    channel = await conversation_of(owner)
    asked = provider.asked.copy()
    text = f"deltas=12 seed=3 fail_first=2 fail={fault} of={kind}"
    _, ended = await turn(peer, channel, text, f"{kind}-again")
    assert ended["e"] == "reply.completed"
    assert visible_text(ended["d"]["message"]) == "".join(script(3, 12, 4))
    assert provider.asked[text] - asked[text] == 3
    names = [frame["e"] for frame in peer.seen if frame["t"] == "ev"]
    assert names.count("reply.started") == 1
    assert "reply.reset" not in names


@pytest.mark.parametrize("kind", KINDS)
async def test_a_provider_that_never_recovers_is_asked_three_times(
    peer: Peer, owner: Account, provider: FakeProvider, kind: str
) -> None:
    channel = await conversation_of(owner)
    before = len(provider.requests)
    _, ended = await turn(peer, channel, "fail=429", f"{kind}-again")
    assert (ended["e"], ended["d"]["error"]["code"]) == ("reply.failed", "provider_rate_limited")
    assert len(provider.requests) - before == 3
    before = len(provider.requests)
    _, ended = await turn(peer, channel, "fail=401", f"{kind}-again")
    assert ended["d"]["error"]["code"] == "provider_auth"
    assert len(provider.requests) - before == 1, "a refused key is not tried again"
    before = len(provider.requests)
    _, ended = await turn(peer, channel, "deltas=9 fail=die_at:4", f"{kind}-again")
    assert visible_text(ended["d"]["message"]) == "".join(script(1, 9, 4)[:4])
    assert len(provider.requests) - before == 1, "what was seen is not written anew"


async def test_nobody_listens_at_the_address(peer: Peer, owner: Account) -> None:
    channel = await conversation_of(owner)
    _, ended = await turn(peer, channel, "hello", "closed")
    assert (ended["e"], ended["d"]["error"]["code"]) == ("reply.failed", "provider_unavailable")
    assert ended["d"]["message"]["parts"] == []
    assert ended["d"]["len"] == 0


async def test_another_model_answers_in_place_of_one_that_cannot(peer: Peer, owner: Account) -> None:
    channel = await conversation_of(owner)
    _, ended = await turn(peer, channel, "deltas=4", "rescued")
    assert ended["e"] == "reply.completed"
    assert ended["d"]["message"]["model"] == "openai"
    assert visible_text(ended["d"]["message"]) == "".join(script(1, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_without_end_is_cut_at_the_total_timeout(peer: Peer, owner: Account, kind: str) -> None:
    channel = await conversation_of(owner)
    began = time.monotonic()
    sent, ended = await turn(peer, channel, "deltas=100000 rate=50 seed=2", kind)
    took = time.monotonic() - began
    assert took < 7
    assert (ended["e"], ended["d"]["error"]["code"]) == ("reply.failed", "provider_timeout")
    text = visible_text(ended["d"]["message"])
    # On a machine that is busy for a second another limit may have cut it before any text.
    assert text or took < 2.5
    assert "".join(script(2, 1000, 4)).startswith(text) or text == peer.logs[channel].text(sent["reply"])


@pytest.mark.parametrize("kind", KINDS)
async def test_cancel_closes_the_provider_at_once(
    peer: Peer, owner: Account, provider: FakeProvider, kind: str
) -> None:
    channel = await conversation_of(owner)
    await peer.sub(channel)
    sent = await peer.say(channel, "deltas=5000 rate=50 seed=4", opts={"model": kind})
    await peer.event("reply.delta", reply=sent["reply"])
    record = provider.requests[-1]
    asked_at = time.monotonic()
    assert (await peer.ask("reply.cancel", reply=sent["reply"]))["t"] == "ok"
    await provider.ended(record, 2)
    assert record.closed_early
    assert record.closed_at is not None
    assert record.closed_at - asked_at < 0.5
    ended = next((f for f in peer.seen if f["t"] == "ev" and f["e"] == "reply.cancelled"), None)
    ended = ended or await peer.event("reply.cancelled", reply=sent["reply"])
    text = visible_text(ended["d"]["message"])
    assert text == peer.logs[channel].text(sent["reply"])
    assert text
    assert ended["d"]["usage"]["output_tokens"] > 0


ODD_TOOL_CALLS = {
    "no JSON": 'tool=add_task:{"title":',
    "no object": "tool=add_task:[1,2]",
    "no such tool": 'tool=drop_tables:{"x":1}',
    "wrong fields": 'tool=add_task:{"titel":"x"}',
    "a NUL": 'tool=add_task:{"title":"a\\u0000b"}',
    "half an emoji": 'tool=add_task:{"title":"\\ud83d"}',
    "a key that is half an emoji": 'tool=add_task:{"\\ud83d":"x"}',
    "a number beyond 64 bits": 'tool=add_task:{"title":"x","n":1180591620717411303424}',
    "that, next to half an emoji": 'tool=add_task:{"title":"\\ud83d","n":1180591620717411303424}',
    "an endless number": 'tool=add_task:{"title":"\\ud83d","n":' + "9" * 4000 + "}",
    "deep": 'tool=add_task:{"title":' + "[" * 900 + "]" * 900 + "}",
    "deeper": 'tool=add_task:{"title":"\\ud83d","x":' + "[" * 3000 + "]" * 3000 + "}",
    "a long name": "tool=" + "n" * 3000 + ":{}",
    "a thousand calls": " ".join(["tool=list_tasks"] * 200),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ODD_TOOL_CALLS)
async def test_odd_tool_calls_harm_neither_their_reply_nor_the_others(
    peer: Peer, owner: Account, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All replies of a process share its ticks: one that cannot be written must not take the others' text with it."""
    odd, calm = await conversation_of(owner), await conversation_of(owner)
    await peer.sub(odd)
    await peer.sub(calm)
    beside = await peer.say(calm, "deltas=80 rate=200 seed=6", opts={"model": kind})
    with caplog.at_level(logging.ERROR):
        sent = await peer.say(odd, f"deltas=3 {ODD_TOOL_CALLS[name]}", opts={"model": kind})
        wanted = {sent["reply"], beside["reply"]}
        ends: dict[str, Frame] = {}
        async with asyncio.timeout(15):
            while wanted - ends.keys():
                frame = await peer.read()
                if frame["t"] == "ev" and frame["e"] in {"reply.completed", "reply.failed"}:
                    ends[frame["d"]["reply"]] = frame
    assert visible_text(ends[beside["reply"]]["d"]["message"]) == "".join(script(6, 80, 4))
    assert peer.logs[calm].text(beside["reply"]) == "".join(script(6, 80, 4))
    ended = ends[sent["reply"]]
    assert ended["e"] == "reply.completed" or ended["d"]["error"]["code"] == "bad_output", ended["d"]["error"]
    assert (await messages_of(owner, odd))[1] == ended["d"]["message"]
    assert not [record.getMessage() for record in caplog.records]


async def of_an_assistant(server: LiveServer, databases: TestDatabases, owner: Account, name: str) -> str:
    """Make a conversation with an assistant that a new one is not given: one of another version's, for example."""
    channel = await conversation_of(owner)
    connection = await asyncpg.connect(databases.postgres.admin_url(server.urls.name))
    try:
        id_ = UUID(channel.partition(":")[2])
        done = await connection.execute("UPDATE conversations SET assistant = $2 WHERE id = $1", id_, name)
        assert done == "UPDATE 1"
    finally:
        await connection.close()
    return channel


async def test_an_assistant_without_a_template_gets_the_fallback_and_a_warning(
    server: LiveServer, databases: TestDatabases, peer: Peer, owner: Account, provider: FakeProvider,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    channel = await of_an_assistant(server, databases, owner, "nobody_wrote_this")
    with caplog.at_level(logging.WARNING):
        _, ended = await turn(peer, channel, "deltas=3", "openai")
    assert ended["e"] == "reply.completed"
    assert provider.requests[-1].body["messages"][0]["content"] == "Help."
    assert [r.levelname for r in caplog.records if "nobody_wrote_this" in r.getMessage()] == ["WARNING"]


async def test_a_template_that_cannot_be_rendered_fails_its_reply_and_nothing_else(
    server: LiveServer, databases: TestDatabases, peer: Peer, owner: Account
) -> None:
    """The prompt is rendered inside the reply: whatever goes wrong there is the reply's end and not its silence."""
    channel = await of_an_assistant(server, databases, owner, "broken")
    _, ended = await turn(peer, channel, "deltas=3", "openai")
    assert (ended["e"], ended["d"]["error"]["code"]) == ("reply.failed", "internal")
    assert "somebody" not in ended["d"]["error"]["msg"]
    other = await conversation_of(owner)
    assert (await turn(peer, other, "deltas=3", "openai"))[1]["e"] == "reply.completed"


@pytest.mark.parametrize("how", ["pg_terminate_backend", "pg_cancel_backend"])
async def test_an_end_that_the_database_gives_up_is_stored_all_the_same(
    server: LiveServer, peer: Peer, owner: Account, databases: TestDatabases, how: str
) -> None:
    """The connection that stores the end is dropped, or its statement cancelled: the reply still comes to its end."""
    channel = await conversation_of(owner)
    await peer.sub(channel)
    holder = await asyncpg.connect(databases.postgres.admin_url(server.urls.name))
    observer = await asyncpg.connect(databases.postgres.admin_url(server.urls.name))
    try:
        async with holder.transaction():
            sent = await peer.say(channel, "deltas=30 rate=60 seed=8", opts={"model": "openai"})
            await holder.execute("SELECT 1 FROM messages WHERE id = $1 FOR UPDATE", UUID(sent["reply"]))
            blocked: int | None = None
            async with asyncio.timeout(10):
                while blocked is None:
                    blocked = await observer.fetchval(
                        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                        " AND wait_event_type = 'Lock' AND query ILIKE '%UPDATE messages%' LIMIT 1"
                    )
                    await asyncio.sleep(0.01)
            await observer.execute(f"SELECT {how}($1)", blocked)
        ended = await peer.event("reply.completed", "reply.failed", reply=sent["reply"])
        assert ended["e"] == "reply.completed"
        assert visible_text(ended["d"]["message"]) == "".join(script(8, 30, 4))
        assert (await messages_of(owner, channel))[1] == ended["d"]["message"]
    finally:
        await holder.close()
        await observer.close()
