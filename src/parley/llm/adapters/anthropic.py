"""Anthropic's messages.

https://docs.anthropic.com/en/api/messages
"""

from collections.abc import AsyncGenerator, Iterable
from typing import Any

import httpx

from parley.llm.adapters.anthropic_events import MessageParser
from parley.llm.adapters.images import as_base64
from parley.llm.adapters.prefill import without_echo
from parley.llm.adapters.reply_stream import stream_reply, with_parameters
from parley.llm.estimates import output_room
from parley.llm.ports import (
    Chunk,
    ImagePart,
    ModelMessage,
    ModelRequest,
    Part,
    TextPart,
    ToolCallPart,
)
from parley.llm.registry import ModelEntry
from parley.llm.schemas import ANTHROPIC, schema_for, strict_schema

API_VERSION = "2023-06-01"

_CHOICES = {"auto": "auto", "none": "none", "required": "any"}


class AnthropicModel:
    """A model behind Anthropic's API."""

    def __init__(self, entry: ModelEntry, http: httpx.AsyncClient) -> None:
        self._entry = entry
        self._http = http
        self._maker = f"anthropic:{entry.name}"

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes."""
        entry = self._entry
        key = {"x-api-key": entry.api_key.get_secret_value()} if entry.api_key else {}
        chunks = stream_reply(
            self._http,
            entry,
            path="/v1/messages",
            headers={"anthropic-version": API_VERSION, **entry.headers, **key},
            body=self._body(request),
            parser=MessageParser(self._maker),
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
        body: dict[str, Any] = {"messages": self._messages(messages), "stream": True}
        if system := "\n\n".join(_text_of(message) for message in request.messages if message.role == "system"):
            body["system"] = system
        if request.tools:
            body |= _tools(request)
        if stops := [stop for stop in request.stop if stop.strip()]:  # the API refuses blank ones
            body["stop_sequences"] = stops
        if (wanted := schema_for(entry, request)) is not None:
            # Where there is no strict form the API says so itself: left out, the answer would be anything.
            schema = strict_schema(wanted.schema, ANTHROPIC) or wanted.schema
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        if request.temperature is not None:
            body["temperature"] = request.temperature
        body = with_parameters(body, entry.parameters, request.parameters)
        if _lost_its_thoughts(body["messages"]):
            # With thinking on, the API refuses calls whose reasoning is not there any more.
            body.pop("thinking", None)
        bounds = [request.max_output_tokens, output_room(entry)]
        body["max_tokens"] = min([*bounds, body["max_tokens"]] if "max_tokens" in body else bounds)
        body["model"] = entry.name
        return body

    def _messages(self, messages: Iterable[ModelMessage]) -> list[dict[str, Any]]:
        """Map the history. Tool results are blocks of a user message, and neighbours of one role are one message."""
        found: list[dict[str, Any]] = []
        for message in messages:
            if message.role == "system":
                continue
            blocks = self._blocks(message.parts)
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

    def _blocks(self, parts: Iterable[Part]) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        called = False
        for part in parts:
            if isinstance(part, ToolCallPart):
                # A message begins with its reasoning; what was thought between two calls stays between them.
                at = len(blocks) if called else 0
                blocks[at:at] = self._thoughts(part)
                called = True
            if (block := _block(part)) is not None:
                blocks.append(block)
        return blocks

    def _thoughts(self, part: ToolCallPart) -> list[dict[str, Any]]:
        state = part.state
        return state.value if state is not None and state.maker == self._maker else []


def _text_of(message: ModelMessage) -> str:
    return "\n\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _block(part: Part) -> dict[str, Any] | None:
    if isinstance(part, TextPart):
        # The API refuses blank text.
        return {"type": "text", "text": part.text} if part.text.strip() else None
    if isinstance(part, ImagePart):
        source = {"type": "base64", "media_type": part.media_type, "data": as_base64(part)}
        return {"type": "image", "source": source}
    if isinstance(part, ToolCallPart):
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": part.arguments}
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": part.call_id, "content": part.content}
    if part.failed:
        block["is_error"] = True
    return block


def _tools(request: ModelRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tools": [
            {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
            for tool in request.tools
        ]
    }
    choice: dict[str, Any] = {}
    if (wanted := request.tool_choice) is not None:
        choice = {"type": _CHOICES[wanted]} if wanted in _CHOICES else {"type": "tool", "name": wanted}
    if request.parallel_tools is not None and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": not request.parallel_tools}
    return fields | ({"tool_choice": choice} if choice else {})


def _lost_its_thoughts(messages: list[dict[str, Any]]) -> bool:
    """Return whether the model is told of tools that it called with reasoning which is not known any more."""
    if len(messages) < 2 or messages[-1]["role"] != "user" or messages[-1]["content"][0]["type"] != "tool_result":
        return False
    return "thinking" not in messages[-2]["content"][0]["type"]
