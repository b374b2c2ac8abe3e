"""The measuring client's own checks: what a benchmark says was not lost must have been looked at."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.channels import Channel, Wrong

Frame = dict[str, Any]


def _followed(text: str = "") -> tuple[Channel, Wrong]:
    """Return a channel at position 0 of a connection, with so much of the reply `r` delivered by event 1."""
    wrong = Wrong()
    channel = Channel("conversation:1", wrong)
    channel.subbed({"recovered": False, "ep": "e", "head": 0}, -1)
    if text:
        channel.event(_delta(1, 0, text), 0)
    return channel, wrong


def _delta(seq: int, off: int, x: str, first: int | None = None) -> Frame:
    whole = {"t": "ev", "ch": "conversation:1", "seq": seq, "e": "reply.delta"}
    return {**whole, "d": {"reply": "r", "part": 0, "off": off, "x": x}} | ({"from": first} if first else {})


def _completed(seq: int, text: str) -> Frame:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"t": "ev", "ch": "conversation:1", "seq": seq, "e": "reply.completed",
            "d": {"reply": "r", "len": len(text), "sha256": digest}}  # fmt: skip


def _counts(**counted: int) -> dict[str, int]:
    return asdict(Wrong(**counted))


def test_what_comes_in_order_is_right() -> None:
    channel, wrong = _followed("one ")
    channel.event(_delta(3, 4, "two ", first=2), 0)
    channel.event(_completed(4, "one two "), 0)
    assert wrong.total == 0
    assert channel.last == 4


def _loses(channel: Channel) -> None:
    channel.event(_delta(3, 4, "two"), 0)


def _doubles(channel: Channel) -> None:
    channel.event(_delta(1, 0, "one "), 0)


def _skips_text(channel: Channel) -> None:
    channel.event(_delta(2, 5, "two"), 0)


def _says_another_text(channel: Channel) -> None:
    channel.event(_completed(2, "One "), 0)


def _says_another_length(channel: Channel) -> None:
    channel.event(_completed(2, "one"), 0)


@pytest.mark.parametrize(
    ("does", "found"),
    [
        (_loses, _counts(lost=1)),
        (_doubles, _counts(doubled=1)),
        (_skips_text, _counts(lost=1)),
        (_says_another_text, _counts(mismatched=1)),
        (_says_another_length, _counts(mismatched=1)),
    ],
)
def test_what_is_wrong_is_counted(does: Callable[[Channel], None], found: dict[str, int]) -> None:
    channel, wrong = _followed("one ")
    does(channel)
    assert asdict(wrong) == found


def test_a_second_connection_may_bring_again_what_is_known_and_merged_with_what_is_not() -> None:
    channel, wrong = _followed("one ")
    channel.event(_delta(2, 4, "two "), 0)
    # It had asked from position 0, while the first one went on.
    channel.subbed({"recovered": True, "ep": "e", "head": 3}, 0)
    channel.event(_delta(3, 0, "one two three", first=1), 0)
    assert channel.texts["r"].whole == "one two three"
    assert asdict(wrong) == _counts()


def test_a_second_connection_that_leaves_something_out_is_seen() -> None:
    channel, wrong = _followed("one ")
    channel.subbed({"recovered": True, "ep": "e", "head": 3}, 1)
    channel.event(_delta(3, 8, "three"), 0)
    # By its number, and by its place in the text.
    assert asdict(wrong) == _counts(lost=2)


def test_a_snapshot_replaces_what_is_held() -> None:
    channel, wrong = _followed("one ")
    channel.subbed({"recovered": False, "ep": "e", "head": 9}, 1)
    message = {"id": "r", "status": "streaming", "parts": [{"type": "text", "text": "one two "}]}
    channel.snap({"part": 0, "more": False, "seq": 9, "state": {"messages": [message]}})
    channel.event(_delta(10, 8, "three"), 0)
    assert (channel.texts["r"].whole, channel.snapshots) == ("one two three", 1)
    assert asdict(wrong) == _counts()


def test_a_reset_shortens() -> None:
    channel, wrong = _followed("one two")
    reset = {"t": "ev", "seq": 2, "e": "reply.reset", "d": {"reply": "r", "attempt": 2, "part": 0, "to_off": 4}}
    channel.event(reset, 0)
    channel.event(_delta(3, 4, "2"), 0)
    channel.event(_completed(4, "one 2"), 0)
    assert asdict(wrong) == _counts()
