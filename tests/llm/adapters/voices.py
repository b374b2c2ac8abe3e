"""How each provider says a thing in its stream, written from its documentation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import orjson

Event = bytes
Call = tuple[str, str, Sequence[str]]
"""Id, name, and the arguments in the pieces in which they come."""


class Voice(Protocol):
    """Says the parts of one answer as server-sent events."""

    @property
    def interleaves(self) -> bool:
        """Whether the pieces of two calls may come mixed."""
        ...

    @property
    def has_ids(self) -> bool:
        """Whether calls have ids."""
        ...

    def opening(self) -> list[Event]: ...
    def text(self, text: str, *, raw: str | None = None) -> list[Event]: ...
    def reasoning(self, pieces: Sequence[str]) -> list[Event]: ...
    def calls(self, calls: Sequence[Call]) -> list[Event]: ...
    def ending(self, reason: str, *, usage: dict[str, Any] | None = None) -> list[Event]: ...
    def usage(self, *, given: Any, cached: Any, made: Any) -> dict[str, Any]: ...
    def last(self) -> list[Event]: ...
    def error(self) -> list[Event]: ...


def _data(value: object) -> Event:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _raw(value: object, raw: str | None) -> Event:
    """Write a value in which the text `@@` stands for a JSON text of the test's own."""
    event = _data(value)
    return event if raw is None else event.replace(b'"@@"', f'"{raw}"'.encode())


def interleaved(calls: Sequence[Call]) -> Iterable[tuple[int, str]]:
    """Yield the pieces of all calls in turn."""
    for step in range(max(len(pieces) for _, _, pieces in calls)):
        for index, (_, _, pieces) in enumerate(calls):
            if step < len(pieces):
                yield index, pieces[step]


@dataclass
class OpenAIVoice:
    """Chat completions: https://platform.openai.com/docs/api-reference/chat-streaming and what others make of them."""

    thinks: Literal["reasoning_content", "reasoning", "tags", "blocks"] = "reasoning_content"
    tags: tuple[str, str] = ("<think>", "</think>")
    calling: Literal["pieces", "whole", "no_index", "no_index_no_id"] = "pieces"
    counts: Literal["alone", "with_reason", "x_groq", "always"] = "alone"
    cached_in: str = "prompt_tokens_details.cached_tokens"
    beside: int = 0
    has_ids: bool = True
    reasons: dict[str, str] = field(
        default_factory=lambda: {
            "stop": "stop", "length": "length", "tool_calls": "tool_calls", "content_filter": "content_filter"
        }
    )  # fmt: skip

    @property
    def interleaves(self) -> bool:
        return self.calling == "pieces"

    def _event(self, delta: dict[str, Any], reason: str | None = None, raw: str | None = None, **more: Any) -> Event:
        if self.counts == "always":
            more = {"usage": self.usage(given=1, cached=0, made=0), **more}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
        return _raw({**head, "system_fingerprint": None, "choices": [choice], **more}, raw)

    def opening(self) -> list[Event]:
        return [self._event({"role": "assistant", "content": ""})]

    def text(self, text: str, *, raw: str | None = None) -> list[Event]:
        return [self._event({"content": "@@" if raw is not None else text}, raw=raw)]

    def reasoning(self, pieces: Sequence[str]) -> list[Event]:
        match self.thinks:
            case "tags":
                whole = [self.tags[0] + "\n", *pieces, "\n" + self.tags[1], "\n\n"]
                return [event for piece in whole for event in self.text(piece)]
            case "blocks":
                blocks = [[{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}] for piece in pieces]
                return [self._event({"content": block}) for block in blocks]
            case name:
                return [self._event({name: piece}) for piece in pieces]

    def calls(self, calls: Sequence[Call]) -> list[Event]:
        if self.calling == "pieces":
            heads = [
                {"index": at, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                for at, (call_id, name, _) in enumerate(calls)
            ]
            rest = [{"index": at, "function": {"arguments": piece}} for at, piece in interleaved(calls)]
            return [self._event({"tool_calls": [one]}) for one in (*heads, *rest)]
        whole = []
        for at, (call_id, name, pieces) in enumerate(calls):
            call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": "".join(pieces)}}
            call |= {"index": at} if self.calling == "whole" else {}
            call |= {} if self.calling == "no_index_no_id" else {"id": call_id}
            whole.append(self._event({"role": "assistant", "content": None, "tool_calls": [call]}))
        return whole

    def ending(self, reason: str, *, usage: dict[str, Any] | None = None) -> list[Event]:
        word = self.reasons[reason]
        if usage is None:
            return [self._event({}, word), *self.last()]
        match self.counts:
            case "alone":
                head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage}
                return [self._event({}, word), _data(head), *self.last()]
            case "x_groq":
                return [self._event({}, word, x_groq={"id": "req_1", "usage": usage}), *self.last()]
            case _:
                return [self._event({}, word, usage=usage), *self.last()]

    def usage(self, *, given: Any, cached: Any, made: Any) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": 0}
        if self.beside:
            usage |= {"completion_tokens": made - self.beside, "total_tokens": given + made}
        outer, _, inner = self.cached_in.partition(".")
        return usage | {outer: {inner: cached} if inner else cached}

    def last(self) -> list[Event]:
        return [b"data: [DONE]\n\n"]

    def error(self) -> list[Event]:
        return [_data({"error": {"message": "secret", "type": "server_error", "code": 503}})]


@dataclass
class AnthropicVoice:
    """Messages: https://docs.anthropic.com/en/docs/build-with-claude/streaming."""

    interleaves: bool = False
    has_ids: bool = True
    reasons: dict[str, str] = field(
        default_factory=lambda: {
            "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"
        }
    )  # fmt: skip

    def _event(self, kind: str, raw: str | None = None, **fields: Any) -> Event:
        return f"event: {kind}\n".encode() + _raw({"type": kind, **fields}, raw)

    def opening(self) -> list[Event]:
        message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "m"}
        usage = {"input_tokens": 1, "output_tokens": 1}
        return [
            self._event("message_start", message={**message, "stop_reason": None, "usage": usage}),
            self._event("content_block_start", index=1, content_block={"type": "text", "text": ""}),
            self._event("ping"),
        ]

    def text(self, text: str, *, raw: str | None = None) -> list[Event]:
        delta = {"type": "text_delta", "text": "@@" if raw is not None else text}
        return [self._event("content_block_delta", raw, index=1, delta=delta)]

    def reasoning(self, pieces: Sequence[str]) -> list[Event]:
        block = {"type": "thinking", "thinking": "", "signature": ""}
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
        return [
            self._event("content_block_start", index=0, content_block=block),
            *(
                self._event("content_block_delta", index=0, delta=delta)
                for delta in (*deltas, {"type": "signature_delta", "signature": "c2ln"})
            ),
            self._event("content_block_stop", index=0),
        ]

    def calls(self, calls: Sequence[Call]) -> list[Event]:
        events = [self._event("content_block_stop", index=1)]
        for index, (call_id, name, pieces) in enumerate(calls, start=2):
            block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
            events.append(self._event("content_block_start", index=index, content_block=block))
            events += [
                self._event(
                    "content_block_delta", index=index, delta={"type": "input_json_delta", "partial_json": piece}
                )
                for piece in ("", *pieces)
            ]
            events.append(self._event("content_block_stop", index=index))
        return events

    def ending(self, reason: str, *, usage: dict[str, Any] | None = None) -> list[Event]:
        delta = {"stop_reason": self.reasons[reason], "stop_sequence": None}
        return [self._event("message_delta", delta=delta, usage=usage or {"output_tokens": 1}), *self.last()]

    def usage(self, *, given: Any, cached: Any, made: Any) -> dict[str, Any]:
        # The three kinds of input stand beside each other.
        if isinstance(given, int) and isinstance(cached, int):
            given = given - cached
        return {
            "input_tokens": given,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": made,
        }

    def last(self) -> list[Event]:
        return [self._event("message_stop")]

    def error(self) -> list[Event]:
        return [self._event("error", error={"type": "overloaded_error", "message": "secret"})]


class ResponsesVoice:
    """Responses: https://platform.openai.com/docs/api-reference/responses-streaming."""

    interleaves = False
    has_ids = True

    def __init__(self) -> None:
        self._number = -1
        self.reasons = {
            "stop": "completed",
            "length": "max_output_tokens",
            "tool_calls": "completed",
            "content_filter": "content_filter",
        }

    def _event(self, kind: str, raw: str | None = None, **fields: Any) -> Event:
        self._number += 1
        kind = kind if kind == "error" else f"response.{kind}"
        return f"event: {kind}\n".encode() + _raw({"type": kind, "sequence_number": self._number, **fields}, raw)

    def opening(self) -> list[Event]:
        response = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
        return [self._event("created", response=response), self._event("in_progress", response=response)]

    def text(self, text: str, *, raw: str | None = None) -> list[Event]:
        delta = "@@" if raw is not None else text
        return [self._event("output_text.delta", raw, item_id="msg_1", output_index=1, content_index=0, delta=delta)]

    def reasoning(self, pieces: Sequence[str]) -> list[Event]:
        place: dict[str, Any] = {"item_id": "rs_1", "output_index": 0, "summary_index": 0}
        part = {"type": "summary_text", "text": ""}
        return [
            self._event("output_item.added", output_index=0, item={"type": "reasoning", "id": "rs_1", "summary": []}),
            self._event("reasoning_summary_part.added", **place, part=part),
            *(self._event("reasoning_summary_text.delta", **place, delta=piece) for piece in pieces),
            self._event("reasoning_summary_text.done", **place, text="".join(pieces)),
        ]

    def calls(self, calls: Sequence[Call]) -> list[Event]:
        events = []
        for index, (call_id, name, pieces) in enumerate(calls, start=2):
            item = {"type": "function_call", "id": f"fc_{index}", "call_id": call_id, "name": name, "arguments": ""}
            whole = "".join(pieces)
            events.append(self._event("output_item.added", output_index=index, item=item))
            events += [
                self._event("function_call_arguments.delta", item_id=item["id"], output_index=index, delta=piece)
                for piece in pieces
            ]
            events.append(self._event("function_call_arguments.done", output_index=index, arguments=whole))
            events.append(self._event("output_item.done", output_index=index, item={**item, "arguments": whole}))
        return events

    def ending(self, reason: str, *, usage: dict[str, Any] | None = None) -> list[Event]:
        word = self.reasons[reason]
        status = "completed" if word == "completed" else "incomplete"
        details = None if status == "completed" else {"reason": word}
        response: dict[str, Any] = {
            "id": "resp_1",
            "status": status,
            "incomplete_details": details,
            "output": [],
            "usage": usage,
        }
        return [self._event(status, response=response)]

    def usage(self, *, given: Any, cached: Any, made: Any) -> dict[str, Any]:
        details = {"input_tokens_details": {"cached_tokens": cached}, "output_tokens_details": {"reasoning_tokens": 0}}
        return {"input_tokens": given, "output_tokens": made, "total_tokens": 0, **details}

    def last(self) -> list[Event]:
        return []

    def error(self) -> list[Event]:
        return [self._event("error", code="server_error", message="secret", param=None)]
