"""Calls models and counts what the calls use."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from types import TracebackType
from typing import Self

import httpx

from parley.llm.errors import ModelError, ModelNotUsable, ReattachRefused, UnknownModel
from parley.llm.factory import build_model
from parley.llm.ports import (
    AttemptStarted,
    Chunk,
    Finish,
    ModelRequest,
    OnClose,
    ReasoningChunk,
    Reattachable,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolCallPart,
    UsageChunk,
)
from parley.llm.registry import ModelEntry, ModelRegistry
from parley.llm.retry import Candidate, stream_with_retries

_MILLION = Decimal(1_000_000)
_COST_STEP = Decimal("0.00000001")
_CHARS_PER_TOKEN = 4

StreamItem = AttemptStarted | Chunk


@dataclass(frozen=True, slots=True)
class Tally:
    """What a call has used so far. `estimated` when any count is ours and not the provider's."""

    model_id: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    estimated: bool
    cost: Decimal


class ModelCall:
    """A running call of a model.

    Iterate it once for its items; close it, or leave its `async with`, to stop the provider at once. `tally` can be
    read at any time, also after a stop or a failure.

    Some providers go on with an answer that nobody reads, and have to be told to stop. Closing does that, and so does
    cancelling the task that reads. Call `detach` before either when the answer is to go on: for another process, to
    which this one hands the reply over, or which has taken it over already.
    """

    def __init__(
        self,
        entries: Sequence[ModelEntry],
        request: ModelRequest,
        ask: Callable[[ModelRequest], AsyncGenerator[StreamItem]],
        *,
        said: str | None = None,
    ) -> None:
        self._entries = {entry.id: entry for entry in entries}
        # The way of closing is this call's own, whoever else asks with the same request.
        self._request = replace(request, on_close=OnClose())
        self._usage = UsageChunk()
        # An answer that is read on has been paid for from its beginning.
        self._chars = len(said or "")
        self._finished = False
        self._asked = said is not None
        self.entry = entries[0]
        """The model that is answering; another one after a fallback."""
        self._items = self._run(ask(self._request))

    def __aiter__(self) -> AsyncGenerator[StreamItem]:
        return self._items

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the call."""
        await self._items.aclose()

    def detach(self) -> None:
        """Let the answer go on at the provider, where it can, when this call is closed or its reader cancelled.

        An answer that has not yielded a `CursorChunk` is stopped all the same, for nobody could read on. Nothing else
        changes: the call can be read to its end, and has to be closed.
        """
        self._request.on_close.keep_running = True

    @property
    def tally(self) -> Tally:
        """What the call has used so far, estimated from characters where the provider has not said it."""
        usage = self._usage
        input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
        estimated = False
        if self._asked and not input_tokens:
            input_tokens = _tokens(_request_chars(self._request))
            estimated = True
        # A provider that was stopped early has not sent its last count, and Anthropic has sent a first one of 1.
        if self._chars and not (self._finished and output_tokens):
            output_tokens = max(output_tokens, _tokens(self._chars))
            estimated = True
        counted = UsageChunk(input_tokens, usage.cached_tokens, output_tokens)
        return Tally(
            model_id=self.entry.id,
            input_tokens=input_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=output_tokens,
            estimated=estimated,
            cost=cost_of(self.entry, counted),
        )

    async def _run(self, source: AsyncGenerator[StreamItem]) -> AsyncGenerator[StreamItem]:
        try:
            async with aclosing(source) as items:
                async for item in items:
                    match item:
                        case TextChunk(text=text) | ReasoningChunk(text=text):
                            self._chars += len(text)
                        case ToolCallChunk(name=name, raw=raw):
                            self._chars += len(name) + len(raw)
                        case UsageChunk():
                            self._usage = item
                        case Finish():
                            self._finished = True
                        case AttemptStarted(model_id=model_id):
                            self.entry = self._entries[model_id]
                            self._usage = UsageChunk()
                            self._chars = 0
                            self._asked = True
                    yield item
        except ModelError:
            # Providers do not charge for what they refuse; what was shown before a failure is counted.
            if not self._chars:
                self._asked = False
            raise


class UsageService:
    """The way to the models. Built once per process from the registry and the shared HTTP client."""

    def __init__(self, registry: ModelRegistry, http: httpx.AsyncClient) -> None:
        self.registry = registry
        self._candidates = {entry.id: Candidate(entry, build_model(entry, http)) for entry in registry.entries()}

    def stream(self, request: ModelRequest, model: str | None = None) -> ModelCall:
        """Start a call of a model or alias; None means the alias `default`. Nothing is sent before it is iterated.

        A request with a prefill goes to that one model and to no fallback: others would begin anew. Raises
        `UnknownModel` and `ModelNotUsable` here, the latter also for a prefill that the model cannot go on from, and a
        `ModelError` while the items are read.
        """
        entry = self.registry.resolve(model)
        chosen = [entry, *self.registry.fallbacks(entry)]
        if request.prefill:
            if entry.prefill is None:
                raise ModelNotUsable(f"The model {entry.id} cannot go on with an answer that another call began.")
            chosen = [entry]
        candidates = [self._candidates[one.id] for one in chosen]
        return ModelCall(chosen, request, lambda own: stream_with_retries(candidates, own))

    def reattach(self, request: ModelRequest, model_id: str, cursor: str, *, said: str) -> ModelCall:
        """Read on where an earlier call of a model was left, from a `CursorChunk` of that call.

        `request` is what that call asked; `said` is the visible text of its answer that has been kept, which may reach
        beyond the cursor. The items are what follows `said`, without an `AttemptStarted`: what came before still
        holds. It is one attempt, of this model alone. The tally counts the answer from its beginning.

        Raises `ReattachRefused` here when there is no such model any more or it cannot do this, and when the items are
        read, before the first of them, when the provider no longer has the answer; other `ModelError`s as `stream`.
        """
        try:
            entry = self.registry.resolve(model_id)
        except (UnknownModel, ModelNotUsable):
            raise ReattachRefused from None
        model = self._candidates[entry.id].model
        if entry.id != model_id or not isinstance(model, Reattachable):
            raise ReattachRefused
        return ModelCall([entry], request, lambda own: model.reattach(own, cursor, said=said), said=said)

    def can_prefill(self, model_id: str) -> bool:
        """Return whether this very model, not an alias, can be called now and given the beginning of its answer."""
        try:
            entry = self.registry.resolve(model_id)
        except (UnknownModel, ModelNotUsable):
            return False
        return entry.id == model_id and entry.prefill is not None


def cost_of(entry: ModelEntry, usage: UsageChunk) -> Decimal:
    """Return the cost in dollars, to 8 decimals. Cached tokens are input tokens with a price of their own."""
    cached = min(usage.cached_tokens, usage.input_tokens)
    price = entry.price
    total = (
        price.input * (usage.input_tokens - cached) + price.cached_input * cached + price.output * usage.output_tokens
    )
    return (total / _MILLION).quantize(_COST_STEP, rounding=ROUND_HALF_UP)


def _tokens(chars: int) -> int:
    return -(-chars // _CHARS_PER_TOKEN)


def _request_chars(request: ModelRequest) -> int:
    chars = len(request.prefill or "")
    chars += sum(len(tool.name) + len(tool.description) + len(str(tool.parameters)) for tool in request.tools)
    for message in request.messages:
        for part in message.parts:
            if isinstance(part, TextPart):
                chars += len(part.text)
            elif isinstance(part, ToolCallPart):
                chars += len(part.name) + len(str(part.arguments))
            else:
                chars += len(part.content)
    return chars
