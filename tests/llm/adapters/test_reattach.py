"""Answers that are left and read on: the Responses adapter over a real server that goes on without a reader."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import Any

import httpx
import orjson
import pytest

from benchmarks.fake_provider import FakeProvider, Record, script
from parley.llm.adapters.responses import ResponsesModel
from parley.llm.adapters.responses_events import Place, ResponseParser
from parley.llm.errors import BadOutput, ModelError, ProviderAuthFailed, ProviderUnavailable, ReattachRefused
from parley.llm.ports import (
    Chunk,
    CursorChunk,
    Finish,
    FinishReason,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
    UsageChunk,
)
from tests.llm.calls import asking, collect, entry_for, reasoning_of, text_of

WHOLE = 'deltas=12 seed=5 reasoning=2 tool=add:{"title":"é😀"} tool=list'
TEXT = "".join(script(5, 12, 4))


@pytest.fixture
def model(provider: FakeProvider, http: httpx.AsyncClient) -> ResponsesModel:
    return ResponsesModel(entry_for("openai_responses", provider), http)


async def left_at(model: ResponsesModel, request: ModelRequest, deltas: int) -> tuple[str, str]:
    """Read so many pieces of text, then leave the answer running. Returns the last cursor and the text up to it."""
    request.on_close.keep_running = True
    said, cursor = "", ""
    async with aclosing(model.stream(request)) as chunks:
        async for chunk in chunks:
            if isinstance(chunk, TextChunk):
                said += chunk.text
                deltas -= 1
            elif isinstance(chunk, CursorChunk):
                cursor = chunk.cursor
                if not deltas:
                    break
    request.on_close.keep_running = False
    return cursor, said


def without_places(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if not isinstance(chunk, CursorChunk)]


def cancels(provider: FakeProvider) -> list[Record]:
    return [record for record in provider.requests if record.path.endswith("/cancel")]


@pytest.mark.parametrize("manner", ["", "fail=surrogates", "overlap=3", "overlap=100"])
async def test_from_every_place_the_rest_comes_exactly(model: ResponsesModel, manner: str) -> None:
    request = asking(f"{WHOLE} {manner}")
    chunks = await collect(model.stream(request))
    places = [at for at, chunk in enumerate(chunks) if isinstance(chunk, CursorChunk)]
    assert len(places) >= 14
    assert text_of(chunks) == TEXT
    for at in places:
        cursor = chunks[at]
        assert isinstance(cursor, CursorChunk)
        said = text_of(chunks[:at])
        assert await collect(model.reattach(request, cursor.cursor, said=said)) == chunks[at + 1 :]


async def test_from_every_event_the_rest_comes_exactly(
    provider: FakeProvider, http: httpx.AsyncClient, model: ResponsesModel
) -> None:
    chunks = await collect(model.stream(asking(WHOLE)))
    rest = without_places(chunks)
    body = (await http.get(f"{provider.url}/v1/responses/{provider.requests[0].response_id}?stream=true")).content
    events = [orjson.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    said = thought = ""
    for event in events:
        match event["type"]:
            case "response.output_text.delta":
                said += event["delta"]
            case "response.reasoning_summary_text.delta":
                thought += event["delta"]
            case "response.output_item.added" if event["item"]["type"] == "function_call":
                break
        place = Place(str(provider.requests[0].response_id), event["sequence_number"], len(said))
        found = await collect(model.reattach(asking(WHOLE), place.cursor, said=said))
        assert said + text_of(found) == TEXT
        assert thought + reasoning_of(found) == "thought 1 thought 2 "
        assert found[-4:] == rest[-4:]
    assert said == TEXT


async def test_an_answer_is_read_on_while_it_is_written(model: ResponsesModel, provider: FakeProvider) -> None:
    request = asking("deltas=30 seed=5 rate=100")
    whole = "".join(script(5, 30, 4))
    cursor, said = await left_at(model, request, 10)
    assert said == "".join(script(5, 30, 4)[:10])
    cursor_again, more = "", ""
    chunks = model.reattach(request, cursor, said=said)
    request.on_close.keep_running = True
    async for chunk in chunks:
        if isinstance(chunk, TextChunk):
            more += chunk.text
        elif isinstance(chunk, CursorChunk):
            cursor_again = chunk.cursor
            if len(said + more) > len(whole) / 2:
                break
    await chunks.aclose()
    rest = await collect(model.reattach(request, cursor_again, said=said + more))
    assert said + more + text_of(rest) == whole
    assert rest[-2:] == [UsageChunk(3, 1, 30), Finish(FinishReason.STOP)]
    assert len(provider.generations()) == 1
    assert not cancels(provider)


async def test_text_beyond_the_cursor_is_not_said_twice(model: ResponsesModel) -> None:
    request = asking(WHOLE)
    cursor, said = await left_at(model, request, 4)
    for more in range(len(TEXT) - len(said) + 1):
        known = TEXT[: len(said) + more]
        assert known + text_of(await collect(model.reattach(request, cursor, said=known))) == TEXT


async def test_text_that_was_lost_comes_again(model: ResponsesModel) -> None:
    request = asking(WHOLE)
    cursor, said = await left_at(model, request, 4)
    for known in (said[:-1], said[:3], ""):
        chunks = await collect(model.reattach(request, cursor, said=known))
        assert known + text_of(chunks) == TEXT


@pytest.mark.parametrize(
    "way", ["expired=400", "expired=404", "expired=410", "overlap=-1", "refail=500", "refail=html"]
)
async def test_where_the_stream_is_gone_the_whole_has_the_rest(model: ResponsesModel, way: str) -> None:
    request = asking(f"{WHOLE} {way}")
    cursor, said = await left_at(model, request, 4)
    assert await collect(model.reattach(request, cursor, said=said)) == [
        TextChunk(TEXT[len(said) :]),
        ToolCallChunk("call_2", "add", {"title": "é😀"}, '{"title":"é😀"}'),
        ToolCallChunk("call_3", "list", {}, "{}"),
        UsageChunk(6, 1, 12),
        Finish(FinishReason.TOOL_CALLS),
    ]


async def test_nothing_is_said_when_all_was_said(model: ResponsesModel) -> None:
    request = asking("deltas=12 seed=5 expired=400")
    cursor, said = await left_at(model, request, 12)
    chunks = await collect(model.reattach(request, cursor, said=said))
    assert said == TEXT
    assert chunks == [UsageChunk(3, 1, 12), Finish(FinishReason.STOP)]


async def test_the_whole_is_waited_for(model: ResponsesModel, provider: FakeProvider) -> None:
    request = asking("deltas=30 seed=5 rate=50 expired=400 poll_faults=1")
    cursor, said = await left_at(model, request, 3)
    chunks = await collect(model.reattach(request, cursor, said=said))
    assert said + text_of(chunks) == "".join(script(5, 30, 4))
    polls = [record for record in provider.requests if record.method == "GET" and "stream" not in record.path]
    assert len(polls) > 2
    assert not cancels(provider)


@pytest.mark.parametrize("way", ["other=1", "forget=1"])
async def test_a_rest_that_cannot_be_had_is_refused(model: ResponsesModel, provider: FakeProvider, way: str) -> None:
    request = asking(f"{WHOLE} expired=400 {way}")
    cursor, said = await left_at(model, request, 4)
    with pytest.raises(ReattachRefused):
        await collect(model.reattach(request, cursor, said=said))
    assert not cancels(provider)


async def test_text_that_the_answer_does_not_begin_with_is_refused(model: ResponsesModel) -> None:
    request = asking("deltas=12 seed=5")
    cursor, said = await left_at(model, request, 4)
    for known in (said + "not so", "not" + said[3:-1], TEXT + "more"):
        with pytest.raises(ReattachRefused):
            await collect(model.reattach(request, cursor, said=known))


async def test_text_that_differs_is_refused_without_waiting_for_the_end(
    model: ResponsesModel, provider: FakeProvider
) -> None:
    request = asking("deltas=900 rate=50")
    cursor, said = await left_at(model, request, 2)
    with pytest.raises(ReattachRefused):
        await collect(model.reattach(request, cursor, said=said + "not so"))
    assert [record.cancelled for record in provider.generations()] == [True]


@pytest.mark.parametrize("cursor", ["resp_unknown:3:0", "nonsense", "../../v1/models:1:1"])
async def test_a_cursor_that_leads_nowhere_is_refused(
    model: ResponsesModel, provider: FakeProvider, cursor: str
) -> None:
    with pytest.raises(ReattachRefused):
        await collect(model.reattach(asking("x"), cursor, said=""))
    assert not any(record.method == "POST" for record in provider.requests)


async def test_an_answer_that_was_stopped_meanwhile_is_no_whole_answer(
    model: ResponsesModel, http: httpx.AsyncClient, provider: FakeProvider
) -> None:
    request = asking("deltas=900 rate=100")
    cursor, said = await left_at(model, request, 2)
    await http.post(f"{provider.url}/v1/responses/{provider.requests[0].response_id}/cancel")
    with pytest.raises(ModelError) as caught:
        await collect(model.reattach(request, cursor, said=said))
    assert caught.value.code == "provider_unavailable"
    assert len(cancels(provider)) == 1


async def test_a_key_that_is_refused_is_told(
    model: ResponsesModel, http: httpx.AsyncClient, provider: FakeProvider
) -> None:
    request = asking("deltas=9 expired=401")
    cursor, said = await left_at(model, request, 2)
    with pytest.raises(ProviderAuthFailed):
        await collect(model.reattach(request, cursor, said=said))


@pytest.mark.parametrize("fault", ["die_at:4", "end_at:4", "garbage:4", "error_event_at:4", "end_at:0", "nothing"])
async def test_a_second_break_is_mended_from_the_whole(
    model: ResponsesModel, provider: FakeProvider, fault: str
) -> None:
    request = asking(f"deltas=12 seed=5 refail={fault}")
    cursor, said = await left_at(model, request, 3)
    chunks = await collect(model.reattach(request, cursor, said=said))
    assert said + text_of(chunks) == TEXT
    assert chunks[-1] == Finish(FinishReason.STOP)
    assert not cancels(provider)


async def test_a_break_that_cannot_be_mended_is_a_failure(model: ResponsesModel) -> None:
    request = asking("deltas=12 seed=5 refail=end_at:4 forget=1")
    cursor, said = await left_at(model, request, 3)
    with pytest.raises(ProviderUnavailable):
        await collect(model.reattach(request, cursor, said=said))
    with pytest.raises(ProviderUnavailable):
        await collect(model.stream(asking("deltas=12 seed=5 fail=end_at:4 expired=404 forget=1")))


@pytest.mark.parametrize(
    ("kept", "error", "code"),
    [
        ({"status": "failed", "error": {"code": "rate_limit_exceeded"}}, ModelError, "provider_rate_limited"),
        ({"status": "failed", "error": None}, ReattachRefused, "provider_unavailable"),
        ({"status": "cancelled"}, ReattachRefused, "provider_unavailable"),
        ({"status": "invented"}, ReattachRefused, "provider_unavailable"),
        ({"status": "completed"}, BadOutput, "bad_output"),
        ({"status": 1}, BadOutput, "bad_output"),
        ([], BadOutput, "bad_output"),
    ],
)
async def test_an_object_that_is_no_answer(
    model: ResponsesModel, monkeypatch: pytest.MonkeyPatch, *, kept: object, error: type[ModelError], code: str
) -> None:
    async def call_json(*_: object, **__: object) -> object:
        return kept

    request = asking("deltas=12 expired=400")
    cursor, said = await left_at(model, request, 4)
    monkeypatch.setattr("parley.llm.adapters.responses.call_json", call_json)
    with pytest.raises(error) as caught:
        await collect(model.reattach(request, cursor, said=said))
    assert caught.value.code == code


async def test_an_object_that_cannot_be_had_is_asked_for_a_few_times(
    model: ResponsesModel, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.llm.adapters.responses._POLL_S", 0.001)
    request = asking("deltas=12 expired=400 poll_faults=100")
    cursor, said = await left_at(model, request, 4)
    with pytest.raises(ProviderUnavailable):
        await collect(model.reattach(request, cursor, said=said))
    polls = [record for record in provider.requests if record.method == "GET" and "stream" not in record.path]
    assert len(polls) == 6


# --- what becomes of the answer when its reader goes


async def test_leaving_stops_the_answer(model: ResponsesModel, provider: FakeProvider) -> None:
    request = asking("deltas=900 rate=100")
    async with aclosing(model.stream(request)) as chunks:
        async for chunk in chunks:
            if isinstance(chunk, TextChunk):
                break
    assert [record.cancelled for record in provider.generations()] == [True]
    assert len(cancels(provider)) == 1


async def test_leaving_a_reading_that_was_taken_up_stops_the_answer(
    model: ResponsesModel, provider: FakeProvider
) -> None:
    request = asking("deltas=900 rate=100")
    cursor, said = await left_at(model, request, 2)
    assert [record.cancelled for record in provider.generations()] == [False]
    async with aclosing(model.reattach(request, cursor, said=said)) as chunks:
        await anext(chunks)
    assert [record.cancelled for record in provider.generations()] == [True]


@pytest.mark.parametrize("keep", [True, False])
async def test_a_cancelled_reader_stops_the_answer_unless_it_is_kept(
    model: ResponsesModel, provider: FakeProvider, *, keep: bool
) -> None:
    request = asking("deltas=900 rate=100")
    shown = asyncio.Event()

    async def read() -> None:
        async for chunk in model.stream(request):
            if isinstance(chunk, CursorChunk):
                shown.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(shown.wait(), 5)
    request.on_close.keep_running = keep
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.ended(provider.requests[0], 2)
    assert [record.cancelled for record in provider.generations()] == [not keep]


@pytest.mark.parametrize("keep", [True, False])
async def test_an_answer_that_nobody_could_read_on_is_stopped(
    model: ResponsesModel, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, *, keep: bool
) -> None:
    begun, on_created = asyncio.Event(), ResponseParser._on_created

    def on_created_too(parser: ResponseParser, payload: dict[str, Any]) -> Iterable[Chunk]:
        begun.set()
        return on_created(parser, payload)

    monkeypatch.setattr(ResponseParser, "_on_created", on_created_too)
    # Before the first word: all that is known is that the answer has begun.
    request = asking("deltas=900 rate=100 ttft=30")
    task = asyncio.create_task(collect(model.stream(request)))
    await asyncio.wait_for(begun.wait(), 5)
    request.on_close.keep_running = keep
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.ended(provider.requests[0], 2)
    assert [record.cancelled for record in provider.generations()] == [True]


async def test_an_answer_that_has_ended_is_not_stopped(model: ResponsesModel, provider: FakeProvider) -> None:
    request = asking("deltas=5")
    cursor, said = await left_at(model, request, 2)
    await collect(model.stream(request))
    await collect(model.reattach(request, cursor, said=said))
    assert not cancels(provider)


@pytest.mark.parametrize("fault", ["garbage:3", "huge_line:3", "error_event_at:3"])
async def test_an_answer_that_cannot_be_read_is_stopped(
    model: ResponsesModel, provider: FakeProvider, fault: str
) -> None:
    with pytest.raises(ModelError):
        await collect(model.stream(asking(f"deltas=900 rate=200 fail={fault}")))
    assert [record.cancelled for record in provider.generations()] == [True]


@pytest.mark.parametrize("way", ["fail=stall_at:3", "rate=5"])
async def test_an_answer_that_takes_too_long_is_stopped(
    provider: FakeProvider, http: httpx.AsyncClient, way: str
) -> None:
    limits = {"idle": 0.4, "total": 1.0}
    model = ResponsesModel(entry_for("openai_responses", provider, timeouts=limits), http)
    with pytest.raises(ModelError) as caught:
        await collect(model.stream(asking(f"deltas=900 rate=20 {way}")))
    assert caught.value.code == "provider_timeout"
    assert [record.cancelled for record in provider.generations()] == [True]


async def test_the_whole_is_not_waited_for_longer_than_a_call_may_take(
    provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    model = ResponsesModel(entry_for("openai_responses", provider, timeouts={"total": 0.6}), http)
    request = asking("deltas=900 rate=50 expired=400")
    cursor, said = await left_at(model, request, 2)
    began_at = time.monotonic()
    with pytest.raises(ReattachRefused):
        await collect(model.reattach(request, cursor, said=said))
    assert time.monotonic() - began_at < 3
    # Nobody will ask for it any more.
    assert [record.cancelled for record in provider.generations()] == [True]


async def test_a_provider_that_does_not_listen_holds_nobody_up(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.llm.adapters.responses.CANCEL_TIMEOUT_S", 0.1)
    async with FakeProvider() as provider:
        model = ResponsesModel(entry_for("openai_responses", provider), http)
        chunks = model.stream(asking("deltas=900 rate=100 deaf=1"))
        async for chunk in chunks:
            if isinstance(chunk, CursorChunk):
                break
        began_at = time.monotonic()
        await chunks.aclose()
        assert time.monotonic() - began_at < 1.5
        assert not provider.generations()[0].cancelled


async def test_reasoning_is_not_taken_from_the_whole(model: ResponsesModel) -> None:
    request = asking("deltas=12 seed=5 reasoning=3 expired=410")
    request.on_close.keep_running = True
    chunks = model.stream(request)
    cursor = ""
    async for chunk in chunks:
        if isinstance(chunk, CursorChunk):
            cursor = chunk.cursor
            break
        assert isinstance(chunk, ReasoningChunk)
    await chunks.aclose()
    rest = await collect(model.reattach(request, cursor, said=""))
    assert (text_of(rest), reasoning_of(rest)) == (TEXT, "")
