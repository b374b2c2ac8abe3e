"""Reads a streamed message of Anthropic's.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from parley.llm.adapters.gathering import MAX_STATE_CHARS, MAX_TOOL_CALLS, GatheredCall, state_of
from parley.llm.adapters.refusals import read_error
from parley.llm.adapters.reply_stream import as_count
from parley.llm.errors import BadOutput
from parley.llm.ports import Chunk, Finish, FinishReason, ReasoningChunk, TextChunk, UsageChunk
from parley.llm.sse import Event
from parley.llm.text import TextJoiner, clean, read_json

_FINISH = {
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    # A long turn with the provider's own tools, of which only a part has been sent.
    "pause_turn": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}


class _Thinking:
    """A block of reasoning, as it has to go back before the tool call that came of it."""

    __slots__ = ("block", "signature", "thinking")

    def __init__(self, block: dict[str, Any]) -> None:
        self.block = block
        self.thinking: list[str] = []
        self.signature = ""

    def whole(self) -> dict[str, Any] | None:
        if self.block["type"] == "redacted_thinking":
            return {"type": "redacted_thinking", "data": clean(self.block["data"])}
        if not self.signature:
            return None
        thinking = clean("".join(self.thinking))
        return {"type": "thinking", "thinking": thinking, "signature": clean(self.signature)}


class MessageParser:
    """Reads one streamed message. `maker` marks what the model wants back with its tool calls."""

    def __init__(self, maker: str = "") -> None:
        self.started = False
        self.finished = False
        self.done = False
        self._maker = maker
        self._reason = FinishReason.STOP
        self._usage = UsageChunk()
        self._text = TextJoiner()
        self._reasoning = TextJoiner()
        self._tools: dict[object, GatheredCall] = {}
        self._tools_seen = 0
        self._others: set[object] = set()
        self._open: dict[object, _Thinking] = {}
        self._thoughts: list[dict[str, Any]] = []
        self._state_chars = 0
        self._handlers: dict[object, Callable[[dict[str, Any]], Iterable[Chunk]]] = {
            "content_block_delta": self._on_delta,
            "content_block_start": self._on_block_start,
            "content_block_stop": self._on_block_stop,
            "message_start": self._on_message_start,
            "message_delta": self._on_message_delta,
            "message_stop": self._on_message_stop,
            "error": self._on_error,
        }

    def feed(self, event: Event) -> Iterable[Chunk]:
        """Read one event. Raises `ModelError`."""
        payload = read_json(event[1])
        if type(payload) is not dict:
            raise BadOutput
        try:
            # Events of other types, `ping` among them, may be added at any time and carry no text.
            handler = self._handlers.get(payload.get("type"))
            return handler(payload) if handler is not None else ()
        except (AttributeError, KeyError, TypeError):
            raise BadOutput from None

    def end(self) -> Iterable[Chunk]:
        """Return what is left when the stream has ended well, a `Finish` last."""
        if rest := self._reasoning.flush():
            yield ReasoningChunk(rest)
        if rest := self._text.flush():
            yield TextChunk(rest)
        for tool in self._tools.values():
            yield tool.chunk()
        called = self._tools_seen > 0 and self._reason is FinishReason.STOP
        yield Finish(FinishReason.TOOL_CALLS if called else self._reason)

    def _on_delta(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        delta = payload["delta"]
        kind = delta["type"]
        self.started = True
        if kind == "text_delta":
            text = self._text.feed(delta["text"])
            return (TextChunk(text),) if text else ()
        if kind == "input_json_delta":
            # The provider's own tools have arguments too, which are none of ours.
            if (index := payload["index"]) not in self._others:
                self._tools[index].add(delta["partial_json"])
        elif kind == "thinking_delta":
            thinking = delta["thinking"]
            text = self._reasoning.feed(thinking)
            if (open_block := self._open.get(payload.get("index"))) is not None and self._has_room(thinking):
                open_block.thinking.append(thinking)
            return (ReasoningChunk(text),) if text else ()
        elif kind == "signature_delta":
            signature = delta["signature"]
            if (open_block := self._open.get(payload.get("index"))) is not None and self._has_room(signature):
                open_block.signature += signature
        return ()

    def _has_room(self, piece: str) -> bool:
        self._state_chars += len(piece)
        return self._state_chars <= MAX_STATE_CHARS

    def _on_block_start(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        block = payload["content_block"]
        kind = block["type"]
        index = payload["index"]
        if kind == "tool_use":
            self.started = True
            if (known := self._tools.get(index)) is not None and known.id == block.get("id"):
                return ()  # the same event once more
            self._tools_seen += 1
            if self._tools_seen > MAX_TOOL_CALLS:
                raise BadOutput
            call = self._tools[index] = GatheredCall(block.get("id"), block.get("name"))
            thoughts, self._thoughts = self._thoughts, []
            call.state = state_of(self._maker, thoughts, self._state_chars)
        elif kind == "text" and block.get("text"):
            text = self._text.feed(block["text"])
            return (TextChunk(text),) if text else ()
        elif kind in {"thinking", "redacted_thinking"}:
            self._state_chars += len(block.get("data") or "")
            self._open[index] = _Thinking(block)
        elif len(self._others) < MAX_TOOL_CALLS:
            self._others.add(index)
        return ()

    def _on_block_stop(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        index = payload["index"]
        if (thinking := self._open.pop(index, None)) is not None:
            if (whole := thinking.whole()) is not None:
                self._thoughts.append(whole)
            return ()
        tool = self._tools.pop(index, None)
        return (tool.chunk(),) if tool is not None else ()

    def _on_message_start(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        return self._count(payload["message"].get("usage"))

    def _on_message_delta(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        reason = (payload.get("delta") or {}).get("stop_reason")
        if reason:
            self._reason = _FINISH.get(reason, FinishReason.STOP)
            self.finished = True
        return self._count(payload.get("usage"))

    def _on_message_stop(self, _: dict[str, Any]) -> Iterable[Chunk]:
        self.done = True
        return ()

    def _on_error(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        raise read_error(payload.get("error"))

    def _count(self, usage: Mapping[str, Any] | None) -> Iterable[Chunk]:
        """Take over token counts. Anthropic counts cached and uncached input apart; the port counts them together."""
        if not usage:
            return ()
        before = self._usage
        cached = as_count(usage.get("cache_read_input_tokens"))
        written = as_count(usage.get("cache_creation_input_tokens"))
        has_input = usage.get("input_tokens") is not None
        fresh = as_count(usage.get("input_tokens"))
        self._usage = UsageChunk(
            input_tokens=fresh + written + cached if has_input else before.input_tokens,
            cached_tokens=cached if has_input else before.cached_tokens,
            output_tokens=as_count(usage.get("output_tokens")) or before.output_tokens,
            cache_written_tokens=written if has_input else before.cache_written_tokens,
        )
        return (self._usage,)
