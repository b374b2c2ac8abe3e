from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley.llm.errors import BadOutput
from parley.llm.text import TextJoiner, clean, read_arguments, read_json

HIGH, LOW = "\ud83d", "\ude00"


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["plain", " text"], "plain text"),
        ([HIGH, LOW], "😀"),
        (["a" + HIGH, LOW + "b"], "a😀b"),
        ([HIGH + LOW], "😀"),
        ([HIGH, "x"], "\ufffdx"),
        ([HIGH, HIGH, LOW], "\ufffd😀"),
        ([LOW], "\ufffd"),
        (["a\x00b"], "ab"),
        ([HIGH, "\x00", LOW], "😀"),
        ([HIGH], "\ufffd"),
        (["e\u0301", "שלום"], "e\u0301שלום"),
    ],
)
def test_pieces_become_whole_code_points(pieces: list[str], text: str) -> None:
    joiner = TextJoiner()
    assert "".join(joiner.feed(piece) for piece in pieces) + joiner.flush() == text


@given(st.text(), st.data())
def test_any_text_cut_between_utf16_units_comes_back(text: str, data: st.DataObject) -> None:
    text = text.replace("\x00", "")
    raw = text.encode("utf-16-le")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw) // 2), max_size=5)))
    edges = [0, *cuts, len(raw) // 2]
    joiner = TextJoiner()
    pieces = [raw[2 * a : 2 * b].decode("utf-16-le", "surrogatepass") for a, b in pairwise(edges)]
    assert "".join(map(joiner.feed, pieces)) + joiner.flush() == text


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=20))
def test_clean_text_can_be_stored(text: str) -> None:
    stored = clean(text)
    assert "\x00" not in stored
    assert stored.encode().decode() == stored


def test_json_with_lone_surrogates_is_read() -> None:
    assert read_json(rb'{"a": "\ud83d"}') == {"a": "\ud83d"}


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"a": nonsense}', rb'{"a": NaN, "b": "\ud83d"}', b'"\xff"', b'"\xff\\u0041"']
)
def test_other_json_is_bad_output(data: bytes) -> None:
    with pytest.raises(BadOutput):
        read_json(data)


def test_deep_json_is_bad_output() -> None:
    with pytest.raises(BadOutput):
        read_json(b'["\\ud83d",' + b"[" * 200_000)


@pytest.mark.parametrize(
    ("raw", "arguments"),
    [
        ("", {}),
        ("  ", {}),
        ('{"a": 1}', {"a": 1}),
        ("[1]", None),
        ('{"a": ', None),
        (r'{"a\u0000": ["x\u0000y", "\ud83d"]}', {"a": ["xy", "\ufffd"]}),
        (r'{"a": "\ud83d\ude00"}', {"a": "😀"}),
    ],
)
def test_arguments(raw: str, arguments: object) -> None:
    assert read_arguments(raw) == arguments
