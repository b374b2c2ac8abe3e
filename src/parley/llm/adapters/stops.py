"""Ends an answer at a stop text, for providers that cannot be told of one."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from parley.llm.ports import Chunk, CursorChunk, Finish, FinishReason, ReasoningChunk, TextChunk


async def until_stop(chunks: AsyncGenerator[Chunk], stops: Sequence[str]) -> AsyncGenerator[Chunk]:
    """Pass an answer on up to the first of `stops` in its text, then close it: what it used is not known then.

    Text that may still become a stop is held back, and no place is passed on behind which it would be lost.
    """
    texts = [stop for stop in stops if stop]
    longest = max(map(len, texts), default=0)
    held = ""
    async with aclosing(chunks) as source:
        async for chunk in source:
            if isinstance(chunk, TextChunk):
                held += chunk.text
                if found := [at for stop in texts if (at := held.find(stop)) >= 0]:
                    if said := held[: min(found)]:
                        yield TextChunk(said)
                    yield Finish(FinishReason.STOP)
                    return
                kept = next(
                    (size for size in range(min(longest - 1, len(held)), 0, -1) if _begins(texts, held[-size:])), 0
                )
                if said := held[: len(held) - kept]:
                    yield TextChunk(said)
                held = held[len(held) - kept :]
                continue
            if isinstance(chunk, CursorChunk) and held:
                continue
            if held and not isinstance(chunk, ReasoningChunk):
                yield TextChunk(held)
                held = ""
            yield chunk


def _begins(stops: Sequence[str], text: str) -> bool:
    return any(stop.startswith(text) for stop in stops)
