from collections.abc import AsyncGenerator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.llm.adapters.stops import until_stop
from parley.llm.ports import Chunk, CursorChunk, Finish, FinishReason, ReasoningChunk, TextChunk, UsageChunk
from tests.llm.calls import collect, text_of

END = (UsageChunk(1, 0, 1), Finish(FinishReason.LENGTH))


async def chunks_of(*chunks: Chunk) -> AsyncGenerator[Chunk]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one END two", ("END",), "one "),
        ("one EEND", ("END",), "one E"),
        ("one EN", ("END",), None),
        ("abcabd", ("abd",), "abc"),
        ("x\n\ny", ("zzz", "\n\n"), "x"),
        ("END", ("END",), ""),
        ("aXbY", ("Y", "X"), "a"),
        ("nothing", ("", "END"), None),
    ],
)
def test_the_answer_ends_before_the_first_stop(text: str, stops: tuple[str, ...], kept: str | None) -> None:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, len(text)), max_size=6))
    def cut_anywhere(cuts: list[int]) -> None:
        edges = [0, *sorted(cuts), len(text)]
        pieces = [TextChunk(text[a:b]) for a, b in pairwise(edges) if a < b]
        found = run(until_stop(chunks_of(*pieces, *END), stops))
        assert text_of(found) == (text if kept is None else kept)
        assert all(chunk.text for chunk in found if isinstance(chunk, TextChunk))
        assert found[-1] == (END[-1] if kept is None else Finish(FinishReason.STOP))

    cut_anywhere()


def run(chunks: AsyncGenerator[Chunk]) -> list[Chunk]:
    """Read an answer that waits for nothing."""
    reading = collect(chunks)
    with pytest.raises(StopIteration) as ended:
        reading.send(None)
    found: list[Chunk] = ended.value.value
    return found


async def test_other_chunks_pass_and_places_only_where_nothing_is_held() -> None:
    reasoning, first, second = ReasoningChunk("END"), CursorChunk("1"), CursorChunk("2")
    chunks = chunks_of(reasoning, TextChunk("a"), first, TextChunk("bE"), second, TextChunk("x"), *END)
    found = await collect(until_stop(chunks, ("END",)))
    assert found == [reasoning, TextChunk("a"), first, TextChunk("b"), TextChunk("Ex"), *END]


async def test_the_source_is_closed_at_a_stop() -> None:
    closed = False

    async def source() -> AsyncGenerator[Chunk]:
        nonlocal closed
        try:
            yield TextChunk("END")
            yield TextChunk("more")
        finally:
            closed = True

    assert await collect(until_stop(source(), ("END",))) == [Finish(FinishReason.STOP)]
    assert closed
