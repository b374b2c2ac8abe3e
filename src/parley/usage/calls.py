"""A running call of a model, and the count of each of its attempts."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from types import TracebackType
from typing import Self

from parley.core import clock
from parley.core.ids import new_id
from parley.llm.errors import ModelError, ReattachRefused
from parley.llm.estimates import output_room
from parley.llm.ports import (
    AttemptStarted,
    Chunk,
    Finish,
    ModelRequest,
    OnClose,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
    UsageChunk,
)
from parley.llm.registry import Capability, ModelEntry
from parley.llm.retry import Candidate
from parley.usage.ledger import CallRecord, CallStatus
from parley.usage.pricing import cost_of, images_of, input_tokens_of, tokens_of

StreamItem = AttemptStarted | Chunk

# Tokens; few models are faster.
_THOUGHTS_PER_S = 100


@dataclass(frozen=True, slots=True)
class Tally:
    """What a call has used so far, over all its attempts. `estimated` when any count is ours, not the provider's."""

    model_id: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    estimated: bool
    cost: Decimal


class _Attempt:
    """The count of one attempt, while it runs and after."""

    __slots__ = (
        "chars", "ended_at", "entry", "error", "finished", "id", "number", "request", "shows_thoughts", "started_at",
        "usage",
    )  # fmt: skip

    def __init__(self, entry: ModelEntry, request: ModelRequest, number: int, *, said: int = 0) -> None:
        self.id = new_id()
        self.entry = entry
        self.request = request
        self.number = number
        self.started_at = clock.now()
        self.ended_at: datetime | None = None
        self.usage = UsageChunk()
        self.chars = said
        self.finished = False
        self.shows_thoughts = False
        self.error: ModelError | None = None

    @property
    def record(self) -> CallRecord:
        """The attempt as the ledger keeps it. One that still runs is one that is stopped now."""
        usage = self.usage
        input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
        estimated = False
        # Providers do not charge for what they refuse; what was shown before a failure is counted.
        if not input_tokens and (self.error is None or self.chars):
            input_tokens = input_tokens_of(self.request)
            estimated = True
        # A provider that was stopped early has not sent its last count, and Anthropic has sent a first one of 1.
        if self.chars and not (self.finished and output_tokens):
            output_tokens = max(output_tokens, tokens_of(self.chars))
            estimated = True
        if (unseen := self._unseen_tokens(usage)) > output_tokens:
            output_tokens, estimated = unseen, True
        images = images_of(self.request) if input_tokens else 0
        used = replace(usage, input_tokens=input_tokens, output_tokens=output_tokens)
        status = CallStatus.COMPLETED if self.finished else CallStatus.STOPPED
        if self.error is not None:
            status = CallStatus.FAILED
        return CallRecord(
            id=self.id,
            model=self.entry.id,
            provider=self.entry.provider,
            attempt=self.number,
            status=status,
            error=None if self.error is None else self.error.code,
            input_tokens=input_tokens,
            cached_tokens=min(usage.cached_tokens, input_tokens),
            output_tokens=output_tokens,
            images=images,
            estimated=estimated,
            own_key=self.entry.own_key,
            cost=cost_of(self.entry, used, images=images),
            started_at=self.started_at,
            ended_at=self.ended_at or clock.now(),
        )

    def _unseen_tokens(self, usage: UsageChunk) -> int:
        """Return what a model may have thought for itself and be charged for, when it was stopped before it said so.

        Otherwise whoever asks, waits and cancels would spend without end, and no budget would see it.
        """
        thinks = Capability.REASONING in self.entry.capabilities and not self.shows_thoughts
        if not thinks or self.finished or (self.error is not None and not self.chars):
            return usage.output_tokens
        seconds = ((self.ended_at or clock.now()) - self.started_at).total_seconds()
        return min(int(seconds * _THOUGHTS_PER_S), self.request.max_output_tokens, output_room(self.entry))


class _Counted:
    """A model whose answers are counted on their way to whoever asked."""

    __slots__ = ("_call", "_candidate")

    def __init__(self, call: "ModelCall", candidate: Candidate) -> None:
        self._call = call
        self._candidate = candidate

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and count what comes."""
        attempt = self._call._begin(self._candidate.entry, request)
        return self._call._follow(attempt, self._candidate.model.stream(request))


class ModelCall:
    """A running call of a model.

    Iterate it once for its items; close it, or leave its `async with`, to stop the provider at once. `records` and
    `tally` can be read at any time, also after a stop or a failure.

    Some providers go on with an answer that nobody reads, and have to be told to stop. Closing does that, and so does
    cancelling the task that reads. Call `detach` before either when the answer is to go on: for another process, to
    which this one hands the reply over, or which has taken it over already.
    """

    def __init__(self, entries: Sequence[ModelEntry], request: ModelRequest) -> None:
        # The way of closing is this call's own, whoever else asks with the same request.
        self._request = replace(request, on_close=OnClose())
        self._attempts: list[_Attempt] = []
        self._items: AsyncGenerator[StreamItem]
        self.entries = tuple(entries)
        """The models that may answer, the one that was asked for first."""
        self.entry = entries[0]
        """The model that is answering; another one after a fallback."""

    @classmethod
    def streaming(
        cls,
        candidates: Sequence[Candidate],
        request: ModelRequest,
        ask: Callable[[Sequence[Candidate], ModelRequest], AsyncGenerator[StreamItem]],
    ) -> Self:
        """Call these models, in the way of `ask`; each time that it asks one of them is an attempt."""
        call = cls([candidate.entry for candidate in candidates], request)
        counted = [replace(candidate, model=_Counted(call, candidate)) for candidate in candidates]
        call._items = ask(counted, call._request)
        return call

    @classmethod
    def reading_on(
        cls, entry: ModelEntry, request: ModelRequest, read: Callable[[ModelRequest], AsyncGenerator[Chunk]], said: str
    ) -> Self:
        """Read an answer on that another call began: one attempt, paid for from its beginning."""
        call = cls([entry], request)
        attempt = call._begin(entry, call._request, said=len(said))
        call._items = call._follow(attempt, read(call._request))
        return call

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
    def records(self) -> list[CallRecord]:
        """What the ledger keeps: one record per attempt at a provider so far, the running one last.

        A record has the same id on each reading. The one that runs is shown as if it were stopped now, estimated from
        characters where the provider has not said it.
        """
        return [attempt.record for attempt in self._attempts]

    @property
    def tally(self) -> Tally:
        """What the call has used so far: the sum of its records."""
        records = self.records
        return Tally(
            model_id=self.entry.id,
            input_tokens=sum(record.input_tokens for record in records),
            cached_tokens=sum(record.cached_tokens for record in records),
            output_tokens=sum(record.output_tokens for record in records),
            estimated=any(record.estimated for record in records),
            cost=sum((record.cost for record in records), Decimal(0)),
        )

    def _begin(self, entry: ModelEntry, request: ModelRequest, *, said: int = 0) -> _Attempt:
        attempt = _Attempt(entry, request, len(self._attempts) + 1, said=said)
        self._attempts.append(attempt)
        self.entry = entry
        return attempt

    async def _follow(self, attempt: _Attempt, source: AsyncGenerator[Chunk]) -> AsyncGenerator[Chunk]:
        try:
            async with aclosing(source) as chunks:
                async for chunk in chunks:
                    match chunk:
                        case TextChunk(text=text):
                            attempt.chars += len(text)
                        case ReasoningChunk(text=text):
                            attempt.chars += len(text)
                            attempt.shows_thoughts = True
                        case ToolCallChunk(name=name, raw=raw):
                            attempt.chars += len(name) + len(raw)
                        case UsageChunk():
                            attempt.usage = chunk
                        case Finish():
                            attempt.finished = True
                    yield chunk
        except ReattachRefused:
            # Nothing was read: what the other call used is not this one's.
            self._attempts.remove(attempt)
            raise
        except ModelError as error:
            attempt.error = error
            raise
        finally:
            attempt.ended_at = clock.now()
