"""Completions as they go over the wire, whole and in chunks. Encoded by hand: a chunk is sent for every delta."""

from collections.abc import Sequence
from typing import Any

import orjson

from parley.llm.ports import FinishReason, ToolCallChunk
from parley.usage.service import Tally

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still here\n\n"


def usage_of(tally: Tally) -> dict[str, Any]:
    """Return the token counts as OpenAI shows them."""
    return {
        "prompt_tokens": tally.input_tokens,
        "completion_tokens": tally.output_tokens,
        "total_tokens": tally.input_tokens + tally.output_tokens,
        "prompt_tokens_details": {"cached_tokens": tally.cached_tokens},
    }


def _tool_call(call: ToolCallChunk) -> dict[str, Any]:
    # What the model wrote, whether it can be parsed or not: the caller's code expects to see for itself.
    function = {"name": call.name, "arguments": call.raw or "{}"}
    return {"id": call.call_id, "type": "function", "function": function}


class Chunks:
    """Encodes the chunks of one completion."""

    def __init__(self, id: str, *, created: int, model: str, include_usage: bool) -> None:
        self._id = id
        self._created = created
        self._include_usage = include_usage
        rest = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._open = b'},"logprobs":null,"finish_reason":null}]' + rest
        self._last = b"}]" + rest
        self.model = model

    @property
    def model(self) -> str:
        """The model that answers."""
        return self._model

    @model.setter
    def model(self, model: str) -> None:
        self._model = model
        about = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": model}
        self._about = b"data: " + orjson.dumps({**about, "system_fingerprint": None})[:-1]
        self._head = self._about + b',"choices":[{"index":0,"delta":{'
        self._text = self._head + b'"content":'
        self._reasoning = self._head + b'"reasoning_content":'

    def role(self) -> bytes:
        """Return the first chunk."""
        return self._head + b'"role":"assistant","content":"","refusal":null' + self._open

    def text(self, text: str) -> bytes:
        """Return a piece of the answer."""
        return self._text + orjson.dumps(text) + self._open

    def reasoning(self, text: str) -> bytes:
        """Return a piece of reasoning, in the field that DeepSeek, vLLM and others have for it."""
        return self._reasoning + orjson.dumps(text) + self._open

    def tool_call(self, index: int, call: ToolCallChunk) -> bytes:
        """Return a whole tool call."""
        return self._head + b'"tool_calls":' + orjson.dumps([{"index": index, **_tool_call(call)}]) + self._open

    def finish(self, reason: FinishReason) -> bytes:
        """Return the last chunk with a choice."""
        return self._head + b'},"logprobs":null,"finish_reason":' + orjson.dumps(reason.value) + self._last

    def usage(self, tally: Tally) -> bytes:
        """Return the chunk that has the counts and no choice."""
        return self._about + b',"choices":[],"usage":' + orjson.dumps(usage_of(tally)) + b"}\n\n"


def completion(
    id: str,
    *,
    created: int,
    model: str,
    text: str,
    reasoning: str,
    calls: Sequence[ToolCallChunk],
    finish: FinishReason,
    tally: Tally,
) -> bytes:
    """Return a whole completion."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message["content"] = text or None
        message["tool_calls"] = [_tool_call(call) for call in calls]
    if reasoning:
        message["reasoning_content"] = reasoning
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.value}
    return orjson.dumps(
        {
            "id": id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [choice],
            "usage": usage_of(tally),
            "system_fingerprint": None,
        }
    )
