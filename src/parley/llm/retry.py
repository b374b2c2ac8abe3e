"""Asks again, or asks another model, when a provider fails."""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from parley.llm.breaker import ProviderHealth
from parley.llm.errors import ContentFiltered, ModelError, ProviderUnavailable
from parley.llm.ports import AttemptStarted, ChatModel, Chunk, ModelRequest, ReasoningChunk, TextChunk, ToolCallChunk
from parley.llm.registry import ModelEntry

__all__ = ["AttemptStarted", "Candidate", "stream_with_retries"]

logger = logging.getLogger(__name__)

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 8.0
RETRY_WITHIN_S = 60.0
"""No model is asked a second time when so much time has gone by since the first was. Each fallback is still asked
once: the whole is bounded by this, one attempt, and one attempt of each fallback."""

_VISIBLE = (TextChunk, ReasoningChunk, ToolCallChunk)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may answer. `health` is shared by all models of its provider."""

    entry: ModelEntry
    model: ChatModel
    health: ProviderHealth = field(default_factory=lambda: ProviderHealth(""))


async def stream_with_retries(
    candidates: Sequence[Candidate],
    request: ModelRequest,
    *,
    resets: bool = False,
    backoff_base_s: float = BACKOFF_BASE_S,
    retry_within_s: float = RETRY_WITHIN_S,
) -> AsyncGenerator[AttemptStarted | Chunk]:
    """Ask the first candidate, then the others in order, and yield the answer with an `AttemptStarted` before each try.

    A candidate is asked again at most `entry.retries` times, only after a retryable error, and only while nothing of
    its answer has been yielded. When a retryable error cuts an answer that has been seen, the next candidate that can
    be given a beginning goes on from its text; one that cannot answers anew, but only if the reader takes back what it
    has shown (`resets`). No other model is asked when a content filter refused, nor after what was seen for an error
    that is not retryable. A provider whose breaker is open is passed over.

    When nobody answers, the error of the answer that was seen is raised, else that of the first candidate: it is the
    model that the caller named.
    """
    state = _State(request)
    retry_until = time.monotonic() + retry_within_s
    for candidate in candidates:
        entry, health = candidate.entry, candidate.health
        # Nobody asks what the last of them has said.
        keeps = candidate is not candidates[-1]
        asked, continues = state.ask(entry, resets=resets)
        if asked is None:
            continue
        for retry in range(entry.retries + 1):
            if (pause_s := health.pause_s()) is not None:
                state.fault = state.fault or _paused(pause_s)
                break
            # Nothing may come between the look and this: after a pause one call decides, and no second one.
            watch = health.watch()
            answering = False
            try:
                yield state.next_attempt(entry, retry, continues=continues)
                async with aclosing(candidate.model.stream(asked)) as chunks:
                    async for chunk in chunks:
                        if not answering and isinstance(chunk, _VISIBLE):
                            answering = True
                            watch.first_token()
                            state.begin(continues=continues)
                        if keeps and type(chunk) is TextChunk:
                            state.said.append(chunk.text)
                        yield chunk
                watch.succeeded()
                return
            except ModelError as error:
                watch.failed(error)
                logger.warning("Model %s failed with %s (attempt %d)", entry.id, error.code, state.attempt)
                state.failed(error, answering=answering)
                if isinstance(error, ContentFiltered) or (state.seen and answering and not error.retryable):
                    raise
                delay_s = None if answering else _delay_s(error, retry, backoff_base_s)
                if delay_s is None or retry == entry.retries or time.monotonic() + delay_s > retry_until:
                    break
            finally:
                watch.left()
            await asyncio.sleep(delay_s)
    raise state.fault or ProviderUnavailable()


class _State:
    """What has become of a call so far."""

    def __init__(self, request: ModelRequest) -> None:
        self._request = request
        self._asked: str | None = None
        self._code: str | None = None
        self.attempt = 0
        self.seen = False
        """Whether anything of an answer has been yielded."""
        self.said: list[str] = []
        """The text of the answer that stands."""
        self.fault: ModelError | None = None

    def ask(self, entry: ModelEntry, *, resets: bool) -> tuple[ModelRequest | None, bool]:
        """Return what a model is to be asked, None when it cannot help any more, and whether it goes on."""
        if not self.seen:
            return self._request, False
        said = "".join(self.said)
        if entry.prefill is not None and said.strip():
            return replace(self._request, prefill=(self._request.prefill or "") + said), True
        # One that was to go on from a beginning would not know what it is to begin anew.
        return (self._request if resets and self._request.prefill is None else None), False

    def next_attempt(self, entry: ModelEntry, retry: int, *, continues: bool) -> AttemptStarted:
        """Count an attempt."""
        self.attempt += 1
        first = self._asked is None
        self._asked = entry.id
        return AttemptStarted(
            entry.id, self.attempt, strategy="retry" if retry else "first" if first else "fallback",
            after_text=self.seen, continues=continues, failed=self._code,
        )  # fmt: skip

    def begin(self, *, continues: bool) -> None:
        """Note that an attempt's answer has begun."""
        self.seen = True
        if not continues:
            self.said = []

    def failed(self, error: ModelError, *, answering: bool) -> None:
        """Note how an attempt ended."""
        self._code = error.code
        if answering or self.fault is None:
            self.fault = error


def _paused(pause_s: float) -> ModelError:
    wait_s = max(1, math.ceil(pause_s))
    return ProviderUnavailable(
        f"The model provider has failed repeatedly and is left alone. Try again in {wait_s} s.", retry_after_s=wait_s
    )


def _delay_s(error: ModelError, retry: int, base_s: float) -> float | None:
    """Return how long to wait, None when asking again makes no sense.

    Full jitter: https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/
    A provider that wants a longer pause than the cap is not asked again: the caller would wait in silence.
    """
    if not error.retryable:
        return None
    wanted_s = error.retry_after_s or 0
    if wanted_s > BACKOFF_CAP_S:
        return None
    return max(wanted_s, random.uniform(0, min(BACKOFF_CAP_S, base_s * 2**retry)))
