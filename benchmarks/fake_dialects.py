"""The two dialects of the fake provider: how each frames a plan, and how each refuses."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from benchmarks.fake_plan import Plan


@dataclass(slots=True)
class Frames:
    """An answer cut into server-sent events."""

    opening: bytes
    deltas: Sequence[bytes]
    ending: bytes
    whole: dict[str, Any]
    text_frame: Callable[[str], bytes]

    def stamped(self) -> bytes:
        """Return a delta that tells when it was sent."""
        return self.text_frame(f"{time.monotonic_ns()}|")


@dataclass(frozen=True, slots=True)
class Dialect:
    """One provider's protocol."""

    name: str
    frames: Callable[[dict[str, Any], Plan], Frames]
    refusal: Callable[[str], tuple[int, dict[str, Any]]]
    error_event: bytes

    @staticmethod
    def given(messages: list[dict[str, Any]]) -> str:
        """Return the beginning of the answer that the caller gives, empty when there is none."""
        if not messages or messages[-1].get("role") != "assistant":
            return ""
        content = messages[-1].get("content")
        if isinstance(content, list):
            content = content[-1].get("text") if content else None
        return content or ""

    @staticmethod
    def last_user_text(messages: list[dict[str, Any]]) -> str:
        """Return the text of the last user message that has any."""
        for message in reversed(messages):
            if message.get("role") == "user" and (text := _text(message["content"])):
                return text
        return ""

    @staticmethod
    def ends_with_tool_result(messages: list[dict[str, Any]]) -> bool:
        """Whether the model is being told what a tool did."""
        if not messages:
            return False
        last = messages[-2] if len(messages) > 1 and messages[-1].get("role") == "assistant" else messages[-1]
        content = last.get("content")
        blocks = content if isinstance(content, list) else []
        return (
            last.get("role") == "tool"
            or last.get("type") == "function_call_output"
            or any(block["type"] == "tool_result" for block in blocks)
        )


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a request tells of the conversation, in whichever dialect."""
    messages: list[dict[str, Any]] = body.get("messages") or body.get("input") or []
    return messages


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(block["text"] for block in content if block.get("type") in {"text", "input_text"})
    return ""


def count_words(body: dict[str, Any]) -> int:
    """Count the words of a request."""
    texts = [_text(message.get("content")) for message in messages_of(body)]
    rest = [str(body.get("system") or ""), str(body.get("instructions") or "")]
    return sum(len(text.split()) for text in [*texts, *rest])


def reasoning_pieces(plan: Plan) -> list[str]:
    """Return the pieces of reasoning."""
    return [f"thought {number} " for number in range(1, plan.reasoning + 1)]


def _halves(text: str) -> list[str]:
    r"""Write text as JSON escapes, cut between the two halves of every surrogate pair."""
    parts = [""]
    for unit in (text.encode("utf-16-be")[at : at + 2] for at in range(0, len(text.encode("utf-16-be")), 2)):
        code = int.from_bytes(unit)
        if 0xDC00 <= code <= 0xDFFF:
            parts.append("")
        parts[-1] += f"\\u{code:04x}"
    return [f'"{part}"' for part in parts]


def text_deltas(plan: Plan, frame: Callable[[bytes], bytes]) -> list[bytes]:
    """Frame the pieces; `frame` takes a JSON string."""
    if plan.stamp:
        return [b""] * plan.deltas
    if plan.fail == "surrogates":
        return [frame(half.encode()) for piece in plan.pieces() for half in _halves(piece)]
    return [frame(orjson.dumps(piece)) for piece in plan.pieces()]


def cut_in_thirds(text: str) -> list[str]:
    """Cut arguments into three pieces."""
    step = max(1, -(-len(text) // 3))
    return [text[at : at + step] for at in range(0, len(text), step)]


def _object(arguments: str) -> object:
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}


# --- OpenAI

_OPENAI_HEAD = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"fake",'
    b'"choices":[{"index":0,"delta":'
)


def _openai_event(delta: bytes, reason: bytes = b"null") -> bytes:
    return b'%b%b,"finish_reason":%b}]}\n\n' % (_OPENAI_HEAD, delta, reason)


def _openai_text(json_text: bytes) -> bytes:
    return _openai_event(b'{"content":' + json_text + b"}")


def _openai_refused(json_text: bytes) -> bytes:
    return _openai_event(b'{"refusal":' + json_text + b"}")


def _openai_frames(body: dict[str, Any], plan: Plan) -> Frames:
    thoughts = [
        _openai_event(b'{"reasoning_content":' + orjson.dumps(thought) + b"}") for thought in reasoning_pieces(plan)
    ]
    calls = []
    # The pieces of several calls come mixed, as the protocol allows.
    rows = [
        [{"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}]
        + [{"index": index, "function": {"arguments": piece}} for piece in cut_in_thirds(arguments)]
        for index, (name, arguments) in enumerate(plan.tools)
    ]
    for step in range(max(map(len, rows), default=0)):
        calls += [_openai_event(orjson.dumps({"tool_calls": [row[step]]})) for row in rows if step < len(row)]
    usage = {
        "prompt_tokens": count_words(body),
        "completion_tokens": len(plan.pieces()),
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    reason = {"length": "length", "filter": "content_filter"}.get(plan.end) or ("tool_calls" if plan.tools else "stop")
    ending = _openai_event(b"{}", orjson.dumps(reason))
    ending += b"data: " + orjson.dumps({"id": "chatcmpl-1", "choices": [], "usage": usage}) + b"\n\n"
    if plan.fail != "no_done":
        ending += b"data: [DONE]\n\n"
    message: dict[str, Any] = {"role": "assistant", "content": "".join(plan.pieces())}
    if plan.tools:
        message["tool_calls"] = [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(plan.tools)
        ]
    return Frames(
        opening=_openai_event(b'{"role":"assistant","content":""}'),
        deltas=[*thoughts, *text_deltas(plan, _openai_refused if plan.end == "refusal" else _openai_text), *calls],
        ending=ending,
        whole={
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": "fake",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": usage,
        },
        text_frame=lambda text: _openai_text(b'"' + text.encode() + b'"'),
    )


def openai_refusal(fault: str) -> tuple[int, dict[str, Any]]:
    """Refuse as OpenAI does."""
    codes = {"ctx": "context_length_exceeded", "filter": "content_filter", "quota": "insufficient_quota"}
    message = "Incorrect API key provided: sk-very-secret. The prompt was: my secret prompt"
    return int(fault[:3]), {"error": {"message": message, "type": "some_error", "code": codes.get(fault[3:])}}


# --- Anthropic


def _anthropic_event(name: bytes, data: bytes) -> bytes:
    return b'event: %b\ndata: {"type":"%b",%b}\n\n' % (name, name, data)


def _anthropic_delta(index: int, delta: bytes) -> bytes:
    return _anthropic_event(b"content_block_delta", b'"index":%d,"delta":%b' % (index, delta))


def _anthropic_block(index: int, block: dict[str, Any]) -> bytes:
    return _anthropic_event(b"content_block_start", b'"index":%d,"content_block":%b' % (index, orjson.dumps(block)))


def _anthropic_stop(index: int) -> bytes:
    return _anthropic_event(b"content_block_stop", b'"index":%d' % index)


def _anthropic_text(json_text: bytes) -> bytes:
    return _anthropic_delta(1, b'{"type":"text_delta","text":' + json_text + b"}")


def _anthropic_frames(body: dict[str, Any], plan: Plan) -> Frames:
    thoughts = [
        _anthropic_delta(0, orjson.dumps({"type": "thinking_delta", "thinking": thought}))
        for thought in reasoning_pieces(plan)
    ]
    if thoughts:
        thoughts[0] = _anthropic_block(0, {"type": "thinking", "thinking": ""}) + thoughts[0]
        thoughts[-1] += _anthropic_delta(0, b'{"type":"signature_delta","signature":"c2ln"}') + _anthropic_stop(0)
    calls = []
    for index, (name, arguments) in enumerate(plan.tools, start=2):
        calls.append(_anthropic_block(index, {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}))
        calls += [
            _anthropic_delta(index, orjson.dumps({"type": "input_json_delta", "partial_json": piece}))
            for piece in cut_in_thirds(arguments)
        ]
        calls.append(_anthropic_stop(index))
    texts = text_deltas(plan, _anthropic_text)
    if texts and not plan.stamp:
        texts[0] = _anthropic_block(1, {"type": "text", "text": ""}) + texts[0]
        texts[-1] += _anthropic_stop(1)
    words = count_words(body)
    reason = "tool_use" if plan.tools else "end_turn"
    reason = {"length": "max_tokens", "filter": "refusal", "refusal": "refusal"}.get(plan.end, reason)
    # Cached tokens stand beside the others here, not among them.
    usage = {"input_tokens": words - 1, "cache_read_input_tokens": 1, "output_tokens": 1}
    start = {"id": "msg_1", "type": "message", "role": "assistant", "model": "fake", "content": [], "usage": usage}
    last = {"delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": len(plan.pieces())}}
    ending = _anthropic_event(b"message_delta", orjson.dumps(last)[1:-1])
    if plan.fail != "no_done":
        ending += _anthropic_event(b"message_stop", b'"x":0')
    content: list[dict[str, Any]] = [{"type": "text", "text": "".join(plan.pieces())}]
    content += [
        {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": _object(arguments)}
        for index, (name, arguments) in enumerate(plan.tools, start=2)
    ]
    return Frames(
        opening=_anthropic_event(b"message_start", b'"message":' + orjson.dumps(start))
        + b'event: ping\ndata: {"type": "ping"}\n\n',
        deltas=[*thoughts, *texts, *calls],
        ending=ending,
        whole={
            **start,
            "content": content,
            "stop_reason": reason,
            "usage": {**usage, "output_tokens": len(plan.pieces())},
        },
        text_frame=lambda text: _anthropic_text(b'"' + text.encode() + b'"'),
    )


def _anthropic_refusal(fault: str) -> tuple[int, dict[str, Any]]:
    kinds = {
        "401": "authentication_error",
        "403": "permission_error",
        "404": "not_found_error",
        "429": "rate_limit_error",
        "529": "overloaded_error",
    }
    kind, message = kinds.get(fault[:3], "api_error"), "x-api-key sk-ant-very-secret; my secret prompt"
    if fault.startswith("400"):
        kind = "invalid_request_error"
    match fault[3:]:
        case "ctx":
            message = "prompt is too long: 250000 tokens > 200000 maximum"
        case "filter":
            kind = "content_filter"
        case "quota":
            kind = "billing_error"
    return int(fault[:3]), {"type": "error", "error": {"type": kind, "message": message}}


_OPENAI = Dialect(
    name="openai",
    frames=_openai_frames,
    refusal=openai_refusal,
    error_event=b'data: {"error":{"message":"secret overload","type":"server_error","code":503}}\n\n',
)
_ANTHROPIC = Dialect(
    name="anthropic",
    frames=_anthropic_frames,
    refusal=_anthropic_refusal,
    error_event=_anthropic_event(b"error", b'"error":{"type":"overloaded_error","message":"secret overload"}'),
)
DIALECTS = {"/v1/chat/completions": _OPENAI, "/chat/completions": _OPENAI, "/v1/messages": _ANTHROPIC}
