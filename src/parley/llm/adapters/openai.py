"""OpenAI's chat completions, as OpenAI and many others speak it; how they differ stands in `parley.llm.flavours`.

https://platform.openai.com/docs/api-reference/chat/create
"""

import hashlib
import string
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

import httpx
import orjson

from parley.llm.adapters.images import as_data_url
from parley.llm.adapters.openai_events import CompletionParser
from parley.llm.adapters.prefill import without_echo
from parley.llm.adapters.reply_stream import bearer, stream_reply, with_parameters
from parley.llm.estimates import output_room
from parley.llm.flavours import Flavour, flavour_of
from parley.llm.ports import (
    Chunk,
    ImagePart,
    JsonSchema,
    ModelMessage,
    ModelRequest,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)
from parley.llm.registry import ModelEntry
from parley.llm.schemas import schema_for, strict_schema

_BOUND_FIELDS = ("max_completion_tokens", "max_tokens")
_ID_LETTERS = string.ascii_letters + string.digits


class OpenAIModel:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, entry: ModelEntry, http: httpx.AsyncClient) -> None:
        self._entry = entry
        self._http = http
        self._flavour = flavour_of(entry.base_url, entry.flavour)
        self._maker = f"openai:{self._flavour.name}:{entry.name}"

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes."""
        body = self._body(request)
        chunks = stream_reply(
            self._http,
            self._entry,
            path="/chat/completions",
            headers=bearer(self._entry),
            body=body,
            parser=CompletionParser(
                self._flavour, maker=self._maker, refusal_is_filtered=request.response_schema is not None
            ),
        )
        if request.prefill and (self._flavour.echoes_prefill or body.get("echo") is True):
            kept = request.prefill.rstrip()
            return without_echo(chunks, kept, request.prefill[len(kept) :])
        return chunks

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        entry = self._entry
        flavour = self._flavour
        body: dict[str, Any] = {
            "messages": [item for message in request.messages for item in self._message(message)],
            "stream": True,
        }
        if flavour.asks_for_usage:
            body["stream_options"] = {"include_usage": True}
        if request.tools:
            body |= _tools(request, flavour)
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.stop:
            body["stop"] = list(request.stop)
        if (wanted := schema_for(entry, request)) is not None:
            body["response_format"] = _response_format(wanted, flavour)
        if request.prefill:
            body["messages"].append(
                {"role": "assistant", "content": request.prefill}
                | ({"prefix": True} if entry.prefill == "prefix" else {})
            )
            if entry.prefill == "continue_final_message":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        body = with_parameters(body, entry.parameters, request.parameters)
        # A registry entry may name one of the two among its parameters.
        named = [field for field in _BOUND_FIELDS if field in body]
        field = named[0] if named else flavour.bound
        body[field] = min([request.max_output_tokens, output_room(entry), *(body[name] for name in named)])
        body["model"] = entry.name
        return body

    def _message(self, message: ModelMessage) -> Iterable[dict[str, Any]]:
        if message.role == "tool":
            for part in message.parts:
                if isinstance(part, ToolResultPart):
                    yield {"role": "tool", "tool_call_id": self._call_id(part.call_id), "content": part.content}
            return
        if any(isinstance(part, ImagePart) for part in message.parts):
            blocks = [block for part in message.parts if (block := self._block(part)) is not None]
            yield {"role": message.role, "content": blocks}
            return
        text = "\n\n".join(part.text for part in message.parts if isinstance(part, TextPart))
        calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
        if calls:
            written: dict[str, Any] = {"role": message.role, "content": text or None}
            written["tool_calls"] = [self._call(call) for call in calls]
            states = [self._state(call) for call in calls]
            if not any(states):
                written |= self._flavour.lost_message
                written["tool_calls"][0] |= self._flavour.lost_call
            for state in states:
                written |= state.get("message", {})
            yield written
        elif text:
            yield {"role": message.role, "content": text}

    def _block(self, part: object) -> dict[str, Any] | None:
        if isinstance(part, TextPart) and part.text:
            return {"type": "text", "text": part.text}
        if isinstance(part, ImagePart):
            detail = {"detail": part.detail} if part.detail and self._flavour.image_detail else {}
            return {"type": "image_url", "image_url": {"url": as_data_url(part), **detail}}
        return None

    def _call(self, part: ToolCallPart) -> dict[str, Any]:
        function = {"name": part.name, "arguments": orjson.dumps(part.arguments).decode()}
        written: dict[str, Any] = {"id": self._call_id(part.call_id), "type": "function", "function": function}
        written |= self._state(part).get("call", {})
        return written

    def _state(self, part: ToolCallPart) -> Mapping[str, Any]:
        state = part.state
        return state.value if state is not None and state.maker == self._maker else {}

    def _call_id(self, call_id: str) -> str:
        """Return the id in the form that this server takes, always the same one for the same id."""
        length = self._flavour.call_id_length
        if length is None or (len(call_id) == length and set(call_id) <= set(_ID_LETTERS)):
            return call_id
        digest = hashlib.sha256(call_id.encode()).digest()
        return "".join(_ID_LETTERS[byte % len(_ID_LETTERS)] for byte in digest[:length])


def _tools(request: ModelRequest, flavour: Flavour) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            }
            for tool in request.tools
        ]
    }
    choice = request.tool_choice
    if choice in {"auto", "none", "required"}:
        fields["tool_choice"] = choice
    elif choice is not None:
        fields["tool_choice"] = {"type": "function", "function": {"name": choice}}
    if request.parallel_tools is not None and flavour.tells_parallel:
        fields["parallel_tool_calls"] = request.parallel_tools
    return fields


def _response_format(wanted: JsonSchema, flavour: Flavour) -> dict[str, Any]:
    if flavour.schema == "object":
        return {"type": "json_object"}
    strict = strict_schema(wanted.schema) if wanted.strict and flavour.schema == "strict" else None
    schema = {"name": wanted.name, "schema": strict or wanted.schema}
    return {"type": "json_schema", "json_schema": schema | ({"strict": True} if strict else {})}
