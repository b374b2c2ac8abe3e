"""The port that every model adapter implements, and the types that cross it.

`ChatModel.stream` yields `Chunk`s in the order in which the provider sent them. A stream that ends without a `Finish`
did not end well: the adapter raises `ProviderUnavailable` instead. Closing the iterator (or cancelling the task that
reads it) closes the provider's connection at once.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image of a user message: the bytes of a PNG, JPEG, GIF or WebP file.

    `detail` is how closely the model is to look, in the provider's words (OpenAI: low, high, auto); None leaves it to
    the provider. Only models with the capability `images` may be given one.
    """

    media_type: str
    data: bytes = field(repr=False)
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class ProviderState:
    """What a model wants back, unread, with the tool call that it came with: signed reasoning and the like.

    `maker` says which adapter and model it is for; every other one leaves it out. A call whose state was lost is
    still a good call: the model then only thinks anew.
    """

    maker: str
    value: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A tool call that an assistant message made. `state` is that of its `ToolCallChunk`, where it is still known."""

    call_id: str
    name: str
    arguments: dict[str, Any]
    state: ProviderState | None = None


@dataclass(frozen=True, slots=True)
class ToolResultPart:
    """The outcome of a tool call, in a message of role `tool`. `content` is text, usually JSON."""

    call_id: str
    name: str
    content: str
    failed: bool = False


Part = TextPart | ImagePart | ToolCallPart | ToolResultPart
"""A part of a message. Images stand in user messages, calls in the assistant's, results in those of tools."""


@dataclass(frozen=True, slots=True)
class ModelMessage:
    """One message of the history that a model is given."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that the model may call. `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The form that an answer must have: a JSON schema of type object.

    `name` is of letters, digits, `_` and `-`, at most 64. `strict` asks for a guarantee where the provider gives one;
    it is dropped for a schema that the provider's strict form cannot say (see `parley.llm.schemas`). Wherever the
    answer comes from, it is text: the caller has to validate it.
    """

    name: str
    schema: dict[str, Any]
    strict: bool = True


ToolChoice = Literal["auto", "none", "required"] | str
"""Whether tools may, must not or must be called; any other text is the name of the tool that must be called."""


@dataclass(slots=True, eq=False)
class OnClose:
    """What becomes of an answer at the provider when its reader closes it before its end.

    The reader's side holds it and may change it at any time before it closes.
    """

    keep_running: bool = False
    """Leave the answer to go on where it can be read on (`Reattachable`): another process does, or is about to.

    An answer that has not yielded a cursor is stopped all the same: nobody could read on.
    """


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What a model is asked.

    `max_output_tokens` is always set: nothing runs without a bound, and the model's own is usually the smaller one.

    `prefill` is the beginning of the answer, which the model goes on from without repeating it; only models whose
    entry says how (`ModelEntry.prefill`) are given one. `response_schema` reaches only models with the capability
    `json_schema`: others have to be told of it in words. `stop` are texts at which the model ends, without saying them.
    `parallel_tools` set to False allows one tool call at a time, where the provider can be told so; None leaves it to
    the provider.
    """

    messages: tuple[ModelMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    max_output_tokens: int = 131_072
    temperature: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    prefill: str | None = None
    response_schema: JsonSchema | None = None
    tool_choice: ToolChoice | None = None
    stop: tuple[str, ...] = ()
    parallel_tools: bool | None = None
    on_close: OnClose = field(default_factory=OnClose, compare=False, repr=False)


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

    `arguments` is None when the model sent something that is not a JSON object; `raw` is what it sent. `state` goes
    back into the `ToolCallPart` of the same call.
    """

    call_id: str
    name: str
    arguments: dict[str, Any] | None
    raw: str
    state: ProviderState | None = None


@dataclass(frozen=True, slots=True)
class UsageChunk:
    """Token counts of this call so far; a later one replaces an earlier one.

    `input_tokens` has all input, also what was read from a cache (`cached_tokens`) and what was written to one
    (`cache_written_tokens`; only Anthropic counts that apart). `output_tokens` has the reasoning too.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cache_written_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CursorChunk:
    """A place in the provider's stream that it can be read on from: all before it is in the chunks before this one.

    `cursor` is the adapter's own text, at most 300 characters. It comes from adapters that are `Reattachable`, and
    never after the first tool call of a stream: what a cursor leaves out nobody else remembers.
    """

    cursor: str


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


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """A model is being asked. What follows, until the next of these, is its answer.

    `attempt` counts from 1 over all models of the call. `after_text`: something of an earlier attempt's answer has been
    yielded. It stands until this attempt's first piece of text, reasoning or tool call comes: then it is void, unless
    `continues`, which says that this attempt goes on from the text so far. `failed` is the code of the error that ended
    the attempt before this one.
    """

    model_id: str
    attempt: int
    strategy: Literal["first", "retry", "fallback"] = field(default="first", compare=False)
    after_text: bool = field(default=False, compare=False)
    continues: bool = field(default=False, compare=False)
    failed: str | None = field(default=None, compare=False)


Chunk = TextChunk | ReasoningChunk | ToolCallChunk | UsageChunk | CursorChunk | Finish


class ChatModel(Protocol):
    """A model that can be asked."""

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes.

        Raises a subclass of `parley.llm.errors.ModelError`; the four timeouts (connect, first token, idle, total) are
        among them.
        """
        ...


@runtime_checkable
class Reattachable(Protocol):
    """A model whose answer goes on at the provider while nobody reads it, and can be read on from a cursor.

    Closing such a stream before its end stops the answer at the provider, unless `request.on_close` says otherwise.
    """

    def reattach(self, request: ModelRequest, cursor: str, *, said: str) -> AsyncGenerator[Chunk]:
        """Read on from a cursor that an earlier stream yielded.

        `said` is the visible text of that one answer which has been kept; it may reach beyond the cursor, for the
        process may have ended between a text and its cursor. Yields the text after `said`, exactly, and of all else
        what follows the cursor. Raises `ReattachRefused` before the first chunk when the provider no
        longer has the stream and the rest cannot be had otherwise, other `ModelError`s as `stream` does.
        """
        ...
