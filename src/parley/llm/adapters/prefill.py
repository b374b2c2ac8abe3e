"""Takes away what a provider repeats of the beginning of an answer that it was given."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from parley.llm.ports import Chunk, ReasoningChunk, TextChunk


async def without_echo(chunks: AsyncGenerator[Chunk], *expected: str) -> AsyncGenerator[Chunk]:
    """Pass an answer on without `expected` at its start.

    The expected texts stand behind each other, and each is taken away only if it comes whole and right behind the one
    before it. Text that may still become one of them is held back until it does or cannot.
    """
    waiting = [text for text in expected if text]
    held = ""
    async with aclosing(chunks) as source:
        async for chunk in source:
            if waiting and isinstance(chunk, TextChunk):
                held += chunk.text
                while waiting and held.startswith(waiting[0]):
                    held = held[len(waiting.pop(0)) :]
                if waiting and waiting[0].startswith(held):
                    continue
                waiting.clear()
                if held:
                    yield TextChunk(held)
                    held = ""
                continue
            if held and not isinstance(chunk, ReasoningChunk):
                waiting.clear()
                yield TextChunk(held)
                held = ""
            yield chunk
