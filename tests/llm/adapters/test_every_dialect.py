"""What every provider adapter must do, over a real server that speaks its dialect."""

import asyncio
import logging
import socket
import time

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.llm.errors import ModelError
from parley.llm.factory import build_model
from parley.llm.ports import (
    ChatModel,
    Chunk,
    Finish,
    FinishReason,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
    UsageChunk,
)
from tests.llm.calls import KINDS, Kind, asking, collect, entry_for, reasoning_of, text_of


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
async def model(kind: Kind, provider: FakeProvider, http: httpx.AsyncClient) -> ChatModel:
    return build_model(entry_for(kind, provider), http)


@pytest.mark.parametrize("manner", ["", "burst=1", "fail=split_utf8", "fail=surrogates", "fail=no_done"])
async def test_a_reply_of_2000_deltas_is_complete(model: ChatModel, manner: str) -> None:
    chunks = await collect(model.stream(asking(f"deltas=2000 seed=7 size=4 {manner}")))
    assert text_of(chunks) == "".join(script(7, 2000, 4))
    assert all(chunk.text for chunk in chunks if isinstance(chunk, TextChunk))
    assert chunks[-1] == Finish(FinishReason.STOP)
    assert sum(isinstance(chunk, Finish) for chunk in chunks) == 1


async def test_deltas_come_as_they_are_sent(model: ChatModel) -> None:
    chunks = await collect(model.stream(asking("deltas=5 rate=50")))
    assert [chunk.text for chunk in chunks if isinstance(chunk, TextChunk)] == list(script(1, 5, 4))


async def test_usage_and_reasoning(model: ChatModel) -> None:
    chunks = await collect(model.stream(asking("deltas=5 reasoning=3 and these words")))
    assert reasoning_of(chunks) == "thought 1 thought 2 thought 3 "
    assert [chunk for chunk in chunks if isinstance(chunk, UsageChunk)][-1] == UsageChunk(
        input_tokens=5, cached_tokens=1, output_tokens=5
    )
    kinds = [type(chunk) for chunk in chunks if isinstance(chunk, ReasoningChunk | TextChunk)]
    assert kinds == [ReasoningChunk] * 3 + [TextChunk] * 5


async def test_several_tool_calls_are_gathered(model: ChatModel) -> None:
    text = 'deltas=2 tool=add_task:{"title":"x","tags":["é","😀"]} tool=list_tasks tool=broken:{"title":'
    chunks = await collect(model.stream(asking(text)))
    calls = [chunk for chunk in chunks if isinstance(chunk, ToolCallChunk)]
    assert [(call.name, call.arguments, call.raw) for call in calls] == [
        ("add_task", {"title": "x", "tags": ["é", "😀"]}, '{"title":"x","tags":["é","😀"]}'),
        ("list_tasks", {}, "{}"),
        ("broken", None, '{"title":'),
    ]
    assert len({call.call_id for call in calls}) == 3
    assert chunks[-1] == Finish(FinishReason.TOOL_CALLS)


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        ("401", "provider_auth", False),
        ("403", "provider_auth", False),
        ("404", "provider_unavailable", False),
        ("400", "provider_unavailable", False),
        ("400ctx", "context_too_long", False),
        ("400filter", "content_filtered", False),
        ("413", "context_too_long", False),
        ("408", "provider_timeout", True),
        ("504", "provider_timeout", True),
        ("429", "provider_rate_limited", True),
        ("429quota", "provider_rate_limited", False),
        ("302", "provider_unavailable", False),
        ("500", "provider_unavailable", True),
        ("503", "provider_unavailable", True),
        ("529", "provider_unavailable", True),
        ("html", "bad_output", True),
        ("nothing", "provider_unavailable", True),
        ("garbage", "bad_output", True),
        ("garbage:3", "bad_output", True),
        ("huge_line", "bad_output", True),
        ("die_at:0", "provider_unavailable", True),
        ("error_event_at:3", "provider_unavailable", True),
    ],
)
async def test_each_fault_has_its_code_and_no_text_of_the_provider(
    model: ChatModel, fault: str, code: str, retryable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[Chunk] = []

    async def read() -> None:
        async for chunk in model.stream(asking(f"deltas=10 fail={fault}")):
            shown.append(chunk)  # noqa: PERF401  the chunks before a failure count

    with caplog.at_level(logging.DEBUG), pytest.raises(ModelError) as caught:
        await read()
    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert "secret" not in str(caught.value) + caplog.text
    assert "test-key" not in str(caught.value) + caplog.text
    assert sum(isinstance(chunk, TextChunk) for chunk in shown) == (3 if fault.endswith(":3") else 0)
    assert not any(isinstance(chunk, Finish) for chunk in shown)


@pytest.mark.parametrize("fault", ["die_at:3", "end_at:3"])
async def test_an_answer_that_breaks_off_is_a_failure_unless_it_can_be_read_on(
    *, kind: Kind, model: ChatModel, provider: FakeProvider, fault: str
) -> None:
    shown: list[Chunk] = []
    error: ModelError | None = None
    try:
        async for chunk in model.stream(asking(f"deltas=10 rate=200 fail={fault}")):
            shown.append(chunk)  # noqa: PERF401  the chunks before a failure count
    except ModelError as caught:
        error = caught
    if kind == "openai_responses":
        assert (error, text_of(shown)) == (None, "".join(script(1, 10, 4)))
        assert len(provider.generations()) == 1
    else:
        assert error is not None
        assert (error.code, error.retryable) == ("provider_unavailable", True)
        assert [chunk.text for chunk in shown if isinstance(chunk, TextChunk)] == list(script(1, 10, 4)[:3])
        assert not any(isinstance(chunk, Finish) for chunk in shown)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), ("0.4", 1), ("0", 0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)]
)
async def test_retry_after_is_passed_on(model: ChatModel, header: str, seconds: int | None) -> None:
    # Words of a plan hold no spaces: the date is cut to its first word, which is no number either.
    with pytest.raises(ModelError) as caught:
        await collect(model.stream(asking(f"fail=429 retry_after={header}")))
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize(
    ("plan", "timeouts", "which"),
    [
        ("fail=slow_headers", {"first_token": 0.15}, "first-token timeout"),
        ("fail=stall_at:0", {"first_token": 0.15}, "first-token timeout"),
        ("fail=slow_headers", {"total": 0.15}, "total timeout"),
        ("deltas=10 fail=stall_at:3", {"idle": 0.15}, "idle timeout"),
        ("deltas=1000 rate=100", {"total": 0.2, "idle": 1}, "total timeout"),
    ],
)
async def test_each_timeout_says_which(
    *, kind: Kind, provider: FakeProvider, http: httpx.AsyncClient, plan: str, timeouts: dict[str, float], which: str
) -> None:
    model = build_model(entry_for(kind, provider, timeouts=timeouts), http)
    began_at = time.monotonic()
    with pytest.raises(ModelError, match=which) as caught:
        await collect(model.stream(asking(plan)))
    assert caught.value.code == "provider_timeout"
    assert 0.1 < time.monotonic() - began_at < 5
    await provider.ended(provider.requests[-1], 0.5)


async def test_a_server_that_accepts_nobody_is_a_connect_timeout(
    kind: Kind, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):  # they fill the queue: the kernel drops the next caller's packets
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        await asyncio.sleep(0)
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        model = build_model(entry_for(kind, provider, base_url=url, timeouts={"connect": 0.2}), http)
        with pytest.raises(ModelError, match="connect timeout") as caught:
            await collect(model.stream(asking("hello")))
    assert caught.value.code == "provider_timeout"


async def test_a_closed_port_is_unavailable(kind: Kind, provider: FakeProvider, http: httpx.AsyncClient) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        model = build_model(entry_for(kind, provider, base_url=url), http)
        with pytest.raises(ModelError) as caught:
            await collect(model.stream(asking("hello")))
    assert (caught.value.code, caught.value.retryable) == ("provider_unavailable", True)


async def test_closing_the_iterator_closes_the_connection(model: ChatModel, provider: FakeProvider) -> None:
    chunks = model.stream(asking("deltas=1000 rate=50"))
    async for chunk in chunks:
        if isinstance(chunk, TextChunk):
            break
    stopped_at = time.monotonic()
    await chunks.aclose()
    record = provider.requests[0]
    await provider.ended(record, 0.5)
    assert record.closed_early
    assert record.closed_at is not None
    assert record.closed_at - stopped_at < 0.5
    assert record.deltas_sent < 50


@pytest.mark.parametrize("plan", ["deltas=1000 rate=50", "fail=stall_at:0", "fail=slow_headers"])
async def test_cancelling_the_reader_closes_the_connection(model: ChatModel, provider: FakeProvider, plan: str) -> None:
    shown = asyncio.Event()

    async def read() -> None:
        async for chunk in model.stream(asking(plan)):
            if isinstance(chunk, TextChunk):
                shown.set()

    task = asyncio.create_task(read())
    if "rate" in plan:
        await shown.wait()
    await provider.until(lambda: provider.requests, 2)
    stopped_at = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    record = provider.requests[0]
    await provider.ended(record, 0.5)
    assert record.closed_early
    assert record.closed_at is not None
    assert record.closed_at - stopped_at < 0.5


async def test_a_slow_reader_is_not_timed_out(kind: Kind, provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = build_model(entry_for(kind, provider, timeouts={"idle": 0.4}), http)
    found: list[Chunk] = []
    async for chunk in model.stream(asking("deltas=20000 size=8")):
        if len(found) == 5000:
            await asyncio.sleep(0.6)
        found.append(chunk)
    assert text_of(found) == "".join(script(1, 20000, 8))


async def test_connections_are_used_again(model: ChatModel, provider: FakeProvider) -> None:
    for _ in range(5):
        await collect(model.stream(asking("deltas=3")))
    assert len(provider.connections) == 1


async def test_many_replies_at_once_do_not_mix(model: ChatModel) -> None:
    answers = await asyncio.gather(
        *(collect(model.stream(asking(f"deltas=50 rate=200 seed={seed}"))) for seed in range(150))
    )
    for seed, chunks in enumerate(answers):
        assert text_of(chunks) == "".join(script(seed, 50, 4))


async def test_what_is_sent_is_bounded_by_the_entry(
    kind: Kind, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    model = build_model(entry_for(kind, provider, max_output_tokens=100), http)
    await collect(model.stream(asking("deltas=1", max_output_tokens=5000, temperature=0.5)))
    body = provider.requests[-1].body
    bound = "max_output_tokens" if kind == "openai_responses" else "max_tokens"
    assert (body[bound], body["model"], body["stream"], body["temperature"]) == (100, "fake-model", True, 0.5)


async def test_parameters_are_laid_over_the_request(
    kind: Kind, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    entry = entry_for(kind, provider, parameters={"temperature": None, "top_p": 0.5, "seed": 1, "model": "other"})
    await collect(build_model(entry, http).stream(asking("deltas=1", temperature=1.0, parameters={"seed": 2})))
    body = provider.requests[-1].body
    assert "temperature" not in body
    assert (body["top_p"], body["seed"], body["model"]) == (0.5, 2, "fake-model")
