import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.llm.adapters.responses import ResponsesModel
from parley.llm.adapters.responses_events import Place, ResponseParser, WholeResponse
from parley.llm.errors import BadOutput, ModelError, ReattachRefused
from parley.llm.ports import (
    Chunk,
    CursorChunk,
    Finish,
    FinishReason,
    ModelMessage,
    ModelRequest,
    ReasoningChunk,
    Reattachable,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    UsageChunk,
)
from tests.llm.calls import asking, collect, entry_for

HISTORY = ModelRequest(
    (
        ModelMessage("system", (TextPart("Be brief."),)),
        ModelMessage("system", (TextPart(""),)),
        ModelMessage("system", (TextPart("Be kind."),)),
        ModelMessage("user", (TextPart("one"), TextPart("two"))),
        ModelMessage(
            "assistant",
            (TextPart("Looking."), ToolCallPart("c1", "list", {"all": True}), ToolCallPart("c2", "add", {"t": "é"})),
        ),
        ModelMessage("tool", (ToolResultPart("c1", "list", "[]"), ToolResultPart("c2", "add", "no", failed=True))),
        ModelMessage("assistant", (TextPart(""),)),
        ModelMessage("user", (TextPart("deltas=1"),)),
    ),
    tools=(ToolSpec("add", "Adds.", {"type": "object", "properties": {}}),),
)


async def test_the_history_in_this_dialect(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = ResponsesModel(entry_for("openai_responses", provider), http)
    assert isinstance(model, Reattachable)
    await collect(model.stream(HISTORY))
    record = provider.requests[-1]
    assert record.path == "/v1/responses"
    assert record.headers["authorization"] == "Bearer test-key"
    assert record.body == {
        "model": "fake-model",
        "background": True,
        "stream": True,
        "store": True,
        "max_output_tokens": 4096,
        "instructions": "Be brief.\n\nBe kind.",
        "input": [
            {"role": "user", "content": "one\n\ntwo"},
            {"role": "assistant", "content": "Looking."},
            {"type": "function_call", "call_id": "c1", "name": "list", "arguments": '{"all":true}'},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"t":"é"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "[]"},
            {"type": "function_call_output", "call_id": "c2", "output": "no"},
            {"role": "user", "content": "deltas=1"},
        ],
        "tools": [
            {
                "type": "function",
                "name": "add",
                "description": "Adds.",
                "parameters": {"type": "object", "properties": {}},
                "strict": False,
            }
        ],
    }


async def test_no_parameter_takes_away_what_makes_an_answer_last(
    provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    parameters = {"background": False, "store": None, "stream": False, "max_output_tokens": 7, "reasoning": {"x": 1}}
    model = ResponsesModel(entry_for("openai_responses", provider, api_key=None, parameters=parameters), http)
    await collect(model.stream(asking("deltas=1")))
    record = provider.requests[-1]
    assert "authorization" not in record.headers
    body = {name: record.body[name] for name in ("background", "store", "stream", "max_output_tokens", "reasoning")}
    assert body == {
        "background": True,
        "store": True,
        "stream": True,
        "max_output_tokens": 7,
        "reasoning": {"x": 1},
    }


CREATED = b'{"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1"}}'
DONE = b'{"type": "response.completed", "sequence_number": 99, "response": {"status": "completed"}}'


def parse(*payloads: bytes, parser: ResponseParser | None = None) -> list[Chunk]:
    parser = parser or ResponseParser()
    chunks = [chunk for payload in payloads for chunk in parser.feed((b"", payload))]
    assert parser.finished
    return [*chunks, *parser.end()]


def delta(number: int, text: str, kind: str = "response.output_text.delta") -> bytes:
    return f'{{"type": "{kind}", "sequence_number": {number}, "delta": "{text}"}}'.encode()


def call(number: int, kind: str, fields: str) -> bytes:
    return f'{{"type": "response.{kind}", "sequence_number": {number}, "output_index": 1, {fields}}}'.encode()


ITEM = '"item": {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}'


def test_each_visible_chunk_is_followed_by_its_place() -> None:
    reasoning = "response.reasoning_summary_text.delta"
    assert parse(
        CREATED, delta(3, "why", reasoning), delta(4, "é"), delta(5, ""), delta(7, "no", "response.refusal.delta"), DONE
    ) == [
        ReasoningChunk("why"),
        CursorChunk("resp_1:3:0"),
        TextChunk("é"),
        CursorChunk("resp_1:4:1"),
        TextChunk("no"),
        CursorChunk("resp_1:7:3"),
        Finish(FinishReason.STOP),
    ]


def test_parts_of_a_summary_stand_apart() -> None:
    part = '{{"type": "response.reasoning_summary_part.added", "sequence_number": {0}, "summary_index": {0}}}'
    texts = [
        (part.format(number).encode(), delta(number + 10, "x", "response.reasoning_text.delta")) for number in (0, 1)
    ]
    chunks = parse(CREATED, *(payload for pair in texts for payload in pair), DONE)
    assert [chunk.text for chunk in chunks if isinstance(chunk, ReasoningChunk)] == ["x", "\n\n", "x"]


def test_there_is_no_place_inside_a_character() -> None:
    chunks = parse(CREATED, delta(1, r"a\ud83d"), delta(2, r"\ude00b"), DONE)
    assert chunks == [TextChunk("a"), TextChunk("😀b"), CursorChunk("resp_1:2:3"), Finish(FinishReason.STOP)]


def test_there_is_no_place_behind_a_tool_call() -> None:
    chunks = parse(
        CREATED,
        delta(1, "a"),
        call(2, "output_item.added", ITEM),
        call(3, "function_call_arguments.delta", r'"delta": "{\"x\":"'),
        delta(4, "b"),
        call(5, "function_call_arguments.delta", '"delta": "1}"'),
        call(6, "output_item.done", ITEM),
        delta(7, "c"),
        DONE,
    )
    assert chunks == [
        TextChunk("a"),
        CursorChunk("resp_1:1:1"),
        TextChunk("b"),
        ToolCallChunk("c", "f", {"x": 1}, '{"x":1}'),
        TextChunk("c"),
        Finish(FinishReason.TOOL_CALLS),
    ]


@pytest.mark.parametrize(
    ("ending", "chunk"),
    [
        (call(3, "function_call_arguments.done", '"arguments": "{}"'), ToolCallChunk("c", "f", {}, "{}")),
        (call(3, "output_item.done", ITEM.replace('""', '"[]"')), ToolCallChunk("c", "f", None, "[]")),
        (call(3, "function_call_arguments.delta", r'"delta": "{\"x"'), ToolCallChunk("c", "f", None, '{"x')),
    ],
)
def test_arguments_are_taken_where_they_stand(ending: bytes, chunk: Chunk) -> None:
    assert parse(CREATED, call(2, "output_item.added", ITEM), ending, DONE)[0] == chunk


@pytest.mark.parametrize("number", ['"x"', "null", "-1", "0", "1.5"])
def test_without_numbers_that_rise_there_are_no_places_and_nothing_is_lost(number: str) -> None:
    payload = f'{{"type": "response.output_text.delta", "sequence_number": {number}, "delta": "a"}}'.encode()
    assert parse(CREATED, payload, payload, DONE) == [TextChunk("a"), TextChunk("a"), Finish(FinishReason.STOP)]


@pytest.mark.parametrize("name", ['"../../models"', '"a:b"', '""', '"resp_é"', '"' + "x" * 201 + '"'])
def test_an_id_that_could_lead_elsewhere_is_not_used(name: str) -> None:
    parser = ResponseParser()
    created = f'{{"type": "response.created", "response": {{"id": {name}}}}}'.encode()
    assert parse(created, delta(1, "a"), DONE, parser=parser) == [TextChunk("a"), Finish(FinishReason.STOP)]
    assert not parser.response_id


@pytest.mark.parametrize(
    ("payload", "finish"),
    [
        (b'{"type": "response.completed", "response": {}}', FinishReason.STOP),
        (
            b'{"type": "response.incomplete", "response": {"incomplete_details": {"reason": "max_output_tokens"}}}',
            FinishReason.LENGTH,
        ),
        (
            b'{"type": "response.incomplete", "response": {"incomplete_details": {"reason": "content_filter"}}}',
            FinishReason.CONTENT_FILTER,
        ),
        (b'{"type": "response.incomplete", "response": {"incomplete_details": null}}', FinishReason.LENGTH),
    ],
)
def test_reasons(payload: bytes, finish: FinishReason) -> None:
    assert parse(payload) == [Finish(finish)]


def test_usage_holds_the_cached_tokens() -> None:
    usage = b'{"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 5, "total_tokens": 14}'
    assert parse(b'{"type": "response.completed", "response": {"usage": %b}}' % usage)[0] == UsageChunk(9, 4, 5)


def test_events_that_are_not_known_are_passed_over() -> None:
    known = delta(4, "hi")
    assert parse(
        b'{"type": "response.invented", "delta": 1}',
        b'{"type": "response.output_item.added", "item": {"type": "web_search_call"}, "output_index": 0}',
        b'{"type": "response.output_item.done", "item": {"type": "web_search_call"}, "output_index": 0}',
        known,
        DONE,
        b"[DONE]",
    ) == [TextChunk("hi"), Finish(FinishReason.STOP)]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"type": "error", "code": "rate_limit_exceeded", "message": "secret"}', "provider_rate_limited"),
        (b'{"type": "error", "error": {"code": "server_error", "message": "secret"}}', "provider_unavailable"),
        (b'{"type": "response.failed", "response": {"error": {"code": "server_error"}}}', "provider_unavailable"),
        (b'{"type": "response.failed", "response": {"error": {"code": "invalid_prompt"}}}', "content_filtered"),
        (b'{"type": "response.failed", "response": {"error": null}}', "provider_unavailable"),
        (b'{"type": "response.cancelled", "response": {"status": "cancelled"}}', "provider_unavailable"),
    ],
)
def test_failures(payload: bytes, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(payload)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b"nonsense",
        b'{"type": []}',
        b'{"type": "response.created"}',
        b'{"type": "response.created", "response": {"id": 7}}',
        b'{"type": "response.output_text.delta"}',
        b'{"type": "response.output_text.delta", "delta": 1}',
        b'{"type": "response.output_text.delta", "delta": null}',
        b'{"type": "response.completed"}',
        b'{"type": "response.failed", "response": 1}',
        b'{"type": "response.output_item.added", "item": null}',
        b'{"type": "response.output_item.added", "item": {"type": "function_call"}, "output_index": []}',
        b'{"type": "response.function_call_arguments.delta", "output_index": 3, "delta": "x"}',
    ],
)
def test_other_shapes_are_bad_output(payload: bytes) -> None:
    with pytest.raises(BadOutput):
        parse(payload)


def test_endless_arguments_and_calls_are_bad_output() -> None:
    fields = f'"delta": "{"x" * 100_000}"'
    pieces = (call(number, "function_call_arguments.delta", fields) for number in range(3, 15))
    with pytest.raises(BadOutput):
        parse(call(2, "output_item.added", ITEM), *pieces)
    items = (call(n, "output_item.added", ITEM.replace('"c"', f'"c{n}"')) for n in range(2, 202))
    with pytest.raises(BadOutput):
        parse(*items)


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"status": "completed"},
        {"status": "completed", "output": None},
        {"status": "completed", "output": [{"type": "message"}]},
        {"status": "completed", "output": [{"type": "message", "content": [1]}]},
        {"status": "completed", "output": [{"type": "message", "content": [{"text": 1}]}]},
        {"status": "completed", "output": [{"type": "function_call", "arguments": 1}]},
        {"status": "completed", "output": [{"type": "function_call"}] * 200},
    ],
)
def test_other_shapes_of_the_whole_are_bad_output(response: dict[str, object]) -> None:
    with pytest.raises(BadOutput):
        WholeResponse.read(response)


def test_the_whole_is_read_as_the_stream_is() -> None:
    whole = WholeResponse.read(
        {
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [
                {"type": "reasoning", "summary": [{"text": "why"}]},
                {"type": "message", "content": [{"type": "output_text", "text": "a\x00b"}]},
                {"type": "message", "content": [{"type": "refusal", "refusal": "c"}, {"type": "invented"}]},
            ],
            "usage": {"input_tokens": 1, "output_tokens": 2},
        }
    )
    assert whole == WholeResponse("abc", (), UsageChunk(1, 0, 2), Finish(FinishReason.LENGTH))


@pytest.mark.parametrize(
    "cursor", ["", "resp_1", "resp_1:2", "resp_1:2:x", "../x:1:1", "resp_1:-1:0", "a:1:1\n", "é:1:1"]
)
def test_a_cursor_of_another_make_is_refused(cursor: str) -> None:
    with pytest.raises(ReattachRefused):
        Place.parse(cursor)


def test_a_place_fits_into_a_cursor() -> None:
    place = Place("r" * 200, 10**15 - 1, 10**15 - 1)
    assert Place.parse(place.cursor) == place
    assert len(place.cursor) <= 300


def behind(number: int, *payloads: bytes) -> list[Chunk]:
    return parse(*payloads, parser=ResponseParser(Place("resp_1", number, 1)))


def test_behind_a_place_what_is_older_is_passed_over() -> None:
    assert behind(1, CREATED, delta(1, "a"), delta(2, "b"), delta(2, "b"), delta(3, "c"), DONE) == [
        TextChunk("b"),
        CursorChunk("resp_1:2:2"),
        TextChunk("c"),
        CursorChunk("resp_1:3:3"),
        Finish(FinishReason.STOP),
    ]


@pytest.mark.parametrize("first", [delta(3, "c"), b'{"type": "error", "sequence_number": 0, "message": "too old"}'])
def test_behind_a_place_the_next_event_comes_first(first: bytes) -> None:
    with pytest.raises(ReattachRefused):
        behind(1, first)
