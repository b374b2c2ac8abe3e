from itertools import pairwise

import pytest
from hypothesis import given, settings
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


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_each_end_of_a_line(end: bytes) -> None:
    stream = b"event: a\ndata: one\ndata: two\n\ndata: three\n\n".replace(b"\n", end)
    assert split(stream) == split(*(bytes([byte]) for byte in stream)) == [(b"a", b"one\ntwo"), (b"", b"three")]


def test_a_carriage_return_ends_a_line_at_once() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: one\r\r") == [(b"", b"one")]
    # A line feed that comes next is part of it, and no blank line.
    assert splitter.feed(b"\ndata: two\r") == []
    assert splitter.feed(b"\n") == []
    assert splitter.feed(b"\n") == [(b"", b"two")]


@pytest.mark.parametrize("cut", range(4))
def test_a_byte_order_mark_is_taken_away_at_the_start_only(cut: int) -> None:
    stream = b"\xef\xbb\xbfdata: one\n\n"
    assert split(stream[:cut], stream[cut:]) == [(b"", b"one")]
    assert split(b"data: \xef\xbb\xbf\n\n") == [(b"", b"\xef\xbb\xbf")]
    assert split(b"\n\n\xef\xbb\xbfdata: one\n\n") == []
    assert split(b"\xef\xbb", b"data: one\n\ndata: two\n\n") == [(b"", b"two")]


def test_events_without_text_are_left_out() -> None:
    assert split(b"data:\n\ndata: \n\nevent: a\ndata\n\ndata: one\n\n") == [(b"", b"one")]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"data: x", b"data:y", b"event: n", b": c", b"\n", b"\r", b"\r\n", b"\n\n"]), max_size=12)
)
def test_whole_events_and_cut_ones_are_read_alike(pieces: list[bytes]) -> None:
    stream = b"".join(pieces)
    assert split(stream) == split(*(bytes([byte]) for byte in stream))
