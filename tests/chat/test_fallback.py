"""Another model ends what one has begun: what its readers see, what is stored, and what a lost process makes of it."""

from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from benchmarks.fake_plan import script
from benchmarks.fake_provider import FakeProvider
from parley.chat.written import Written
from parley.realtime.fold import apply_reply_events, visible_text
from tests.chat.conftest import Talk, until
from tests.chat.test_take_over import assert_offsets, log_of, lose

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: test-key}}
  responses: {{kind: openai_responses, base_url: "{url}/v1", api_key: test-key}}
  nowhere: {{kind: openai, base_url: "{url}/nowhere", api_key: test-key}}
models:
  able: {{provider: anthropic, name: fake, retries: 0, prefill: plain, price: &price {{input: 1, output: 2}}, capabilities: [tools]}}
  other: {{provider: anthropic, name: fake, retries: 0, price: *price, capabilities: [tools]}}
  background: {{provider: responses, name: fake, retries: 0, price: *price, capabilities: [tools]}}
  nowhere: {{provider: nowhere, name: fake, retries: 0, prefill: plain}}
  alone: {{provider: openai, name: fake, retries: 0, price: *price, capabilities: [tools]}}
  continued: {{provider: openai, name: fake, retries: 0, price: *price, capabilities: [tools], fallbacks: [able]}}
  begun-anew: {{provider: openai, name: fake, retries: 0, price: *price, capabilities: [tools], fallbacks: [other]}}
  gone-on: {{provider: openai, name: fake, retries: 0, prefill: prefix, price: *price, fallbacks: [other]}}
  read-on: {{provider: openai, name: fake, retries: 0, price: *price, fallbacks: [background]}}
  left: {{provider: openai, name: fake, retries: 0, price: *price, capabilities: [tools], fallbacks: [nowhere]}}
  from-background: {{provider: responses, name: fake, retries: 0, price: *price, fallbacks: [other]}}
aliases: {{default: [alone]}}
"""
CUT = "deltas=60 seed=7 fail=die_at:20 fail_first=1"
FIRST, WHOLE = "".join(script(7, 60, 4)[:20]), "".join(script(7, 60, 4))


@pytest.fixture
def registry_file(tmp_path: Path, provider: FakeProvider) -> Path:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return path


def changes(log: list[tuple[str, dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """Return the resets and resumptions of a reply."""
    return [
        (e, d["part"], d["to_off"]) if e == "reply.reset" else (e, d["strategy"], d["model"])
        for e, d in log
        if e in {"reply.reset", "reply.resumed"}
    ]


def folded(log: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the message as a client has it before the terminal event."""
    message: dict[str, Any] = {"status": "queued", "parts": [], "model": None}
    assert apply_reply_events(message, log[:-1])
    return message


async def test_a_model_that_can_goes_on_from_the_word_where_it_was_cut(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(CUT, model="continued")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["model"], visible_text(ended)) == ("completed", "able", WHOLE)
    log = await log_of(admin, reply)
    assert changes(log) == [("reply.resumed", "fallback", "able")]
    assert_offsets(log, WHOLE)
    assert [part["type"] for part in ended["parts"]] == ["text"]
    assert visible_text(folded(log)) == WHOLE
    assert folded(log)["model"] == "able"
    assert [record.closed_early or record.completed for record in provider.requests] == [True, True]
    # One message; what both attempts used is in its count.
    assert len(await talk.messages()) == 2
    assert ended["usage"]["output_tokens"] > 60


async def test_a_model_that_cannot_begins_anew_and_the_text_is_taken_back(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(CUT, model="begun-anew")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["model"], visible_text(ended)) == ("completed", "other", WHOLE)
    log = await log_of(admin, reply)
    assert changes(log) == [("reply.reset", 0, 0), ("reply.resumed", "fallback", "other")]
    at = [e for e, _ in log].index("reply.reset")
    assert "".join(d["x"] for e, d in log[:at] if e == "reply.delta") == FIRST
    assert "".join(d["x"] for e, d in log[at:] if e == "reply.delta") == WHOLE
    assert visible_text(folded(log)) == WHOLE
    assert len(ended["parts"]) == 1
    assert len(await talk.messages()) == 2


async def test_reasoning_goes_back_too(talk: Talk, admin: asyncpg.Connection) -> None:
    _, reply = await talk.send("reasoning=5 deltas=9 seed=3 fail=die_at:8 fail_first=1", model="begun-anew")
    ended = await talk.ended(reply)
    assert [part["type"] for part in ended["parts"]] == ["reasoning", "text"]
    assert ended["parts"][0]["text"] == "".join(f"thought {n} " for n in range(1, 6))
    log = await log_of(admin, reply)
    assert changes(log) == [("reply.reset", 0, 0), ("reply.resumed", "fallback", "other")]
    assert folded(log)["parts"] == ended["parts"]


def test_an_answer_of_another_kind_takes_the_place() -> None:
    """Text was taken back, and the answer in its place begins with reasoning."""
    log: list[tuple[str, dict[str, Any]]] = [
        ("reply.started", {"model": "m"}),
        ("reply.part", {"part": 0, "kind": "text", "state": "start"}),
        ("reply.delta", {"part": 0, "off": 0, "x": "some"}),
        ("reply.reset", {"part": 0, "to_off": 0}),
        ("reply.resumed", {"model": "n", "strategy": "fallback"}),
        ("reply.part", {"part": 0, "kind": "reasoning", "state": "start"}),
        ("reply.delta", {"part": 0, "off": 0, "x": "hm"}),
        ("reply.completed", {}),
    ]
    assert folded(log)["parts"] == [{"type": "reasoning", "text": "hm"}]
    written = Written.from_events(log[:-1])
    assert (written.parts, written.is_open, written.model) == ([{"type": "reasoning", "text": "hm"}], True, "n")


async def test_a_step_with_tools_that_has_ended_stays(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    """The second step is cut: what the first one said, and the tool that it called, is neither taken back nor redone."""
    text = 'deltas=12 seed=5 tool=add_task:{"title":"once"} spare_first=1 fail=die_at:6 fail_first=1'
    _, reply = await talk.send(text, model="begun-anew")
    ended = await talk.ended(reply)
    assert ended["status"] == "completed", ended["error"]
    assert [part["type"] for part in ended["parts"]] == ["text", "tool", "text"]
    log = await log_of(admin, reply)
    assert changes(log) == [("reply.reset", 2, 0), ("reply.resumed", "fallback", "other")]
    assert sum(e == "reply.tool" and d["state"] == "running" for e, d in log) == 1
    answer = await talk.owner.http.get("/api/v1/tasks")
    assert [task["title"] for task in answer.json()["data"]] == ["once"]
    assert folded(log)["parts"] == ended["parts"]
    # The second model was told what the tool had said.
    assert any(block["type"] == "tool_result" for block in provider.requests[-1].body["messages"][-1]["content"])


async def test_tool_calls_of_an_answer_that_was_cut_are_not_made(talk: Talk, admin: asyncpg.Connection) -> None:
    text = 'deltas=12 seed=6 tool=add_task:{"title":"twice"} fail=end_at:12 fail_first=1'
    _, reply = await talk.send(text, model="begun-anew")
    ended = await talk.ended(reply)
    assert ended["status"] == "completed", ended["error"]
    assert [part["type"] for part in ended["parts"]] == ["text", "tool", "text"]
    assert changes(await log_of(admin, reply)) == [("reply.reset", 0, 0), ("reply.resumed", "fallback", "other")]
    answer = await talk.owner.http.get("/api/v1/tasks")
    assert [task["title"] for task in answer.json()["data"]] == ["twice"]


async def test_without_a_successor_nothing_is_taken_back(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(CUT, model="left")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "provider_unavailable")
    assert (ended["model"], visible_text(ended)) == ("left", FIRST)
    log = await log_of(admin, reply)
    assert changes(log) == []
    assert log[-1][1]["partial"] is True


async def test_a_content_filter_is_not_evaded_after_text(talk: Talk, admin: asyncpg.Connection) -> None:
    _, reply = await talk.send("deltas=30 fail=400filter", model="continued")
    ended = await talk.ended(reply)
    assert ended["error"]["code"] == "content_filtered"
    assert changes(await log_of(admin, reply)) == []


async def lose_after(talk: Talk, admin: asyncpg.Connection, reply: UUID, at: int) -> None:
    """Rob the process when the second model has said so much."""

    async def far_enough() -> bool:
        log = await log_of(admin, reply)
        resumed = [index for index, (e, _) in enumerate(log) if e == "reply.resumed"]
        return bool(resumed) and sum(len(d["x"]) for e, d in log[resumed[-1] :] if e == "reply.delta") > at

    await until(far_enough)
    await lose(admin, reply)


SLOW = "deltas=150 rate=60 seed=7 fail=die_at:20 fail_first=1"
SLOW_WHOLE = "".join(script(7, 150, 4))


async def test_a_reply_that_was_taken_back_and_lost_is_gone_on_with(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    """What the lost process leaves is the second model's text alone; the first model can go on with it."""
    _, reply = await talk.send(SLOW, model="gone-on")
    await lose_after(talk, admin, reply, 60)
    ended = await talk.ended(reply)
    assert (ended["status"], visible_text(ended)) == ("completed", SLOW_WHOLE)
    log = await log_of(admin, reply)
    assert [change[:2] for change in changes(log)] == [
        ("reply.reset", 0), ("reply.resumed", "fallback"), ("reply.resumed", "prefill"),
    ]  # fmt: skip
    at = [e for e, _ in log].index("reply.reset")
    assert_offsets(log[at:], SLOW_WHOLE)
    assert len(ended["parts"]) == 1


async def test_a_reply_that_was_taken_back_and_lost_is_read_on(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(SLOW, model="read-on")
    await lose_after(talk, admin, reply, 60)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["model"], visible_text(ended)) == ("completed", "background", SLOW_WHOLE)
    log = await log_of(admin, reply)
    assert [change[:2] for change in changes(log)] == [
        ("reply.reset", 0), ("reply.resumed", "fallback"), ("reply.resumed", "reattach"),
    ]  # fmt: skip
    at = [e for e, _ in log].index("reply.reset")
    assert_offsets(log[at:], SLOW_WHOLE)


async def test_a_reply_that_was_taken_back_and_lost_for_good_keeps_the_second_models_text(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(SLOW, model="begun-anew")
    await lose_after(talk, admin, reply, 60)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "worker_lost")
    text = visible_text(ended)
    assert len(text) > 60
    assert SLOW_WHOLE.startswith(text)
    log = await log_of(admin, reply)
    assert visible_text(folded(log)) == text
    assert log[-1][1]["len"] == len(text)


async def test_a_place_in_the_first_providers_stream_is_forgotten(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    """The lost process would else read on what its reader has been told to forget."""
    _, reply = await talk.send("deltas=150 rate=60 seed=7 fail=error_event_at:20 fail_first=1", model="from-background")
    await lose_after(talk, admin, reply, 40)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "worker_lost")
    text = visible_text(ended)
    assert text
    assert SLOW_WHOLE.startswith(text)
    assert not [record for record in provider.requests if record.method == "GET"]


async def test_events_that_come_again_are_shown_once(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    """A provider whose stream is read on sends some of what it has sent before."""
    _, reply = await talk.send("deltas=150 rate=60 seed=7 overlap=9", model="background")
    await talk.when(reply, lambda message: len(visible_text(message)) > 60)
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert (ended["status"], visible_text(ended)) == ("completed", SLOW_WHOLE)
    log = await log_of(admin, reply)
    assert changes(log) == [("reply.resumed", "reattach", "background")]
    assert_offsets(log, SLOW_WHOLE)


async def test_a_continued_reply_that_is_lost_goes_on_with_the_second_model(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send(SLOW, model="continued")
    await lose_after(talk, admin, reply, 60)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["model"], visible_text(ended)) == ("completed", "able", SLOW_WHOLE)
    log = await log_of(admin, reply)
    assert [change[:3] for change in changes(log)] == [
        ("reply.resumed", "fallback", "able"), ("reply.resumed", "prefill", "able"),
    ]  # fmt: skip
    assert_offsets(log, SLOW_WHOLE)
