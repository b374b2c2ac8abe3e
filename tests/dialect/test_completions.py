"""Completions as a whole and as a stream, against a provider that does what the prompt says."""

import asyncio
import time
from decimal import Decimal
from typing import Any

import asyncpg
import httpx
import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.dialect import answer as answers
from tests.dialect.conftest import Ledger, Person, error_of, events_of
from tests.live import LiveServer

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def text_of(plan: str) -> str:
    """Return the text that a plan streams."""
    words = dict(word.split("=") for word in plan.split() if "=" in word)
    return "".join(script(int(words.get("seed", 1)), int(words.get("deltas", 20)), int(words.get("size", 4))))


def deltas_of(events: list[Any]) -> list[dict[str, Any]]:
    return [event["choices"][0]["delta"] for event in events if event != "[DONE]" and event.get("choices")]


def said(events: list[Any]) -> str:
    return "".join(delta.get("content") or "" for delta in deltas_of(events))


# -- whole -------------------------------------------------------------------------------------------------------------


async def test_a_whole_completion(alice: Person, provider: FakeProvider, ledger: Ledger) -> None:
    began = time.time()
    answer = await alice.complete("seed=3 deltas=12", stream=False)

    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert began - 2 <= body["created"] <= time.time() + 1
    assert {name: body[name] for name in ("object", "model", "system_fingerprint")} == {
        "object": "chat.completion", "model": "gpt", "system_fingerprint": None,
    }  # fmt: skip
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text_of("seed=3 deltas=12"), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    # The provider was asked for what the caller asked, under the provider's name and with a bound.
    (call,) = provider.requests
    assert call.body["messages"] == [{"role": "user", "content": "seed=3 deltas=12"}]
    assert call.body["model"] == "fake"
    assert call.body["max_tokens"] == 1000
    (row,) = await ledger()
    assert (row["workspace_id"], row["user_id"], row["key_id"]) == (alice.workspace_id, alice.user_id, alice.key_id)
    assert (row["purpose"], row["status"], row["model"], row["error"]) == ("dialect", "completed", "gpt", None)
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == (2, 1, 12)
    assert row["cost"] == Decimal("0.00002600")
    assert (row["conversation_id"], row["message_id"], row["estimated"]) == (None, None, False)


async def test_reasoning_and_tool_calls_of_a_whole_completion(alice: Person, provider: FakeProvider) -> None:
    plan = 'deltas=1 reasoning=2 tool=get_weather:{"city":"Oslo"} tool=get_weather:{"city":"Rome"}'
    body = (await alice.complete(plan, tools=[WEATHER])).json()

    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": text_of("deltas=1"),
        "refusal": None,
        "reasoning_content": "thought 1 thought 2 ",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}},
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}},
        ],
    }
    assert provider.requests[0].body["tools"][0]["function"]["name"] == "get_weather"


async def test_nothing_is_kept_as_a_conversation(alice: Person) -> None:
    assert (await alice.complete("deltas=2")).status_code == 200

    assert await alice.manage("GET", "conversations") == []


async def test_an_access_token_will_do(alice: Person, ledger: Ledger) -> None:
    assert (await alice.complete("deltas=2", credential=alice.token)).status_code == 200

    (row,) = await ledger()
    assert (row["user_id"], row["key_id"]) == (alice.user_id, None)


async def test_an_alias_answers_as_the_model_that_it_stands_for(alice: Person) -> None:
    assert (await alice.complete("hello", model="fast")).json()["model"] == "demo"


# -- as a stream -------------------------------------------------------------------------------------------------------


async def test_a_stream_as_openai_sends_it(alice: Person, ledger: Ledger) -> None:
    answer = await alice.complete("seed=3 deltas=12", stream=True)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    heads = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}
    ((id_, kind, _, model, fingerprint),) = heads
    assert (id_[:9], kind, model, fingerprint) == ("chatcmpl-", "chat.completion.chunk", "gpt", None)
    assert all("usage" not in chunk for chunk in chunks)
    first, *middle, last = [chunk["choices"] for chunk in chunks]
    shared = {"index": 0, "logprobs": None}
    assert first == [{**shared, "delta": {"role": "assistant", "content": "", "refusal": None}, "finish_reason": None}]
    assert [choice["delta"] for (choice,) in middle] == [{"content": piece} for piece in script(3, 12, 4)]
    assert {choice["finish_reason"] for (choice,) in middle} == {None}
    assert last == [{**shared, "delta": {}, "finish_reason": "stop"}]
    assert [row["status"] for row in await ledger()] == ["completed"]


async def test_usage_comes_when_it_is_asked_for(alice: Person) -> None:
    answer = await alice.complete("deltas=5", stream=True, stream_options={"include_usage": True})

    *chunks, usage, done = events_of(answer.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 5,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_tool_calls_come_each_with_its_index(alice: Person) -> None:
    plan = 'deltas=0 reasoning=1 tool=get_weather:{"city":"Oslo"} tool=get_weather:{"city":"Rome"}'
    events = events_of((await alice.complete(plan, stream=True, tools=[WEATHER])).text)

    role, reasoning, *calls, end = deltas_of(events)
    assert (role["role"], reasoning, end) == ("assistant", {"reasoning_content": "thought 1 "}, {})
    assert calls == [
        {
            "tool_calls": [
                {
                    "index": index,
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": f'{{"city":"{city}"}}'},
                }
            ]
        }
        for index, city in enumerate(("Oslo", "Rome"))
    ]
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_what_the_provider_sends_in_one_go_goes_on_in_few(alice: Person, provider: FakeProvider) -> None:
    async with alice.http() as http:
        asked = {"model": "gpt", "stream": True, "messages": [{"role": "user", "content": "deltas=500 burst=1"}]}
        async with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
            pieces = [piece async for piece in answer.aiter_raw()]

    text = b"".join(pieces).decode()
    assert said(events_of(text)) == text_of("deltas=500")
    assert len(pieces) < 100


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_comes_when_the_call_is_in_the_ledger(
    alice: Person, server: LiveServer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """Who reads the ledger after an answer finds it there."""
    settling, settle = asyncio.Event(), asyncio.Event()
    accounts = server.app.state.usage.accounts
    real = accounts.settle

    async def late(*args: Any, **options: Any) -> None:
        settling.set()
        await settle.wait()
        await real(*args, **options)

    monkeypatch.setattr(accounts, "settle", late)
    task = asyncio.create_task(alice.complete("deltas=2", stream=stream))
    async with asyncio.timeout(30):
        await settling.wait()
    assert not task.done()
    assert await ledger() == []
    settle.set()
    assert (await task).status_code == 200
    assert len(await ledger()) == 1


async def test_a_model_of_another_provider_is_told_the_same(alice: Person, provider: FakeProvider) -> None:
    plan = 'seed=5 deltas=3 tool=get_weather:{"city":"Oslo"}'
    messages: list[dict[str, Any]] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": plan}]
    async with alice.http() as http:
        for _ in range(2):
            asked = {"model": "other", "messages": messages, "tools": [WEATHER], "max_tokens": 50}
            answer = (await http.post("/v1/chat/completions", json=asked)).json()["choices"][0]
            messages.append(answer["message"])
            calls = answer["message"].get("tool_calls", [])
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": "cold"} for call in calls]

    assert answer["finish_reason"] == "stop"
    second = provider.requests[1].body
    assert (second["system"], second["max_tokens"], len(second["tools"])) == ("Be brief.", 50, 1)
    said, result = second["messages"][1:]
    use = {"type": "tool_use", "id": "toolu_2", "name": "get_weather", "input": {"city": "Oslo"}}
    assert use in said["content"]
    assert result == {
        "role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_2", "content": "cold"}],
    }  # fmt: skip


# -- when the provider fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fail", "status", "kind", "code", "retry"),
    [
        ("400", 400, "invalid_request_error", "request_refused", None),
        ("400ctx", 400, "invalid_request_error", "context_length_exceeded", None),
        ("400filter", 400, "invalid_request_error", "content_filter", None),
        ("401", 502, "server_error", "provider_auth", "false"),
        ("404", 502, "server_error", "provider_unavailable", "false"),
        ("429", 429, "requests", "rate_limit_exceeded", None),
        ("503", 502, "server_error", "provider_unavailable", None),
        ("html", 502, "server_error", None, None),
        ("nothing", 502, "server_error", None, None),
        ("error_event_at:0", 502, "server_error", None, None),
        ("garbage", 502, "server_error", "bad_output", None),
    ],
)
async def test_a_failure_before_the_first_token_is_an_http_error(
    alice: Person,
    ledger: Ledger,
    fail: str,
    status: int,
    kind: str,
    code: str | None,
    retry: str | None,
    *,
    stream: bool,
) -> None:
    answer = await alice.complete(f"fail={fail}", stream=stream)

    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["type"] == kind
    assert code is None or error["code"] == code
    assert answer.headers.get("x-should-retry") == retry
    assert "secret" not in answer.text
    assert [row["status"] for row in await ledger()] == ["failed"]


async def test_a_providers_wish_to_wait_is_passed_on(alice: Person) -> None:
    answer = await alice.complete("fail=429 retry_after=7")

    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize("fail", ["die_at:3", "end_at:3", "error_event_at:3", "garbage:3"])
async def test_a_failure_in_a_stream_is_its_last_event(alice: Person, ledger: Ledger, fail: str) -> None:
    answer = await alice.complete(f"seed=3 deltas=9 fail={fail}", stream=True)

    assert answer.status_code == 200
    events = events_of(answer.text)
    assert said(events) == "".join(script(3, 9, 4)[:3])
    assert set(events[-1]) == {"error"}
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in events
    assert "secret" not in answer.text
    (row,) = await ledger()
    assert row["status"] == "failed"
    assert row["output_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_answers_before_the_first_token(alice: Person, ledger: Ledger, *, stream: bool) -> None:
    # The other dialect of the provider has the same fault, so it is told to fail once.
    answer = await alice.complete("seed=3 deltas=5 fail=503 fail_first=1", model="safe", stream=stream)

    assert answer.status_code == 200, answer.text
    if stream:
        events = events_of(answer.text)
        assert said(events) == text_of("seed=3 deltas=5")
        assert {event["model"] for event in events[:-1]} == {"other"}
    else:
        assert answer.json()["model"] == "other"
        assert answer.json()["choices"][0]["message"]["content"] == text_of("seed=3 deltas=5")
    assert [(row["model"], row["status"]) for row in await ledger()] == [("safe", "failed"), ("other", "completed")]


async def test_what_was_shown_is_never_said_again_by_a_fallback(alice: Person, ledger: Ledger) -> None:
    """This dialect has no way of taking text back, so an answer that cannot be gone on with ends."""
    answer = await alice.complete("seed=3 deltas=9 fail=die_at:3 fail_first=1", model="safe", stream=True)

    events = events_of(answer.text)
    assert said(events) == "".join(script(3, 9, 4)[:3])
    assert events[-1]["error"]["code"] == "provider_unavailable"
    assert [(row["model"], row["status"]) for row in await ledger()] == [("safe", "failed")]


async def test_a_fallback_that_can_go_on_does(alice: Person, ledger: Ledger) -> None:
    plan = "seed=3 deltas=9 fail=die_at:3 fail_first=1"
    answer = await alice.complete(plan, model="begun", stream=True)

    events = events_of(answer.text)
    assert said(events) == text_of("seed=3 deltas=9")
    assert events[-1] == "[DONE]"
    assert [(row["model"], row["status"]) for row in await ledger()] == [("begun", "failed"), ("goes-on", "completed")]


@pytest.mark.parametrize("stream", [False, True])
async def test_without_the_database_nobody_is_called(
    alice: Person, server: LiveServer, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise asyncpg.ConnectionDoesNotExistError("the database is away")

    monkeypatch.setattr(server.app.state.usage.accounts, "reserve", away)
    answer = await alice.complete("deltas=1", stream=stream)

    assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert not provider.requests


# -- while it runs -----------------------------------------------------------------------------------------------------


async def test_a_stream_that_waits_shows_that_it_lives(alice: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "HEARTBEAT_S", 0.05)
    answer = await alice.complete("ttft=0.5 deltas=2", stream=True)

    assert answer.text.startswith(": still here\n\n")
    assert said(events_of(answer.text)) == text_of("deltas=2")


async def test_a_failure_after_a_sign_of_life_is_an_event(alice: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "HEARTBEAT_S", 0.05)
    answer = await alice.complete("ttft=0.5 deltas=2 fail=error_event_at:0", stream=True)

    assert answer.status_code == 200
    assert answer.text.startswith(": still here\n\n")
    (event,) = events_of(answer.text)
    assert set(event) == {"error"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first token", "in the middle"])
async def test_who_goes_stops_the_provider(
    alice: Person, provider: FakeProvider, ledger: Ledger, when: str, *, stream: bool
) -> None:
    plan = "ttft=60" if when == "before the first token" else "rate=50 deltas=5000"
    asked = {"model": "gpt", "stream": stream, "messages": [{"role": "user", "content": plan}]}
    async with alice.http() as http:
        if stream and when == "in the middle":
            async with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
                async for _ in answer.aiter_lines():
                    if provider.requests[0].deltas_sent > 3:
                        break
        else:
            task = asyncio.create_task(http.post("/v1/chat/completions", json=asked))
            await provider.until(lambda: provider.requests, within_s=30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    left = time.monotonic()
    (call,) = provider.requests
    await provider.ended(call, within_s=30)

    assert call.closed_early
    assert call.closed_at is not None
    assert call.closed_at - left < 2
    (row,) = await ledger(rows=1)
    assert (row["status"], row["purpose"], row["estimated"]) == ("stopped", "dialect", True)
    assert row["input_tokens"] > 0
    if when == "before the first token":
        assert row["output_tokens"] == 0


async def test_a_client_that_does_not_read_is_cut_off(
    alice: Person, provider: FakeProvider, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(answers, "SEND_TIMEOUT_S", 0.5)
    asked = {"model": "gpt", "stream": True, "messages": [{"role": "user", "content": "deltas=200000 stamp=1"}]}
    async with alice.http() as http, http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.status_code == 200
        (call,) = provider.requests
        await provider.ended(call, within_s=60)
        # What is not taken holds the provider back: it is not gathered here.
        assert call.closed_early
        with pytest.raises(httpx.HTTPError):
            async for _ in answer.aiter_raw():
                pass
    assert [row["status"] for row in await ledger(rows=1)] == ["stopped"]
