"""What every adapter makes of what no provider should send: the right chunks or one of our errors, and a closed line."""

import asyncio
import gzip
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.llm.adapters.gathering import MAX_ARGUMENT_CHARS
from parley.llm.errors import BadOutput, ModelError, ProviderUnavailable
from parley.llm.factory import build_model
from parley.llm.ports import Chunk, CursorChunk, Finish, FinishReason, TextChunk, ToolCallChunk, UsageChunk
from parley.llm.sse import MAX_EVENT_BYTES, EventSplitter
from tests.llm.adapters.raw_server import EVENTS, RawServer
from tests.llm.adapters.table import SUBJECTS, Subject, merged, read
from tests.llm.adapters.test_conformance import answer, normal
from tests.llm.adapters.voices import Event, Voice
from tests.llm.calls import asking, text_of

GOOD = [TextChunk("hello é😀"), Finish(FinishReason.STOP)]
BLOCK = b"x" * 65_536


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with RawServer() as server:
        yield server


def plain(voice: Voice) -> list[Event]:
    return [*voice.opening(), *voice.text("hello "), *voice.text("é😀"), *voice.ending("stop")]


def shown(chunks: Iterable[object]) -> list[Chunk]:
    return [chunk for chunk in merged(list(chunks)) if not isinstance(chunk, UsageChunk)]


Reply = Callable[[Voice], Iterable[bytes]]


def with_lines(end: bytes) -> Reply:
    return lambda voice: [b"".join(plain(voice)).replace(b"\n", end)]


def lines_of_all_kinds(voice: Voice) -> list[bytes]:
    ends = [[b"\n"], [b"\r\n"], [b"\r", b"\n"]]
    lines = b"".join(plain(voice)).split(b"\n")
    return [piece for index, line in enumerate(lines) for piece in (line, *ends[index % 3])]


def in_several_lines(voice: Voice) -> list[bytes]:
    # A line end between two data fields is white space of the JSON.
    return [
        event.replace(b'"type":', b'\ndata:"type":', 1).replace(b'"id":', b'\ndata: "id":', 1) for event in plain(voice)
    ]


def among(*noise: bytes) -> Reply:
    return lambda voice: [piece for event in plain(voice) for piece in (*noise, event)]


def halves(voice: Voice) -> list[bytes]:
    """Say an emoji in two halves, as escapes, each in an event of its own, and a half that stays alone."""
    pieces = [*voice.text("hello é"), *voice.text("", raw="\\ud83d"), *voice.text("", raw="\\ude00")]
    return [*voice.opening(), *pieces, *voice.ending("stop")]


def without_last(voice: Voice) -> list[bytes]:
    events = plain(voice)
    return events[: len(events) - len(voice.last())]


RIGHT: dict[str, Reply] = {
    "each byte alone": lambda voice: [bytes([byte]) for byte in b"".join(plain(voice))],
    "all at once": lambda voice: [b"".join(plain(voice))],
    "CRLF": with_lines(b"\r\n"),
    "CR": with_lines(b"\r"),
    "mixed line ends": lines_of_all_kinds,
    "a byte order mark": lambda voice: [b"\xef", b"\xbb", b"\xbf", *plain(voice)],
    "comments": among(b": keep-alive\n\n", b":\n", b": OPENROUTER PROCESSING\n\n"),
    "fields that nobody reads": among(b"id: 1\nretry: 10\nfoo: bar\nfoo\n"),
    "empty lines and empty data": among(b"\n\n", b"data:\n\n", b"data: \n\n", b"data\n\n"),
    "data in several lines": in_several_lines,
    "no last event": without_last,
    "no blank line at the end": lambda voice: [b"".join(plain(voice))[:-1]],
    "halves of a character": halves,
    "events of unknown types": among(b'event: invented\ndata: {"type":"invented","object":"invented"}\n\n'),
    "events of no type": among(b'data: {"sequence_number":null}\n\n'),
    "NULs between events": among(b"\x00\x00\n\n"),
}


@pytest.mark.parametrize("case", RIGHT)
async def test_odd_but_whole(subject: Subject, server: RawServer, http: httpx.AsyncClient, case: str) -> None:
    server.answer(RIGHT[case](subject.voice()))
    chunks = [chunk async for chunk in build_model(subject.entry(server.url), http).stream(asking("x"))]
    assert shown(chunks) == GOOD


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a\\u0000b", "ab"),
        ("a\\ud83d", "a\ufffd"),
        ("\\ude00a", "\ufffda"),
        ("\\ud83d\\ud83d\\ude00", "\ufffd😀"),
        ("\\u0000", ""),
    ],
)
async def test_text_that_cannot_be_stored_is_made_storable(
    subject: Subject, server: RawServer, http: httpx.AsyncClient, raw: str, text: str
) -> None:
    voice = subject.voice()
    server.answer([*voice.opening(), *voice.text("", raw=raw), *voice.ending("stop")])
    chunks = [chunk async for chunk in build_model(subject.entry(server.url), http).stream(asking("x"))]
    assert text_of(chunks) == text
    assert all(chunk.text for chunk in chunks if isinstance(chunk, TextChunk))


def endless_line(_: Voice) -> Iterator[bytes]:
    yield b"data: "
    for _block in range(1024**3 // len(BLOCK)):
        yield BLOCK


def endless_event(_: Voice) -> Iterator[bytes]:
    for _block in range(1024**3 // len(BLOCK)):
        yield b"data: " + BLOCK + b"\n"


def endless_arguments(voice: Voice) -> list[bytes]:
    return [*voice.opening(), *voice.calls([("c", "f", ["y" * 100_000] * (1 + MAX_ARGUMENT_CHARS // 100_000))])]


def many_calls(voice: Voice) -> list[bytes]:
    return [*voice.opening(), *voice.calls([(f"c{n}", f"f{n}", ["{}"]) for n in range(500)])]


def deep(voice: Voice) -> list[bytes]:
    return [*voice.opening(), b'data: {"type":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n"]


def deep_with_an_escape(voice: Voice) -> list[bytes]:
    return [*voice.opening(), b'data: {"\\ud83d":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n"]


def after_text(*events: bytes) -> Reply:
    return lambda voice: [*voice.opening(), *voice.text("hello"), *events]


WRONG: dict[str, tuple[Reply, type[ModelError]]] = {
    "a line of 1 GB": (endless_line, BadOutput),
    "an event of 1 GB": (endless_event, BadOutput),
    "endless arguments": (endless_arguments, BadOutput),
    "too many calls": (many_calls, BadOutput),
    "garbage": (after_text(b"data: {nonsense\n\n"), BadOutput),
    "not an object": (after_text(b"data: [1]\n\n"), BadOutput),
    "not UTF-8": (after_text(b'data: {"type":"\xff\xfe"}\n\n'), BadOutput),
    "a raw NUL": (after_text(b'data: {"type":"\x00"}\n\n'), BadOutput),
    "deep JSON": (deep, BadOutput),
    "deep JSON with an escape": (deep_with_an_escape, BadOutput),
    "an error in the middle": (
        lambda voice: [*voice.opening(), *voice.text("hello"), *voice.error()],
        ProviderUnavailable,
    ),
    "HTML as a stream": (lambda _: [b"<html>\n<body>\n\n503\n</body></html>\n"], ProviderUnavailable),
    "nothing": (lambda _: [], ProviderUnavailable),
    "an end in the middle": (after_text(), ProviderUnavailable),
    "an end in half an event": (after_text(b'data: {"type":'), ProviderUnavailable),
}


@pytest.mark.parametrize("case", WRONG)
async def test_wrong_is_one_of_our_errors_and_the_connection_is_closed(
    subject: Subject, server: RawServer, http: httpx.AsyncClient, case: str
) -> None:
    reply, error = WRONG[case]
    is_cut = error is BadOutput or case == "an error in the middle"
    server.answer(reply(subject.voice()), ends=not is_cut)
    # A broken stream of the background is read on, and here is nobody to read on from.
    ends = case.startswith("an end")
    entry = subject.entry(server.url, background=False) if ends else subject.entry(server.url)
    with pytest.raises(ModelError) as caught:
        async for _ in build_model(entry, http).stream(asking("x")):
            pass
    assert type(caught.value) is error
    assert "secret" not in str(caught.value)
    first = server.asked[0]
    if is_cut:
        await asyncio.wait_for(first.closed.wait(), 20)
        assert first.sent < 16 * MAX_EVENT_BYTES


@pytest.mark.parametrize("reply", [endless_line, endless_event])
def test_a_line_of_1_gb_is_never_held(reply: Reply) -> None:
    splitter = EventSplitter()
    taken = 0
    pieces = reply(SUBJECTS["openai"].voice())
    tracemalloc.start()
    try:
        with pytest.raises(BadOutput):
            for piece in pieces:
                splitter.feed(piece)
                taken += len(piece)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= MAX_EVENT_BYTES + len(BLOCK)
    assert peak < 4 * MAX_EVENT_BYTES


@pytest.mark.parametrize(
    ("pieces", "kind", "headers", "status", "code"),
    [
        ([b"<html>a proxy speaks</html>"], "text/html; charset=utf-8", {}, 200, "bad_output"),
        ([b'{"error":{"message":"secret"}}'], "application/json", {}, 200, "provider_unavailable"),
        ([b'{"error":{"code":"content_filter"}}'], "application/json", {}, 200, "content_filtered"),
        ([b'{"choices":[]}'], "application/json", {}, 200, "bad_output"),
        ([gzip.compress(b"data: {}\n\n")], EVENTS, {"content-encoding": "gzip"}, 200, "bad_output"),
        ([b"data: {}\n\n"], EVENTS, {"content-encoding": "br"}, 200, "bad_output"),
        ([gzip.compress(bytes(200_000_000), 1)], "application/json", {"content-encoding": "gzip"}, 500,
         "provider_unavailable"),
        ([b"\xff\xfe"], "application/json", {}, 429, "provider_rate_limited"),
        ([b'[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"secret"}}]'], "application/json", {}, 400,
         "provider_rate_limited"),
        ([b'{"object":"error","message":"This model\'s maximum context length is 9","code":400}'], "application/json", {},
         400, "context_too_long"),
        ([b'{"error":"prompt is too long"}'], "application/json", {}, 400, "context_too_long"),
        ([b'{"error":{"type":"overloaded_error"}}'], "application/json", {}, 529, "provider_unavailable"),
        (iter([BLOCK] * 16_384), "application/json", {}, 503, "provider_unavailable"),
    ],
)  # fmt: skip
async def test_answers_that_are_no_stream(
    *, subject: Subject, server: RawServer, http: httpx.AsyncClient, pieces: Iterable[bytes], kind: str,
    headers: dict[str, str], status: int, code: str,
) -> None:  # fmt: skip
    server.answer(pieces, kind=kind, headers=headers, status=status)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            async for _ in build_model(subject.entry(server.url), http).stream(asking("x")):
                pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == code
    assert "secret" not in str(caught.value)
    assert peak < 64 * MAX_EVENT_BYTES
    assert server.asked[0].headers["accept-encoding"] == "identity"


def written(subject: Subject, given_tokens: Any, cached: Any, made: Any) -> dict[str, Any]:
    """Write counts of any type, as each dialect calls them."""
    match subject.kind:
        case "anthropic":
            return {"input_tokens": given_tokens, "cache_read_input_tokens": cached, "output_tokens": made}
        case "openai_responses":
            details = {"cached_tokens": cached}
            return {"input_tokens": given_tokens, "input_tokens_details": details, "output_tokens": made}
        case _:
            return {"prompt_tokens": given_tokens, "cached_tokens": cached, "completion_tokens": made}


@pytest.mark.parametrize(
    ("counts", "read_as"),
    [
        (("1000", "600", "50"), (1000, 600, 50)),
        ((1000.0, 600.0, 50.0), (1000, 600, 50)),
        ((-5, -5, -5), (0, 0, 0)),
        ((None, None, None), (0, 0, 0)),
        ((True, [], {}), (0, 0, 0)),
        ((1e300, 2**63, "9" * 4000), (0, 0, 0)),
        (("-1", "1.5", "x"), (0, 0, 0)),
    ],
)
def test_counts_that_are_none_count_as_nothing(
    subject: Subject, counts: tuple[Any, Any, Any], read_as: tuple[int, int, int]
) -> None:
    voice = subject.voice()
    ending = voice.ending("stop", usage=written(subject, *counts))
    chunks = read(subject.parser(), [*voice.opening(), *voice.text("a"), *ending])
    found = next(chunk for chunk in reversed(chunks) if isinstance(chunk, UsageChunk))
    fresh, cached, made = read_as
    if subject.kind == "anthropic":
        # It counts cached input apart, and has counted one token of each at the start.
        fresh, made = (1 if counts[0] is None else fresh + cached), made or 1
    assert found == UsageChunk(fresh, cached, made)


@pytest.mark.parametrize("usage", [[], "many", 7, {"prompt_tokens_details": 3, "input_tokens_details": []}, True])
def test_a_count_of_another_shape_is_no_count_or_bad_output(subject: Subject, usage: Any) -> None:
    voice = subject.voice()
    try:
        chunks = read(subject.parser(), [*voice.opening(), *voice.text("a"), *voice.ending("stop", usage=usage)])
    except BadOutput:
        return
    assert chunks[-1] == Finish(FinishReason.STOP)


def test_each_event_twice_is_still_one_answer(subject: Subject) -> None:
    voice = subject.voice()
    events = [event for event in plain(voice) for _ in range(2)]
    chunks = read(subject.parser(), events)
    assert chunks[-1] == Finish(FinishReason.STOP)
    assert sum(isinstance(chunk, Finish) for chunk in chunks) == 1
    # Only where events are numbered can it be known that a piece of text is no new one.
    assert text_of(chunks) == ("hello é😀" if subject.kind == "openai_responses" else "hello hello é😀é😀")


def test_calls_that_begin_and_end_twice_are_one(subject: Subject) -> None:
    voice = subject.voice()
    opening, events = voice.opening(), voice.calls([("call_1", "f", ["{}"])])
    twice = [event for event in events for _ in range(1 if b"partial_json" in event else 2)]
    if subject.kind == "openai":
        twice = [*events[:1], *events]
    chunks = read(subject.parser(), [*opening, *twice, *voice.ending("tool_calls")])
    calls = [chunk for chunk in chunks if isinstance(chunk, ToolCallChunk)]
    if voice.interleaves or subject.kind != "openai":
        assert [(call.call_id, call.name, call.raw) for call in calls] == [("call_1", "f", "{}")]
    else:
        # A whole call that comes twice cannot be told from more of the same or from another one.
        assert {call.name for call in calls} == {"f"}


@pytest.mark.parametrize(("name", "start", "again_at"), [("anthropic", 1, 4), ("responses", 0, 2)])
def test_a_call_that_begins_anew_in_its_middle_keeps_what_it_has(name: str, start: int, again_at: int) -> None:
    subject = SUBJECTS[name]
    voice = subject.voice()
    opening, events = voice.opening(), voice.calls([("call_1", "f", ["{", "}"])])
    events.insert(again_at, events[start])
    chunks = read(subject.parser(), [*opening, *events, *voice.ending("tool_calls")])
    calls = [chunk for chunk in chunks if isinstance(chunk, ToolCallChunk)]
    assert [(call.call_id, call.raw) for call in calls] == [("call_1", "{}")]


def test_100_000_tiny_events(subject: Subject) -> None:
    voice = subject.voice()
    event = b"".join(voice.text("é"))
    ended = b"".join(voice.ending("stop"))
    pieces = [*voice.opening(), *([event] * 100_000), ended]
    if subject.kind == "openai_responses":
        pieces = [*voice.opening(), *(b"".join(voice.text("é")) for _ in range(100_000)), *voice.ending("stop")]
    chunks = read(subject.parser(), pieces)
    assert sum(len(chunk.text) for chunk in chunks if isinstance(chunk, TextChunk)) == 100_000
    assert chunks[-1] == Finish(FinishReason.STOP)


# --- anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "text", "\x00", "error", "stop", "function_call", "tool_use", "text_delta", "thinking"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "id", "error"]), inner),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(event: bytes, data: st.DataObject) -> bytes:
    """Put another value in one place of an event."""
    head, mark, rest = event.partition(b"data: ")
    try:
        payload = orjson.loads(rest)
    except orjson.JSONDecodeError:
        return event
    path = data.draw(st.sampled_from(list(places(payload))))
    target = payload
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = data.draw(JSON)
    try:
        return head + mark + orjson.dumps(payload) + b"\n\n"
    except TypeError:  # a number beyond 64 bits
        return event


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_an_event_holds_it_is_chunks_or_one_of_our_errors(data: st.DataObject) -> None:
    subject = SUBJECTS[data.draw(st.sampled_from(sorted(SUBJECTS)))]
    events, _ = answer(subject)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(events) - 1))
        events[at] = changed(events[at], data)
    parser = subject.parser()
    try:
        for event in EventSplitter().feed(b"".join(events)):
            for chunk in parser.feed(event):
                assert_whole(chunk)
        for chunk in parser.end():
            assert_whole(chunk)
    except ModelError:
        return


def assert_whole(chunk: Chunk) -> None:
    """Check that a chunk can be stored and sent."""
    if isinstance(chunk, TextChunk):
        assert chunk.text
        orjson.dumps(chunk.text)
        assert "\x00" not in chunk.text
    elif isinstance(chunk, ToolCallChunk):
        assert chunk.call_id
        orjson.dumps([chunk.call_id, chunk.name, chunk.arguments, chunk.raw])
        assert "\x00" not in chunk.call_id + chunk.name + chunk.raw
    elif isinstance(chunk, CursorChunk):
        assert len(chunk.cursor) <= 300
    elif isinstance(chunk, UsageChunk):
        counts = (chunk.input_tokens, chunk.cached_tokens, chunk.output_tokens, chunk.cache_written_tokens)
        assert all(type(count) is int and count >= 0 for count in counts)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(sorted(SUBJECTS)))
def test_any_bytes_at_all(noise: bytes, name: str) -> None:
    parser = SUBJECTS[name].parser()
    try:
        for event in EventSplitter().feed(b"data: " + noise + b"\n\n" + noise + b"\n\n"):
            list(parser.feed(event))
        list(parser.end())
    except ModelError:
        return


def test_the_whole_answer_is_read_the_same_way_here_as_over_a_connection(subject: Subject) -> None:
    events, expected = answer(subject)
    assert normal(merged(read(subject.parser(), events), ids=subject.voice().has_ids)) == expected
