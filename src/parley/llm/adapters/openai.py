"""OpenAI's chat completions, as OpenAI, Ollama, vLLM, LM Studio, Groq, Mistral, OpenRouter and others speak it.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

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

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
_BOUND_FIELDS = ("max_completion_tokens", "max_tokens")
# Its answers begin with the prefill, white space at the end of which may be missing. Others that are known (DeepSeek,
# vLLM unless it is asked with `echo`) send only what is new.
_ECHOING_HOSTS = ("api.mistral.ai",)


class OpenAIModel:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, entry: ModelEntry, http: httpx.AsyncClient) -> None:
        self._entry = entry
        self._http = http

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes."""
        key = self._entry.api_key
        body = self._body(request)
        chunks = stream_reply(
            self._http,
            self._entry,
            path="/chat/completions",
            headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else {},
            body=body,
            parser=_Parser(),
        )
        if request.prefill and (self._host in _ECHOING_HOSTS or body.get("echo") is True):
            kept = request.prefill.rstrip()
            return without_echo(chunks, kept, request.prefill[len(kept) :])
        return chunks

    @property
    def _host(self) -> str:
        return urlsplit(self._entry.base_url).hostname or ""

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        entry = self._entry
        body: dict[str, Any] = {
            "messages": [item for message in request.messages for item in _message(message)],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
                }
                for tool in request.tools
            ]
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.prefill:
            body["messages"].append(
                {"role": "assistant", "content": request.prefill}
                | ({"prefix": True} if entry.prefill == "prefix" else {})
            )
            if entry.prefill == "continue_final_message":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        body = with_parameters(body, entry.parameters, request.parameters)
        # OpenAI's newer models refuse the old name of the bound, most other servers do not know the new one.
        # A registry entry settles it by naming one of them among its parameters.
        named = [field for field in _BOUND_FIELDS if field in body]
        field = named[0] if named else _BOUND_FIELDS[0 if self._host.endswith(("api.openai.com", ".azure.com")) else 1]
        body[field] = min([request.max_output_tokens, entry.max_output_tokens, *(body[name] for name in named)])
        body["model"] = entry.name
        return body


def _message(message: ModelMessage) -> Iterable[dict[str, Any]]:
    if message.role == "tool":
        for part in message.parts:
            if isinstance(part, ToolResultPart):
                yield {"role": "tool", "tool_call_id": part.call_id, "content": part.content}
        return
    text = "\n\n".join(part.text for part in message.parts if isinstance(part, TextPart))
    calls = [
        {
            "id": part.call_id,
            "type": "function",
            "function": {"name": part.name, "arguments": orjson.dumps(part.arguments).decode()},
        }
        for part in message.parts
        if isinstance(part, ToolCallPart)
    ]
    if calls:
        yield {"role": message.role, "content": text or None, "tool_calls": calls}
    elif text:
        yield {"role": message.role, "content": text}


class _GatheredCall:
    __slots__ = ("arguments", "id", "name", "size")

    def __init__(self, id: str) -> None:
        self.id = id
        self.name = ""
        self.arguments: list[str] = []
        self.size = 0


class _Parser:
    """Reads one streamed completion."""

    def __init__(self) -> None:
        self.started = False
        self.finished = False
        self.done = False
        self._reason = FinishReason.STOP
        self._usage: UsageChunk | None = None
        self._text = TextJoiner()
        self._reasoning = TextJoiner()
        self._calls: list[_GatheredCall] = []
        self._call_at: dict[object, _GatheredCall] = {}

    def feed(self, event: Event) -> Iterable[Chunk]:
        data = event[1]
        if data == b"[DONE]":
            self.done = True
            return ()
        payload = read_json(data)
        if type(payload) is not dict:
            raise BadOutput
        if payload.get("error"):
            raise read_error(payload["error"])
        if (usage := payload.get("usage")) and isinstance(usage, dict):
            self._usage = _usage(usage)
        choices = payload.get("choices")
        if not choices:
            return ()
        try:
            choice = choices[0]
            delta = choice.get("delta") or {}
            chunks = self._delta(delta)
            if delta.get("tool_calls"):
                self._gather(delta["tool_calls"])
            if reason := choice.get("finish_reason"):
                if reason == "error":  # OpenRouter, when the server behind it failed
                    raise read_error(choice.get("error"))
                self._reason = _FINISH.get(reason, FinishReason.STOP)
                self.finished = True
        except (AttributeError, KeyError, TypeError):
            raise BadOutput from None
        return chunks

    def end(self) -> Iterable[Chunk]:
        if rest := self._reasoning.flush():
            yield ReasoningChunk(rest)
        if rest := self._text.flush():
            yield TextChunk(rest)
        for call in self._calls:
            raw = clean("".join(call.arguments))
            yield ToolCallChunk(clean(call.id) or new_id().hex, clean(call.name), read_arguments(raw), raw)
        if self._usage is not None:
            yield self._usage
        # Some servers say `stop` after tool calls.
        yield Finish(FinishReason.TOOL_CALLS if self._calls and self._reason is FinishReason.STOP else self._reason)

    def _delta(self, delta: Mapping[str, Any]) -> Iterable[Chunk]:
        content = delta.get("content")
        if type(content) is str and content:
            self.started = True
            text = self._text.feed(content)
            return (TextChunk(text),) if text else ()
        if type(content) is list:
            return self._blocks(content)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if type(reasoning) is str:
            self.started = True
            reasoning = self._reasoning.feed(reasoning)
            return (ReasoningChunk(reasoning),) if reasoning else ()
        if refusal := delta.get("refusal"):
            return self._delta({"content": refusal})
        return ()

    def _blocks(self, blocks: list[Any]) -> list[Chunk]:
        """Read content that comes as a list, as Mistral's reasoning models send it."""
        chunks: list[Chunk] = []
        for block in blocks:
            if block.get("type") == "text":
                chunks.extend(self._delta({"content": block.get("text")}))
            elif block.get("type") == "thinking":
                for inner in block.get("thinking") or ():
                    chunks.extend(self._delta({"reasoning": inner.get("text")}))
        return chunks

    def _gather(self, pieces: Iterable[Mapping[str, Any]]) -> None:
        self.started = True
        for piece in pieces:
            call_id = piece.get("id") or ""
            index = piece.get("index")
            call = self._call_at.get(index) if index is not None or not call_id else None
            # Some servers give every call the index 0, or none: another id is another call.
            if call is None or (call_id and call.id and call.id != call_id):
                if len(self._calls) >= MAX_TOOL_CALLS:
                    raise BadOutput
                call = self._call_at[index] = _GatheredCall(call_id)
                self._calls.append(call)
            call.id = call.id or call_id
            function = piece.get("function") or {}
            call.name = call.name or function.get("name") or ""
            arguments = function.get("arguments")
            if isinstance(arguments, dict):  # against the protocol, but seen
                arguments = orjson.dumps(arguments).decode()
            if arguments:
                call.size += len(arguments)
                if call.size > MAX_ARGUMENT_CHARS:
                    raise BadOutput
                call.arguments.append(arguments)


def _usage(usage: Mapping[str, Any]) -> UsageChunk:
    details = usage.get("prompt_tokens_details")
    return UsageChunk(
        input_tokens=as_count(usage.get("prompt_tokens")),
        cached_tokens=as_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        output_tokens=as_count(usage.get("completion_tokens")),
    )
