"""How many tokens a text or a request is, before a provider has counted: by one rule, on the cautious side.

A token is taken for every three bytes of UTF-8. English prose has about four and a half characters to a token, source
code and tables about three, Chinese and Japanese about one (three bytes): so prose is overestimated by about half, and
the others are hardly underestimated. An image is a flat figure, the most that the large providers count for one at the
size to which they scale it. Each message has a few tokens around it.
"""

from collections.abc import Iterable

import orjson

from parley.llm.ports import ImagePart, ModelMessage, ModelRequest, Part, TextPart, ToolCallPart, ToolSpec
from parley.llm.registry import Capability, ModelEntry

BYTES_PER_TOKEN = 3
IMAGE_TOKENS = 1600
MESSAGE_TOKENS = 6


def text_tokens(text: str) -> int:
    """Return the estimate of a text."""
    return byte_tokens(len(text) if text.isascii() else len(text.encode(errors="replace")))


def byte_tokens(size: int) -> int:
    """Return the estimate of a text of so many bytes."""
    return -(-size // BYTES_PER_TOKEN)


def part_tokens(part: Part) -> int:
    """Return the estimate of a message's part."""
    match part:
        case TextPart(text=text):
            return text_tokens(text)
        case ImagePart():
            return IMAGE_TOKENS
        case ToolCallPart():
            return text_tokens(part.name) + text_tokens(orjson.dumps(part.arguments, default=str).decode())
        case _:
            return text_tokens(part.name) + text_tokens(part.content)


def message_tokens(message: ModelMessage) -> int:
    """Return the estimate of a message."""
    return MESSAGE_TOKENS + sum(part_tokens(part) for part in message.parts)


def tool_tokens(tools: Iterable[ToolSpec]) -> int:
    """Return the estimate of what a model is told of its tools."""
    return sum(
        MESSAGE_TOKENS + text_tokens(tool.name + tool.description + orjson.dumps(tool.parameters, default=str).decode())
        for tool in tools
    )


def request_tokens(request: ModelRequest) -> int:
    """Return the estimate of a request's input."""
    return (
        sum(message_tokens(message) for message in request.messages)
        + tool_tokens(request.tools)
        + text_tokens(request.prefill or "")
    )


def output_room(entry: ModelEntry) -> int:
    """Return how many tokens a model may answer with: its bound, but never more than half of its context."""
    return min(entry.max_output_tokens, entry.context // 2)


def can_take(entry: ModelEntry, request: ModelRequest) -> bool:
    """Return whether a request that was made for another model can be given to this one: it fits, images and all."""
    images = any(isinstance(part, ImagePart) for message in request.messages for part in message.parts)
    if images and Capability.IMAGES not in entry.capabilities:
        return False
    return request_tokens(request) + min(request.max_output_tokens, output_room(entry)) <= entry.context
