from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley.llm.errors import BadOutput
from parley.llm.sse import MAX_EVENT_BYTES, Event, EventSplitter

STREAM = (
    b": a comment\n\n"
    b"data: one\n\n"
    b"event: named\r\ndata:two\r\ndata: more\r\n\r\n"
    b"id: 7\nretry: 10\ndata:  leading space kept\n\n"
    b"event: without data\n\n"
    b"data: \xf0\x9f\x98\x80\n\n"
)
EVENTS: list[Event] = [
    (b"", b"one"),
    (b"named", b"two\nmore"),
    (b"", b" leading space kept"),
    (b"", b"\xf0\x9f\x98\x80"),
]


def split(*chunks: bytes, limit: int = MAX_EVENT_BYTES) -> list[Event]:
    splitter = EventSplitter(limit)
    return [event for chunk in chunks for event in splitter.feed(chunk)]


def test_reads_comments_names_and_several_lines() -> None:
    assert split(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_cuts_do_not_matter(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert split(*(STREAM[a:b] for a, b in pairwise(edges))) == EVENTS


def test_byte_by_byte() -> None:
    assert split(*(bytes([byte]) for byte in STREAM)) == EVENTS


def test_flush_gives_the_last_event_without_its_blank_line_and_drops_half_a_line() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: whole\ndata: half") == []
    assert splitter.flush() == [(b"", b"whole")]
    assert splitter.flush() == []


@pytest.mark.parametrize("chunk", [b"data: xxxx", b"data: xxxx\n", b"x" * 10, b": xxxxxxx"])
def test_an_event_or_line_above_the_limit_is_refused(chunk: bytes) -> None:
    with pytest.raises(BadOutput):
        split(*[chunk] * 200, limit=1000)


def test_the_limit_is_for_one_event_not_for_the_stream() -> None:
    splitter = EventSplitter(limit=1000)
    assert sum(len(splitter.feed(b"data: " + b"x" * 500 + b"\n\n")) for _ in range(50)) == 50
