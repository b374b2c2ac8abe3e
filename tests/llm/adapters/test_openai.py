import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.llm.adapters.openai import OpenAIModel
from parley.llm.adapters.openai_events import CompletionParser
from parley.llm.errors import BadOutput, ProviderUnavailable
from parley.llm.ports import (
    Chunk,
    Finish,
    FinishReason,
    ModelMessage,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)
from tests.llm.calls import asking, collect, entry_for

HISTORY = ModelRequest(
    (
        ModelMessage("system", (TextPart("Be brief."),)),
        ModelMessage("user", (TextPart("one"), TextPart("two"))),
        ModelMessage(
            "assistant",
            (TextPart("Looking."), ToolCallPart("c1", "list", {"all": True}), ToolCallPart("c2", "add", {"t": "é"})),
        ),
        ModelMessage("tool", (ToolResultPart("c1", "list", "[]"), ToolResultPart("c2", "add", "no", failed=True))),
        ModelMessage("assistant", (TextPart(""),)),
        ModelMessage("assistant", (ToolCallPart("c3", "list", {}),)),
        ModelMessage("tool", (ToolResultPart("c3", "list", "[1]"),)),
        ModelMessage("user", (TextPart("deltas=1"),)),
    ),
    tools=(ToolSpec("add", "Adds.", {"type": "object", "properties": {}}),),
)


async def test_the_history_in_this_dialect(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    await collect(OpenAIModel(entry_for("openai", provider), http).stream(HISTORY))
    record = provider.requests[-1]
    assert record.path == "/v1/chat/completions"
    assert record.headers["authorization"] == "Bearer test-key"
    assert record.body["stream_options"] == {"include_usage": True}
    assert record.body["tools"] == [
        {
            "type": "function",
            "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "list", "arguments": '{"all":true}'}}
    assert record.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\n\ntwo"},
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                call,
                {"id": "c2", "type": "function", "function": {"name": "add", "arguments": '{"t":"é"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "[]"},
        {"role": "tool", "tool_call_id": "c2", "content": "no"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c3", "type": "function", "function": {"name": "list", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c3", "content": "[1]"},
        {"role": "user", "content": "deltas=1"},
    ]


async def test_without_a_key_there_is_no_authorization(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    await collect(OpenAIModel(entry_for("openai", provider, api_key=None), http).stream(asking("deltas=1")))
    assert "authorization" not in provider.requests[-1].headers


@pytest.mark.parametrize(
    ("base_url", "parameters", "field", "bound"),
    [
        ("https://api.openai.com/v1", {}, "max_completion_tokens", 50),
        ("https://x.openai.azure.com/v1", {}, "max_completion_tokens", 50),
        ("http://127.0.0.1:1/v1", {}, "max_tokens", 50),
        ("http://127.0.0.1:1/v1", {"max_completion_tokens": 20}, "max_completion_tokens", 20),
        ("https://api.openai.com/v1", {"max_tokens": 90}, "max_tokens", 50),
    ],
)
async def test_the_bound_has_the_name_that_the_server_knows(
    *,
    provider: FakeProvider,
    http: httpx.AsyncClient,
    base_url: str,
    parameters: dict[str, int],
    field: str,
    bound: int,
) -> None:
    model = OpenAIModel(entry_for("openai", provider, base_url=base_url, parameters=parameters), http)
    body = model._body(asking("x", max_output_tokens=50))
    assert {name: value for name, value in body.items() if name.startswith("max_")} == {field: bound}


def parse(*payloads: bytes) -> list[Chunk]:
    parser = CompletionParser()
    chunks = [chunk for payload in payloads for chunk in parser.feed((b"", payload))]
    return [*chunks, *parser.end()]


STOP = b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}'


def delta(content: str) -> bytes:
    return b'{"choices": [{"delta": %b}]}' % content.encode()


@pytest.mark.parametrize(
    ("content", "chunk"),
    [
        ('{"reasoning": "why"}', ReasoningChunk("why")),
        ('{"reasoning_content": "why", "content": null}', ReasoningChunk("why")),
        ('{"refusal": "I cannot"}', TextChunk("I cannot")),
        ('{"content": [{"type": "text", "text": "hi"}]}', TextChunk("hi")),
        (
            '{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}]}',
            ReasoningChunk("why"),
        ),
        (r'{"content": "a\ud83d"}', TextChunk("a")),
    ],
)
def test_variants_of_a_delta(content: str, chunk: Chunk) -> None:
    assert parse(delta(content))[0] == chunk


def test_calls_that_share_an_index_or_have_none_are_told_apart_by_id() -> None:
    one = '{"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]}'
    two = '{"tool_calls": [{"index": 0, "id": "b", "function": {"name": "g", "arguments": {"x": 1}}}]}'
    three = '{"tool_calls": [{"id": "c", "function": {"name": "h"}}]}'
    chunks = parse(delta(one), delta(two), delta(three), STOP)
    assert chunks == [
        ToolCallChunk("a", "f", {}, "{}"),
        ToolCallChunk("b", "g", {"x": 1}, '{"x":1}'),
        ToolCallChunk("c", "h", {}, ""),
        Finish(FinishReason.TOOL_CALLS),
    ]


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("stop", FinishReason.STOP),
        ("length", FinishReason.LENGTH),
        ("content_filter", FinishReason.CONTENT_FILTER),
        ("eos", FinishReason.STOP),
    ],
)
def test_reasons(reason: str, finish: FinishReason) -> None:
    assert parse(b'{"choices": [{"delta": {}, "finish_reason": "%b"}]}' % reason.encode()) == [Finish(finish)]


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b'"x"',
        b"1",
        b'{"choices": 1}',
        b'{"choices": [1]}',
        b'{"choices": [{"delta": 1}]}',
        b'{"choices": {"a": 1}}',
    ],
)
def test_other_shapes_are_bad_output(payload: bytes) -> None:
    with pytest.raises(BadOutput):
        parse(payload)


@pytest.mark.parametrize("tool_calls", ["1", '["x"]', '[{"index": [], "id": "a"}]', '[{"function": {"arguments": 1}}]'])
def test_other_shapes_of_tool_calls_are_bad_output(tool_calls: str) -> None:
    with pytest.raises(BadOutput):
        parse(delta(f'{{"tool_calls": {tool_calls}}}'))


def test_endless_arguments_and_calls_are_bad_output() -> None:
    long = f'{{"tool_calls": [{{"index": 0, "function": {{"arguments": "{"x" * 100_000}"}}}}]}}'
    with pytest.raises(BadOutput):
        parse(*[delta(long)] * 12)
    with pytest.raises(BadOutput):
        parse(*(delta(f'{{"tool_calls": [{{"index": {n}, "id": "c{n}"}}]}}') for n in range(200)))


def test_the_finish_reason_error_is_a_failure() -> None:
    with pytest.raises(ProviderUnavailable):
        parse(b'{"choices": [{"delta": {}, "finish_reason": "error"}]}')
