"""Asks again, or asks another model, as long as nothing of an answer has been seen."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from parley.llm.errors import ContentFiltered, ModelError, ProviderUnavailable
from parley.llm.ports import AttemptStarted, ChatModel, Chunk, ModelRequest, ReasoningChunk, TextChunk, ToolCallChunk
from parley.llm.registry import ModelEntry

__all__ = ["AttemptStarted", "Candidate", "stream_with_retries"]

logger = logging.getLogger(__name__)

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 8.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may answer."""

    entry: ModelEntry
    model: ChatModel


async def stream_with_retries(
    candidates: Sequence[Candidate], request: ModelRequest, *, backoff_base_s: float = BACKOFF_BASE_S
) -> AsyncGenerator[AttemptStarted | Chunk]:
    """Ask the first candidate, then the others in order, and yield the answer with an `AttemptStarted` before each try.

    A candidate is asked again at most `entry.retries` times and only after a retryable error. After a failure nobody
    else is asked once text, reasoning or a tool call has been yielded, nor when a content filter refused. When all
    fail, the first candidate's error is raised: it is the model that the caller named.
    """
    if not candidates:
        raise ProviderUnavailable
    first_error: ModelError | None = None
    attempt = 0
    for candidate in candidates:
        entry = candidate.entry
        for retry in range(entry.retries + 1):
            attempt += 1
            visible = False
            yield AttemptStarted(entry.id, attempt)
            try:
                async with aclosing(candidate.model.stream(request)) as chunks:
                    async for chunk in chunks:
                        if not visible and isinstance(chunk, TextChunk | ReasoningChunk | ToolCallChunk):
                            visible = True
                        yield chunk
                return
            except ModelError as error:
                logger.warning("Model %s failed with %s (attempt %d)", entry.id, error.code, attempt)
                if visible or isinstance(error, ContentFiltered):
                    raise
                if candidate is candidates[0]:
                    first_error = error
                delay_s = _delay_s(error, retry, backoff_base_s)
                if delay_s is None or retry == entry.retries:
                    break
            await asyncio.sleep(delay_s)
    assert first_error is not None
    raise first_error


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
