"""The port that every model adapter implements, and the types that cross it.

`ChatModel.stream` yields `Chunk`s in the order in which the provider sent them. A stream that ends without a `Finish`
did not end well: the adapter raises `ProviderUnavailable` instead. Closing the iterator (or cancelling the task that
reads it) closes the provider's connection at once.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A tool call that an assistant message made."""

    call_id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResultPart:
    """The outcome of a tool call, in a message of role `tool`. `content` is text, usually JSON."""

    call_id: str
    name: str
    content: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ModelMessage:
    """One message of the history that a model is given."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[TextPart | ToolCallPart | ToolResultPart, ...]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that the model may call. `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What a model is asked. `max_output_tokens` is always set: nothing runs without a bound."""

    messages: tuple[ModelMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    max_output_tokens: int = 4096
    temperature: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of visible text. Never empty, always whole code points, no lone surrogate, no NUL."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningChunk:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallChunk:
    """A whole tool call: arguments are gathered by the adapter and parsed.

    `arguments` is None when the model sent something that is not a JSON object; `raw` is what it sent.
    """

    call_id: str
    name: str
    arguments: dict[str, Any] | None
    raw: str


@dataclass(frozen=True, slots=True)
class UsageChunk:
    """Token counts of this call so far; a later one replaces an earlier one."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class FinishReason(StrEnum):
    """Why a model stopped."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"


@dataclass(frozen=True, slots=True)
class Finish:
    """The last chunk of a stream that ended well."""

    reason: FinishReason


Chunk = TextChunk | ReasoningChunk | ToolCallChunk | UsageChunk | Finish


class ChatModel(Protocol):
    """A model that can be asked."""

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes.

        Raises a subclass of `parley.llm.errors.ModelError`; the four timeouts (connect, first token, idle, total) are
        among them.
        """
        ...
