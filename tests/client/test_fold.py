"""The fold of a reply."""

import copy
import itertools
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parley.realtime.fold import (
    apply_reply_event,
    apply_reply_events,
    digest,
    visible_text,
)
from tests.client.author import Author, message, steps


def fresh() -> dict[str, Any]:
    return message("r", "assistant", "queued", [], "q")


def with_parts(*parts: dict[str, Any]) -> dict[str, Any]:
    made = fresh()
    made["parts"] = list(parts)
    return made


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def test_a_reply_from_beginning_to_end() -> None:
    reply = fresh()
    events: list[tuple[str, dict[str, Any]]] = [
        ("reply.queued", {"reply": "r", "to": "q", "pos": 1}),
        ("reply.started", {"reply": "r", "to": "q", "model": "demo", "attempt": 1}),
        ("reply.part", {"reply": "r", "part": 0, "kind": "reasoning", "state": "start"}),
        ("reply.delta", {"reply": "r", "part": 0, "off": 0, "x": "hm"}),
        ("reply.part", {"reply": "r", "part": 0, "kind": "reasoning", "state": "end"}),
        ("reply.part", {"reply": "r", "part": 1, "kind": "tool", "state": "start"}),
        ("reply.tool", {"reply": "r", "part": 1, "call": "c", "name": "look", "state": "input", "input": {"q": 1}}),
        ("reply.tool", {"reply": "r", "part": 1, "call": "c", "name": "look", "state": "running"}),
        ("reply.tool", {"reply": "r", "part": 1, "call": "c", "name": "look", "state": "done", "output": {"n": 2}}),
        ("reply.part", {"reply": "r", "part": 2, "kind": "text", "state": "start"}),
        ("reply.delta", {"reply": "r", "part": 2, "off": 0, "x": "blue 😀"}),
    ]
    assert apply_reply_events(reply, events)
    assert reply["status"] == "streaming"
    assert reply["model"] == "demo"
    assert reply["parts"] == [
        {"type": "reasoning", "text": "hm"},
        {"type": "tool", "call": "c", "name": "look", "state": "done", "input": {"q": 1}, "output": {"n": 2}},
        text("blue 😀"),
    ]
    assert visible_text(reply) == "blue 😀"
    assert digest("blue 😀")[0] == 6

    final = {**copy.deepcopy(reply), "status": "completed"}
    assert apply_reply_event(reply, "reply.completed", {"reply": "r", "message": final})
    assert reply == final
    reply["parts"][2]["text"] = "changed"
    assert final["parts"][2]["text"] == "blue 😀", "the event is not changed by what happens to the message"


@pytest.mark.parametrize(
    ("off", "x", "expected"),
    [
        (3, "def", "abcdef"),
        (1, "bcde", "abcde"),
        (0, "abc", "abc"),
        (0, "ab", "abc"),
        (3, "", "abc"),
    ],
)
def test_a_delta_is_applied_by_its_offset(off: int, x: str, expected: str) -> None:
    reply = with_parts(text("abc"))
    assert apply_reply_event(reply, "reply.delta", {"part": 0, "off": off, "x": x})
    assert reply["parts"] == [text(expected)]


@pytest.mark.parametrize(
    ("e", "d"),
    [
        ("reply.delta", {"part": 0, "off": 4, "x": "z"}),
        ("reply.delta", {"part": 2, "off": 0, "x": "z"}),
        ("reply.delta", {"part": -1, "off": 0, "x": "z"}),
        ("reply.delta", {"part": 1, "off": 0, "x": "z"}),
        ("reply.part", {"part": 3, "kind": "text", "state": "start"}),
        ("reply.tool", {"part": 0, "call": "c", "name": "n", "state": "input"}),
        ("reply.tool", {"part": 3, "call": "c", "name": "n", "state": "input"}),
        ("reply.reset", {"part": 0, "to_off": 4}),
        ("reply.reset", {"part": 5, "to_off": 0}),
    ],
)
def test_what_does_not_fit_changes_nothing(e: str, d: dict[str, Any]) -> None:
    tool = {"type": "tool", "call": "x", "name": "n", "state": "done", "input": None, "output": None}
    reply = with_parts(text("abc"), tool)
    before = copy.deepcopy(reply)
    assert not apply_reply_event(reply, e, {"reply": "r", **d})
    assert reply == before


def test_a_reset_cuts_and_removes_later_parts() -> None:
    reply = with_parts(text("abc"), text("def"), text("ghi"))
    assert apply_reply_event(reply, "reply.reset", {"part": 1, "to_off": 1})
    assert reply["parts"] == [text("abc"), text("d")]
    assert apply_reply_event(reply, "reply.part", {"part": 1, "kind": "tool", "state": "start"})
    assert [part["type"] for part in reply["parts"]] == ["text", "tool"], "another kind takes the place"


def test_another_call_at_the_same_place_keeps_nothing_of_the_first() -> None:
    reply = with_parts(
        {"type": "tool", "call": "a", "name": "n", "state": "done", "input": {"a": 1}, "output": {"b": 2}}
    )
    apply_reply_event(reply, "reply.tool", {"part": 0, "call": "z", "name": "m", "state": "input", "input": {"c": 3}})
    assert reply["parts"] == [
        {"type": "tool", "call": "z", "name": "m", "state": "input", "input": {"c": 3}, "output": None}
    ]


def test_an_unknown_event_is_taken_and_changes_nothing() -> None:
    reply = with_parts(text("abc"))
    before = copy.deepcopy(reply)
    assert apply_reply_event(reply, "reply.sang", {"part": 9})
    assert reply == before


@given(steps)
@hypothesis_settings(deadline=None, max_examples=150)
def test_the_fold_is_what_was_written(todo: list[tuple[Any, ...]]) -> None:
    author = Author().write([("ask",), *todo])
    replies: dict[str, dict[str, Any]] = {}
    for n, (e, d) in enumerate(author.events, 1):
        if e == "message.created" and d["role"] == "assistant":
            replies[d["id"]] = copy.deepcopy({key: value for key, value in d.items() if key != "cid"})
        elif e.startswith("reply."):
            assert apply_reply_event(replies[d["reply"]], e, copy.deepcopy(d))
            truth = next(m for m in author.states[n]["messages"] if m["id"] == d["reply"])
            assert replies[d["reply"]] == truth


@given(st.text(min_size=1), st.lists(st.integers(0, 10**6), max_size=20))
@hypothesis_settings(deadline=None)
def test_any_deltas_that_cover_a_text_give_that_text(whole: str, cuts: list[int]) -> None:
    whole = whole.encode("utf-8", "ignore").decode()
    reply = with_parts(text(""))
    places = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    for start, stop in itertools.pairwise(places):
        for off in (start, max(0, start - 3)):  # the same again, and beginning earlier
            assert apply_reply_event(reply, "reply.delta", {"part": 0, "off": off, "x": whole[off:stop]})
    assert visible_text(reply) == whole


def test_a_long_reply_is_folded_in_linear_time() -> None:
    def seconds(deltas: int) -> float:
        reply = with_parts(text(""))
        started = time.perf_counter()
        for n in range(deltas):
            apply_reply_event(reply, "reply.delta", {"part": 0, "off": n * 20, "x": "0123456789abcdefgh €"})
        assert len(visible_text(reply)) == deltas * 20
        return time.perf_counter() - started

    # Quadratic copying would be about 100 times as much, and gigabytes of it.
    assert min(seconds(40_000) for _ in range(3)) < 40 * min(seconds(4_000) for _ in range(3))
