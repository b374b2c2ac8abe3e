"""Reads streamed chat completions, in all the forms that compatible servers give them.

https://platform.openai.com/docs/api-reference/chat-streaming
"""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from parley.llm.adapters.gathering import MAX_STATE_CHARS, MAX_TOOL_CALLS, GatheredCall, as_text, state_of
from parley.llm.adapters.refusals import read_error
from parley.llm.adapters.reply_stream import as_count
from parley.llm.adapters.thoughts import ThoughtTags
from parley.llm.errors import BadOutput
from parley.llm.flavours import FLAVOURS, Flavour
from parley.llm.ports import Chunk, Finish, FinishReason, ProviderState, ReasoningChunk, TextChunk, UsageChunk
from parley.llm.sse import Event
from parley.llm.text import TextJoiner, clean, read_json

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,  # Mistral, at the end of its context
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
    "safety": FinishReason.CONTENT_FILTER,
}
# Where the number of cached tokens stands: OpenAI and most others, DeepSeek, Moonshot, Mistral.
_CACHED = ("prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens")


class CompletionParser:
    """Reads one streamed completion.

    `refusal_is_filtered`: an answer that is a refusal ends with `content_filter`; else it is text like any other.
    """

    def __init__(
        self, flavour: Flavour = FLAVOURS["generic"], *, maker: str = "", refusal_is_filtered: bool = False
    ) -> None:
        self.started = False
        self.finished = False
        self.done = False
        self._flavour = flavour
        self._maker = maker
        self._refusal_is_filtered = refusal_is_filtered
        self._reason = FinishReason.STOP
        self._usage: object = None
        self._text = TextJoiner()
        self._reasoning = TextJoiner()
        self._tags = ThoughtTags(*flavour.thought_tags) if flavour.thought_tags else None
        self._calls: list[GatheredCall] = []
        self._call_at: dict[object, GatheredCall] = {}
        self._back: dict[str, list[Any]] = {}
        self._state_chars = 0

    def feed(self, event: Event) -> Iterable[Chunk]:
        """Read one event. Raises `ModelError`."""
        data = event[1]
        if data == b"[DONE]":
            self.done = True
            return ()
        payload = read_json(data)
        if type(payload) is not dict:
            raise BadOutput
        if payload.get("error"):
            raise read_error(payload["error"])
        if usage := payload.get("usage"):
            # Some servers count in every event: only the last of them is read.
            self._usage = usage
        choices = payload.get("choices")
        if not choices:
            # Some servers put the error itself where a completion should be.
            if event[0] == b"error" or payload.get("object") == "error":
                raise read_error(payload)
            return ()
        try:
            choice = choices[0]
            delta = choice.get("delta") or {}
            chunks = self._delta(delta)
            if delta.get("tool_calls"):
                self._gather(delta["tool_calls"])
            if reason := choice.get("finish_reason"):
                self._finish(reason, choice, payload)
        except (AttributeError, KeyError, TypeError):
            raise BadOutput from None
        return chunks

    def end(self) -> Iterable[Chunk]:
        """Return what is left when the stream has ended well, a `Finish` last."""
        if self._tags is not None:
            yield from self._tagged(self._tags.flush())
        if rest := self._reasoning.flush():
            yield ReasoningChunk(rest)
        if rest := self._text.flush():
            yield TextChunk(rest)
        for call in self._calls:
            call.state = self._state(call)
            yield call.chunk()
        if usage := self._counted():
            yield usage
        # Some servers say `stop` after tool calls.
        yield Finish(FinishReason.TOOL_CALLS if self._calls and self._reason is FinishReason.STOP else self._reason)

    def _delta(self, delta: Mapping[str, Any]) -> Iterable[Chunk]:
        content = delta.get("content")
        if type(content) is str and content:
            self.started = True
            if self._tags is not None:
                reasoning = self._thought(delta)
                return [*reasoning, *self._tagged(self._tags.feed(content))]
            text = self._text.feed(content)
            chunk = (TextChunk(text),) if text else ()
            return (*self._thought(delta), *chunk) if len(delta) > 1 else chunk
        if type(content) is list:
            return self._blocks(content)
        if thought := self._thought(delta):
            return thought
        if refusal := delta.get("refusal"):
            if self._refusal_is_filtered:
                self._reason = FinishReason.CONTENT_FILTER
            return self._delta({"content": refusal})
        return ()

    def _thought(self, delta: Mapping[str, Any]) -> tuple[ReasoningChunk, ...]:
        """Read reasoning beside the text, under either of the names that it has."""
        if (details := delta.get("reasoning_details")) and type(details) is list:
            self._keep_details(details)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if type(reasoning) is not str or not reasoning:
            return ()
        self.started = True
        if (field := self._flavour.reasoning_back) is not None:
            self._keep_back(field, reasoning, len(reasoning))
        text = self._reasoning.feed(reasoning)
        return (ReasoningChunk(text),) if text else ()

    def _tagged(self, pieces: Iterable[tuple[bool, str]]) -> Iterable[Chunk]:
        chunks: list[Chunk] = []
        for thought, piece in pieces:
            if thought:
                if text := self._reasoning.feed(piece):
                    chunks.append(ReasoningChunk(text))
            elif text := self._text.feed(piece):
                chunks.append(TextChunk(text))
        if self._tags is not None and self._tags.over:
            self._tags = None
        return chunks

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
            call_id = as_text(piece.get("id"))
            function = piece.get("function") or {}
            call = self._call_of(piece.get("index"), call_id, function)
            call.id = call.id or call_id
            call.name = call.name or as_text(function.get("name"))
            arguments = function.get("arguments")
            if isinstance(arguments, dict):  # against the protocol, but seen
                arguments = orjson.dumps(arguments).decode()
            if arguments:
                call.add(arguments)
            if (extra := piece.get("extra_content")) and call.extra is None:
                self._state_chars += len(str(extra))
                call.extra = extra

    def _call_of(self, index: object, call_id: str, function: Mapping[str, Any]) -> GatheredCall:
        """Find the call that a piece belongs to, or begin it.

        Gemini and others give no index, some give every call the index 0, and ids may be missing too: then another id,
        or a name behind arguments that are whole, is another call.
        """
        if index is None and call_id:
            call = self._calls[-1] if self._calls and self._calls[-1].id == call_id else None
        else:
            call = self._call_at.get(index)
        if call is not None:
            same = not call_id or not call.id or call.id == call_id
            begins = not call_id and function.get("name") and call.whole
            if same and not begins:
                return call
        if len(self._calls) >= MAX_TOOL_CALLS:
            raise BadOutput
        call = self._call_at[index] = GatheredCall(call_id)
        self._calls.append(call)
        return call

    def _finish(self, reason: Any, choice: Mapping[str, Any], payload: Mapping[str, Any]) -> None:
        if reason == "error":  # OpenRouter, when the server behind it failed
            raise read_error(choice.get("error"))
        if type(groq := payload.get("x_groq")) is dict:
            if groq.get("error"):
                raise read_error(groq)
            self._usage = groq.get("usage") or self._usage
        if self._reason is not FinishReason.CONTENT_FILTER:
            self._reason = _FINISH.get(reason.lower(), FinishReason.STOP)
        self.finished = True

    def _counted(self) -> UsageChunk | None:
        usage = self._usage
        if not isinstance(usage, dict):
            return None
        details = usage.get("prompt_tokens_details")
        counts = [details.get("cached_tokens")] if isinstance(details, dict) else []
        cached = max(map(as_count, [*counts, *(usage.get(name) for name in _CACHED)]))
        given, made = as_count(usage.get("prompt_tokens")), as_count(usage.get("completion_tokens"))
        if self._flavour.thoughts_beside_output:
            made = max(made, as_count(usage.get("total_tokens")) - given)
        return UsageChunk(input_tokens=given, cached_tokens=cached, output_tokens=made)

    def _keep_details(self, details: list[Any]) -> None:
        """Keep what OpenRouter wants back: only what nobody but the model can read."""
        for detail in details:
            if isinstance(detail, dict) and detail.get("type") == "reasoning.encrypted":
                self._keep_back("reasoning_details", detail, len(str(detail)))

    def _keep_back(self, field: str, value: Any, size: int) -> None:
        self._state_chars += size
        if self._state_chars <= MAX_STATE_CHARS:
            self._back.setdefault(field, []).append(value)

    def _state(self, call: GatheredCall) -> ProviderState | None:
        """Return what goes back with a call; what belongs to the whole message goes with the first."""
        value: dict[str, Any] = {}
        if call.extra is not None:
            value["call"] = {"extra_content": call.extra}
        if call is self._calls[0] and self._back:
            value["message"] = {
                field: clean("".join(kept)) if isinstance(kept[0], str) else kept for field, kept in self._back.items()
            }
        return state_of(self._maker, value, self._state_chars)
