"""Reads what OpenAI's Responses API says: its stream of events, and the response as a whole once it has ended.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from parley.llm.adapters.gathering import MAX_TOOL_CALLS, GatheredCall, as_text, state_of
from parley.llm.adapters.refusals import read_error
from parley.llm.adapters.reply_stream import as_count
from parley.llm.errors import BadOutput, ModelError, ProviderUnavailable, ReattachRefused
from parley.llm.ports import (
    Chunk,
    CursorChunk,
    Finish,
    FinishReason,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
    UsageChunk,
)
from parley.llm.sse import Event
from parley.llm.text import TextJoiner, clean, read_json

RUNNING = frozenset({"queued", "in_progress"})
"""The states of a response that has not ended."""

_CURSOR = re.compile(r"([A-Za-z0-9_-]{1,200}):(\d{1,15}):(\d{1,15})", re.ASCII)
_RESPONSE_ID = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the stream of a response: behind the event `number`, which ends `chars` code points of visible text.

    The id goes into a path, so it may hold nothing but letters, digits, `_` and `-`.
    """

    response_id: str
    number: int
    chars: int

    @classmethod
    def parse(cls, cursor: str) -> Self:
        """Read a cursor. Raises `ReattachRefused` for one that this adapter has not made."""
        if (match := _CURSOR.fullmatch(cursor)) is None:
            raise ReattachRefused
        return cls(match[1], int(match[2]), int(match[3]))

    @property
    def cursor(self) -> str:
        """The place as text."""
        return f"{self.response_id}:{self.number}:{self.chars}"


class ResponseParser:
    """Reads a streamed response, from its beginning or from behind `place`.

    Behind a place, events that stand before it are passed over, for some servers send them again, and a stream that
    does not begin with the next event, or begins with an error, is a `ReattachRefused`.

    `places`: whether there is anything to go back to. `maker` marks what the model wants back with its tool calls.
    `refusal_is_filtered`: an answer that is a refusal ends with `content_filter`; else it is text like any other.
    """

    def __init__(
        self, place: Place | None = None, *, places: bool = True, maker: str = "", refusal_is_filtered: bool = False
    ) -> None:
        self.started = False
        self.finished = False
        self.done = False
        self.ended = False
        """Whether the provider has nothing left to stop."""
        self.response_id = place.response_id if place else ""
        self.place = place
        """The last place that can be gone back to."""
        self.called = False
        """Whether a tool call has begun: behind it there are no places."""
        self.refused = False
        """Whether the provider itself has told of a failure."""
        self._places = places
        self._maker = maker
        self._refusal_is_filtered = refusal_is_filtered
        self._behind = self._resuming = place is not None
        self._number = place.number if place else -1
        self._chars = place.chars if place else 0
        self._last = b""
        self._fresh = False
        self._reason = FinishReason.STOP
        self._usage: UsageChunk | None = None
        self._text = TextJoiner()
        self._reasoning = TextJoiner()
        self._calls: dict[object, GatheredCall] = {}
        self._calls_seen = 0
        self._thoughts: list[dict[str, Any]] = []
        self._handlers: dict[object, Callable[[dict[str, Any]], Iterable[Chunk]]] = {
            "response.output_text.delta": self._on_text,
            "response.refusal.delta": self._on_refusal,
            "response.reasoning_text.delta": self._on_reasoning,
            "response.reasoning_summary_text.delta": self._on_reasoning,
            "response.reasoning_summary_part.added": self._on_summary_part,
            "response.created": self._on_created,
            "response.output_item.added": self._on_item,
            "response.output_item.done": self._on_item_done,
            "response.function_call_arguments.delta": self._on_arguments,
            "response.function_call_arguments.done": self._on_arguments_done,
            "response.completed": self._on_end,
            "response.incomplete": self._on_end,
            "response.failed": self._on_failed,
            "response.cancelled": self._on_failed,
            "error": self._on_error,
        }

    def feed(self, event: Event) -> Iterable[Chunk]:
        """Read one event. Raises `ModelError`."""
        data = event[1]
        if data == b"[DONE]":  # not OpenAI's way here, but some servers keep the habit
            self.done = True
            return ()
        payload = read_json(data)
        if type(payload) is not dict:
            raise BadOutput
        try:
            kind = payload.get("type")
            if kind != "error" and not self._is_next(payload, data):
                return ()
            # Events of other types carry nothing that is not in these, and new ones may come at any time.
            handler = self._handlers.get(kind)
            return handler(payload) if handler is not None else ()
        except (AttributeError, KeyError, TypeError):
            raise BadOutput from None

    def end(self) -> Iterable[Chunk]:
        """Return what is left when the stream has ended well, a `Finish` last."""
        if rest := self._reasoning.flush():
            yield ReasoningChunk(rest)
        if rest := self._text.flush():
            yield TextChunk(rest)
        for call in self._calls.values():
            yield call.chunk()
        if self._usage is not None:
            yield self._usage
        yield Finish(_with_calls(self._reason, called=self._calls_seen > 0))

    def _is_next(self, payload: dict[str, Any], data: bytes) -> bool:
        number = payload.get("sequence_number")
        if type(number) is not int:
            self._fresh = False
            return True
        # A whole stream is taken as it comes: some servers do not count in it.
        if self._behind and number <= self._number:
            return False
        if self._resuming and number != self._number + 1:
            raise ReattachRefused
        self._resuming = False
        if number == self._number > 0 and data == self._last:
            return False  # the same event once more, of a server that counts
        self._last = data
        self._fresh = number > self._number
        self._number = max(number, self._number)
        return True

    def _visible(self, chunk: TextChunk | ReasoningChunk) -> Iterable[Chunk]:
        if (
            not self._places
            or not self._fresh
            or not self.response_id
            or self.called
            # What has come of a character would be lost behind the place.
            or self._text.waiting
            or self._reasoning.waiting
        ):
            return (chunk,)
        self.place = Place(self.response_id, self._number, self._chars)
        return (chunk, CursorChunk(self.place.cursor))

    def _on_text(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        self.started = True
        text = self._text.feed(payload["delta"])
        self._chars += len(text)
        return self._visible(TextChunk(text)) if text else ()

    def _on_refusal(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        if self._refusal_is_filtered:
            self._reason = FinishReason.CONTENT_FILTER
        return self._on_text(payload)

    def _on_reasoning(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        self.started = True
        text = self._reasoning.feed(payload["delta"])
        return self._visible(ReasoningChunk(text)) if text else ()

    def _on_summary_part(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        return self._visible(ReasoningChunk("\n\n")) if payload.get("summary_index") else ()

    def _on_created(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        found = payload["response"]["id"]
        if _RESPONSE_ID.fullmatch(found):
            self.response_id = found
        return ()

    def _on_item(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        item = payload["item"]
        if item["type"] == "function_call":
            self.started = self.called = True
            index = payload["output_index"]
            call_id = as_text(item.get("call_id"))
            if (known := self._calls.get(index)) is not None and known.id == call_id:
                return ()  # the same event once more
            self._calls_seen += 1
            if self._calls_seen > MAX_TOOL_CALLS:
                raise BadOutput
            call = self._calls[index] = GatheredCall(call_id, item.get("name"))
            thoughts, self._thoughts = self._thoughts, []
            call.state = state_of(self._maker, thoughts, sum(len(str(thought)) for thought in thoughts))
        return ()

    def _on_arguments(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        self._calls[payload["output_index"]].add(payload["delta"])
        return ()

    def _on_arguments_done(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        call = self._calls[payload["output_index"]]
        if not call.begun:
            call.add(payload["arguments"])
        return ()

    def _on_item_done(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        item = payload["item"]
        if item["type"] == "reasoning" and item.get("encrypted_content"):
            fields = {"id", "summary", "encrypted_content"} & item.keys()
            self._thoughts.append({"type": "reasoning", **{field: item[field] for field in fields}})
        call = self._calls.pop(payload["output_index"], None)
        if call is None:
            return ()
        if not call.begun:
            call.add(item.get("arguments") or "")
        return (call.chunk(),)

    def _on_end(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        response = payload["response"]
        if self._reason is not FinishReason.CONTENT_FILTER:
            self._reason = _reason(response, incomplete=payload["type"] == "response.incomplete")
        self._usage = read_usage(response)
        self.finished = self.done = self.ended = True
        return ()

    def _on_failed(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        self.ended = True
        raise failure(payload["response"])

    def _on_error(self, payload: dict[str, Any]) -> Iterable[Chunk]:
        if self._resuming:
            raise ReattachRefused
        self.refused = True
        inner = payload.get("error")
        raise read_error(inner if isinstance(inner, dict) else payload)


@dataclass(frozen=True, slots=True)
class WholeResponse:
    """A response that has ended well."""

    text: str
    calls: tuple[ToolCallChunk, ...]
    usage: UsageChunk | None
    finish: Finish

    @classmethod
    def read(cls, response: Mapping[str, Any], *, refusal_is_filtered: bool = False) -> Self:
        """Read the object that the API keeps of a response. Raises `ModelError`."""
        texts: list[str] = []
        refused = False
        calls: list[ToolCallChunk] = []
        try:
            for item in response["output"]:
                if item["type"] == "message":
                    # In a stream both come as visible text.
                    texts.extend(part.get("text") or part.get("refusal") or "" for part in item["content"])
                    refused = refused or any(part.get("refusal") for part in item["content"])
                elif item["type"] == "function_call":
                    call = GatheredCall(item.get("call_id"), item.get("name"))
                    call.add(item.get("arguments") or "")
                    calls.append(call.chunk())
            text = clean("".join(texts))
            reason = _with_calls(_reason(response, incomplete=response["status"] == "incomplete"), called=bool(calls))
            if refused and refusal_is_filtered:
                reason = FinishReason.CONTENT_FILTER
        except (AttributeError, KeyError, TypeError):
            raise BadOutput from None
        if len(calls) > MAX_TOOL_CALLS:
            raise BadOutput
        return cls(text, tuple(calls), read_usage(response), Finish(reason))


def failure(response: Mapping[str, Any]) -> ModelError:
    """Return the error that a response ended with."""
    error = response.get("error")
    return read_error(error) if error else ProviderUnavailable("The model provider stopped its answer.")


def read_usage(response: Mapping[str, Any]) -> UsageChunk | None:
    """Read the token counts of a response that has ended."""
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("input_tokens_details")
    return UsageChunk(
        input_tokens=as_count(usage.get("input_tokens")),
        cached_tokens=as_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        output_tokens=as_count(usage.get("output_tokens")),
    )


def _reason(response: Mapping[str, Any], *, incomplete: bool) -> FinishReason:
    if not incomplete:
        return FinishReason.STOP
    details = response.get("incomplete_details")
    why = details.get("reason") if isinstance(details, dict) else None
    return FinishReason.CONTENT_FILTER if why == "content_filter" else FinishReason.LENGTH


def _with_calls(reason: FinishReason, *, called: bool) -> FinishReason:
    return FinishReason.TOOL_CALLS if called and reason is FinishReason.STOP else reason
