import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.llm.adapters.anthropic import AnthropicModel
from parley.llm.adapters.anthropic_events import MessageParser
from parley.llm.errors import BadOutput, ModelError
from parley.llm.ports import (
    Chunk,
    Finish,
    FinishReason,
    ModelMessage,
    ModelRequest,
    TextChunk,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    UsageChunk,
)
from tests.llm.calls import collect, entry_for

HISTORY = ModelRequest(
    (
        ModelMessage("system", (TextPart("Be brief."),)),
        ModelMessage("system", (TextPart("Be kind."),)),
        ModelMessage("user", (TextPart("hello"), TextPart("  "))),
        ModelMessage(
            "assistant", (TextPart(""), ToolCallPart("c1", "list", {"all": True}), ToolCallPart("c2", "x", {}))
        ),
        ModelMessage("tool", (ToolResultPart("c1", "list", "[]"),)),
        ModelMessage("tool", (ToolResultPart("c2", "x", "no", failed=True),)),
        ModelMessage("user", (TextPart("deltas=1"),)),
        ModelMessage("assistant", (TextPart("I was saying \n"),)),
    ),
    tools=(ToolSpec("list", "Lists.", {"type": "object"}),),
)


async def test_the_history_in_this_dialect(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    await collect(AnthropicModel(entry_for("anthropic", provider), http).stream(HISTORY))
    record = provider.requests[-1]
    assert record.path == "/v1/messages"
    assert (record.headers["x-api-key"], record.headers["anthropic-version"]) == ("test-key", "2023-06-01")
    assert record.body["system"] == "Be brief.\n\nBe kind."
    assert record.body["tools"] == [{"name": "list", "description": "Lists.", "input_schema": {"type": "object"}}]
    assert record.body["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "tool_use", "id": "c1", "name": "list", "input": {"all": True}},
                {"type": "tool_use", "id": "c2", "name": "x", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "[]"},
                {"type": "tool_result", "tool_use_id": "c2", "content": "no", "is_error": True},
                {"type": "text", "text": "deltas=1"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "I was saying"}]},
    ]


def parse(*payloads: bytes) -> list[Chunk]:
    parser = MessageParser()
    chunks = [chunk for payload in payloads for chunk in parser.feed((b"", payload))]
    return [*chunks, *parser.end()]


def test_usage_counts_all_input_and_keeps_it_over_later_counts() -> None:
    start = (
        b'{"type": "message_start", "message": {"usage": {"input_tokens": 5, "cache_read_input_tokens": 20, '
        b'"cache_creation_input_tokens": 3, "output_tokens": 1}}}'
    )
    last = b'{"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}}'
    usages = [chunk for chunk in parse(start, last) if isinstance(chunk, UsageChunk)]
    assert usages == [UsageChunk(28, 20, 1, 3), UsageChunk(28, 20, 9, 3)]


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", FinishReason.STOP),
        ("stop_sequence", FinishReason.STOP),
        ("max_tokens", FinishReason.LENGTH),
        ("tool_use", FinishReason.TOOL_CALLS),
        ("refusal", FinishReason.CONTENT_FILTER),
        ("something new", FinishReason.STOP),
    ],
)
def test_reasons(reason: str, finish: FinishReason) -> None:
    assert parse(b'{"type": "message_delta", "delta": {"stop_reason": "%b"}}' % reason.encode()) == [Finish(finish)]


def test_events_that_are_not_known_are_passed_over() -> None:
    events = [
        b'{"type": "ping"}',
        b'{"type": "invented", "delta": 1}',
        b'{"type": "content_block_start", "index": 0, "content_block": {"type": "invented"}}',
        b'{"type": "content_block_delta", "index": 0, "delta": {"type": "invented_delta"}}',
        b'{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}',
        b'{"type": "content_block_stop", "index": 0}',
    ]
    assert parse(*events) == [TextChunk("hi"), Finish(FinishReason.STOP)]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("overloaded_error", "provider_unavailable"),
        ("rate_limit_error", "provider_rate_limited"),
        ("authentication_error", "provider_auth"),
        ("invented_error", "provider_unavailable"),
    ],
)
def test_error_events(kind: str, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(b'{"type": "error", "error": {"type": "%b", "message": "secret"}}' % kind.encode())
    assert caught.value.code == code


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b'{"type": "content_block_delta"}',
        b'{"type": "content_block_delta", "delta": {"type": "text_delta", "text": 1}}',
        b'{"type": "content_block_delta", "index": 3, "delta": {"type": "input_json_delta", "partial_json": "x"}}',
        b'{"type": "message_start"}',
        b'{"type": []}',
    ],
)
def test_other_shapes_are_bad_output(payload: bytes) -> None:
    with pytest.raises(BadOutput):
        parse(payload)


def test_endless_arguments_are_bad_output() -> None:
    start = (
        b'{"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "a", "name": "f"}}'
    )
    piece = b'{"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": "%b"}}'
    with pytest.raises(BadOutput):
        parse(start, *[piece % (b"x" * 100_000)] * 12)
