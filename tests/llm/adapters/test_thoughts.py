from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.llm.adapters.thoughts import ThoughtTags

CASES = [
    ("<think>why</think>answer", "why", "answer"),
    ("\n <think>\nwhy\n</think>\n\nanswer", "\nwhy\n", "answer"),
    ("<think></think>answer", "", "answer"),
    ("<think>a < b </ think></thinking>c</think>d", "a < b </ think></thinking>c", "d"),
    ("<think>never closed </thi", "never closed </thi", ""),
    ("<thinker>no</think>", "", "<thinker>no</think>"),
    ("I say <think>x</think>", "", "I say <think>x</think>"),
    ("<thi", "", "<thi"),
    ("  ", "", "  "),
    ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    ("<think>a</think>\n\n", "a", ""),
    ("", "", ""),
]


def read(*pieces: str) -> tuple[str, str]:
    tags = ThoughtTags("<think>", "</think>")
    found = [pair for piece in pieces for pair in tags.feed(piece)] + tags.flush()
    return "".join(text for thought, text in found if thought), "".join(text for thought, text in found if not thought)


@pytest.mark.parametrize(("text", "thought", "answer"), CASES)
def test_reasoning_between_marks_at_the_start(text: str, thought: str, answer: str) -> None:
    assert read(text) == (thought, answer)
    assert read(*text) == (thought, answer)


@settings(deadline=None)
@given(st.data())
def test_cuts_do_not_matter(data: st.DataObject) -> None:
    text, thought, answer = data.draw(st.sampled_from(CASES))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))), len(text)]
    assert read(*(text[a:b] for a, b in pairwise(edges))) == (thought, answer)


def test_what_is_certain_is_not_held_back() -> None:
    tags = ThoughtTags("<think>", "</think>")
    assert tags.feed("<think>why <") == [(True, "why ")]
    assert tags.feed("b") == [(True, "<b")]
    assert tags.feed("</think>") == []
    assert tags.feed("yes") == [(False, "yes")]
    assert tags.over
