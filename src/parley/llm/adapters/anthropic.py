"""Anthropic's messages.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

import httpx

from parley.core.ids import new_id
from parley.llm.adapters.prefill import without_echo
from parley.llm.adapters.refusals import read_error
from parley.llm.adapters.reply_stream import MAX_ARGUMENT_CHARS, MAX_TOOL_CALLS, as_count, stream_reply, with_parameters
from parley.llm.errors import BadOutput
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
    UsageChunk,
)
from parley.llm.registry import ModelEntry
from parley.llm.sse import Event
from parley.llm.text import TextJoiner, clean, read_arguments, read_json

API_VERSION = "2023-06-01"

_FINISH = {
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "pause_turn": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}


class AnthropicModel:
    """A model behind Anthropic's API."""

    def __init__(self, entry: ModelEntry, http: httpx.AsyncClient) -> None:
        self._entry = entry
        self._http = http

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes."""
        key = self._entry.api_key
        chunks = stream_reply(
            self._http,
            self._entry,
            path="/v1/messages",
            headers={"anthropic-version": API_VERSION} | ({"x-api-key": key.get_secret_value()} if key else {}),
            body=self._body(request),
            parser=_Parser(),
        )
        if request.prefill:
            # White space that was not sent may be what the model begins with.
            return without_echo(chunks, request.prefill[len(request.prefill.rstrip()) :])
        return chunks

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        entry = self._entry
        messages = request.messages
        if request.prefill:
            messages = (*messages, ModelMessage("assistant", (TextPart(request.prefill),)))
        body: dict[str, Any] = {"messages": _messages(messages), "stream": True}
        if system := "\n\n".join(_text_of(message) for message in request.messages if message.role == "system"):
            body["system"] = system
        if request.tools:
            body["tools"] = [
                {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
                for tool in request.tools
            ]
        if request.temperature is not None:
            body["temperature"] = request.temperature
        body = with_parameters(body, entry.parameters, request.parameters)
        bounds = [request.max_output_tokens, entry.max_output_tokens]
        body["max_tokens"] = min([*bounds, body["max_tokens"]] if "max_tokens" in body else bounds)
        body["model"] = entry.name
        return body


def _text_of(message: ModelMessage) -> str:
    return "\n\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _messages(messages: Iterable[ModelMessage]) -> list[dict[str, Any]]:
    """Map the history. Tool results are blocks of a user message, and neighbours of one role are one message."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "system":
            continue
        blocks = [block for part in message.parts if (block := _block(part)) is not None]
        if not blocks:
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if found and found[-1]["role"] == role:
            found[-1]["content"].extend(blocks)
        else:
            found.append({"role": role, "content": blocks})
    if found and found[-1]["role"] == "assistant" and (last := found[-1]["content"][-1])["type"] == "text":
        # An answer to be continued may not end in white space.
        last["text"] = last["text"].rstrip()
    return found


def _block(part: TextPart | ToolCallPart | ToolResultPart) -> dict[str, Any] | None:
    if isinstance(part, TextPart):
        # The API refuses blank text.
        return {"type": "text", "text": part.text} if part.text.strip() else None
    if isinstance(part, ToolCallPart):
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": part.arguments}
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": part.call_id, "content": part.content}
    if part.failed:
        block["is_error"] = True
    return block


class _ToolUse:
    __slots__ = ("id", "name", "pieces", "size")

    def __init__(self, block: Mapping[str, Any]) -> None:
        self.id = str(block.get("id") or "")
        self.name = str(block.get("name") or "")
        self.pieces: list[str] = []
        self.size = 0

    def add(self, piece: str) -> None:
        self.size += len(piece)
        if self.size > MAX_ARGUMENT_CHARS:
            raise BadOutput
        self.pieces.append(piece)

    def chunk(self) -> ToolCallChunk:
        raw = clean("".join(self.pieces))
        return ToolCallChunk(clean(self.id) or new_id().hex, clean(self.name), read_arguments(raw), raw)


class _Parser:
    """Reads one streamed message."""

    def __init__(self) -> None:
        self.started = False
        self.finished = False
        self.done = False
        self._reason = FinishReason.STOP
        self._usage = UsageChunk()
        self._text = TextJoiner()
        self._reasoning = TextJoiner()
        self._tools: dict[object, _ToolUse] = {}
        self._tools_seen = 0
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
        if rest := self._reasoning.flush():
            yield ReasoningChunk(rest)
        if rest := self._text.flush():
            yield TextChunk(rest)
        for tool in self._tools.values():
            yield tool.chunk()
        yield Finish(self._reason)

    def _on_delta(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        delta = payload["delta"]
        kind = delta["type"]
        self.started = True
        if kind == "text_delta":
            text = self._text.feed(delta["text"])
            return (TextChunk(text),) if text else ()
        if kind == "input_json_delta":
            self._tools[payload["index"]].add(delta["partial_json"])
        elif kind == "thinking_delta":
            text = self._reasoning.feed(delta["thinking"])
            return (ReasoningChunk(text),) if text else ()
        return ()

    def _on_block_start(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        block = payload["content_block"]
        if block["type"] == "tool_use":
            self.started = True
            self._tools_seen += 1
            if self._tools_seen > MAX_TOOL_CALLS:
                raise BadOutput
            self._tools[payload["index"]] = _ToolUse(block)
        elif block["type"] == "text" and block.get("text"):
            text = self._text.feed(block["text"])
            return (TextChunk(text),) if text else ()
        return ()

    def _on_block_stop(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        tool = self._tools.pop(payload["index"], None)
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
        fresh = as_count(usage.get("input_tokens")) + as_count(usage.get("cache_creation_input_tokens"))
        has_input = usage.get("input_tokens") is not None
        self._usage = UsageChunk(
            input_tokens=fresh + cached if has_input else before.input_tokens,
            cached_tokens=cached if has_input else before.cached_tokens,
            output_tokens=as_count(usage.get("output_tokens")) or before.output_tokens,
        )
        return (self._usage,)
