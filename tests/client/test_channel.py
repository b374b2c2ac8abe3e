"""The client rule: whatever the network does to a log, the client comes to the state that the log says."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parley.client.channel import ChannelState, Frame
from tests.client.author import CHANNEL, Author, steps


class Follower:
    """A client of one channel on a network that loses, repeats and merges; answers to `sub` come whole or cut off."""

    def __init__(self, author: Author, data: st.DataObject) -> None:
        self.author = author
        self.data = data
        self.channel = ChannelState(CHANNEL)
        self.told: dict[tuple[str, int], str] = {}

    def take(self, frame: Frame) -> bool:
        """Take a frame; returns whether it is to be asked again."""
        match frame["t"]:
            case "subbed":
                self.channel.subbed(frame)
            case "snap":
                replaced = self.channel.snap(frame)
                if replaced:
                    self._look()
                return replaced is None
            case "ev":
                taken = self.channel.ev(frame)
                if taken.applied and taken.d is not None:
                    self._hear(frame["e"], taken.d)
                return taken.resubscribe
        return False

    def _look(self) -> None:
        self.told = {
            (m["id"], index): part["text"]
            for m in self.channel.state["messages"]
            if m["role"] == "assistant"
            for index, part in enumerate(m["parts"])
            if "text" in part
        }

    def _hear(self, e: str, d: Frame) -> None:
        """A user who only listens to events, and trusts that each piece of text is told once and in its place."""
        if e == "reply.part" and d["state"] == "start":
            self.told[d["reply"], d["part"]] = ""
        elif e == "reply.delta":
            assert d["off"] == len(self.told[d["reply"], d["part"]])
            self.told[d["reply"], d["part"]] += d["x"]
        elif e in {"reply.reset", "message.deleted"}:
            self._look()

    def deliver(self, first: int, most: int) -> None:
        cursor = first
        while cursor <= min(first + most, self.author.head):
            frame = self.author.ev(cursor, self.data.draw(st.integers(1, 6)))
            if self.take(frame):
                self.resubscribe()
                return
            cursor = frame["seq"] + 1

    def resubscribe(self, *, whole: bool = False) -> None:
        author, since = self.author, self.channel.since
        kind = "replay" if whole else self.data.draw(st.sampled_from(["replay", "snapshot", "cut"]))
        if since is None or kind == "snapshot":
            at = author.head if since is None else self.data.draw(st.integers(since["seq"], author.head))
            answer = [author.subbed(recovered=False), *author.snap(at, per_part=self.data.draw(st.integers(1, 4)))]
        else:
            answer = author.answer(since)
        if kind == "cut":
            answer = answer[: self.data.draw(st.integers(0, len(answer)))]
        for frame in answer:
            assert not self.take(frame)


@given(steps, st.data())
@hypothesis_settings(deadline=None, max_examples=400)
def test_any_delivery_comes_to_the_same_state(todo: list[tuple[Any, ...]], data: st.DataObject) -> None:
    author = Author().write([("ask",), *todo])
    follower = Follower(author, data)
    channel = follower.channel
    for frame in [author.subbed(recovered=False), *author.snap(data.draw(st.integers(0, author.head)))]:
        follower.take(frame)
    for _ in range(data.draw(st.integers(0, 12))):
        last = channel.last or 0
        first = data.draw(st.integers(max(1, last - 6), min(author.head + 1, last + 3)))
        follower.deliver(first, data.draw(st.integers(0, 20)))
        if channel.last is not None:
            assert channel.state == author.states[channel.last], "no state that the log never had"
    while channel.is_behind(author.head):  # what a heartbeat says
        follower.resubscribe(whole=True)
    assert channel.state == author.state
    assert channel.last == author.head
    assert channel.integrity_failures == 0
    told = {key: value for key, value in follower.told.items() if value}
    follower._look()
    assert told == {key: value for key, value in follower.told.items() if value}


@pytest.fixture
def author() -> Author:
    made = Author()
    made.ask()
    for text in ("one ", "two ", "three"):
        made.delta(0, text)
    return made


def following(author: Author, seq: int | None = None) -> ChannelState:
    channel = ChannelState(CHANNEL)
    channel.subbed(author.subbed(recovered=False))
    for frame in author.snap(seq):
        channel.snap(frame)
    return channel


def test_a_snapshot_counts_with_its_last_part(author: Author) -> None:
    channel = ChannelState(CHANNEL)
    first, second = author.snap(per_part=1)
    assert channel.snap(first) is False
    assert channel.last is None
    assert not channel.ev(author.ev(author.head)).applied, "nothing counts before it"
    assert channel.snap(second) is True
    assert channel.state == author.state
    assert channel.since == {"ep": "e1", "seq": author.head}


def test_a_snapshot_with_a_part_missing_is_asked_for_again(author: Author) -> None:
    channel = following(author)
    assert channel.snap(author.snap(per_part=1)[1]) is None
    assert channel.since is None


def test_parts_of_two_snapshots_are_not_mixed(author: Author) -> None:
    channel = ChannelState(CHANNEL)
    channel.snap(author.snap(author.head - 1, per_part=1)[0])
    assert channel.snap(author.snap(per_part=1)[1]) is None


def test_a_known_event_is_dropped(author: Author) -> None:
    channel = following(author)
    before = copy.deepcopy(channel.state)
    for seq in range(1, author.head + 1):
        taken = channel.ev(author.ev(seq))
        assert not taken.applied
        assert not taken.resubscribe
    assert channel.state == before


def test_of_a_half_known_range_only_the_rest_is_new(author: Author) -> None:
    first = author.head - 2
    channel = following(author, first)
    frame = author.ev(first, most=3)
    assert (frame["from"], frame["seq"]) == (first, author.head)
    taken = channel.ev(frame)
    assert taken.applied
    assert taken.d == {**frame["d"], "off": 4, "x": "two three"}
    assert channel.state == author.state


def test_a_gap_asks_again_and_changes_nothing(author: Author) -> None:
    channel = following(author, author.head - 2)
    taken = channel.ev(author.ev(author.head))
    assert (taken.applied, taken.resubscribe) == (False, True)
    assert channel.since == {"ep": "e1", "seq": author.head - 2}


def test_another_epoch_gives_another_state(author: Author) -> None:
    channel = following(author)
    other = Author(ep="e2")
    other.ask()
    channel.subbed(other.subbed(recovered=False))
    assert channel.since is None
    for frame in other.snap():
        channel.snap(frame)
    assert channel.state == other.state
    assert channel.since == {"ep": "e2", "seq": other.head}


def test_nothing_counts_between_the_announcement_of_a_snapshot_and_the_snapshot(author: Author) -> None:
    channel = following(author, author.head - 2)
    since = channel.since
    channel.subbed(author.subbed(recovered=False, why="too_far"))
    taken = channel.ev(author.ev(author.head - 1))
    assert (taken.applied, taken.resubscribe) == (False, False)
    taken = channel.ev(author.ev(author.head))
    assert (taken.applied, taken.resubscribe) == (False, False)
    assert channel.since == since, "a connection that breaks now is resumed from there"
    for frame in author.snap():
        channel.snap(frame)
    assert channel.state == author.state
    author.delta(0, "four")
    assert channel.ev(author.ev(author.head)).applied


def test_a_log_that_does_not_know_the_position_any_more(author: Author) -> None:
    """The same log, but shorter than the client knows it: what the server has counts."""
    channel = following(author)
    earlier = author.head - 2
    channel.subbed(author.subbed(recovered=False, why="epoch"))
    assert channel.since is None
    for frame in author.snap(earlier):
        assert channel.snap(frame) is True
    assert channel.state == author.states[earlier]
    assert channel.last == earlier


@pytest.mark.parametrize("field", ["len", "sha256"])
def test_a_text_that_is_not_what_its_end_says_is_counted(author: Author, field: str) -> None:
    channel = following(author)
    author.end(0, "completed")
    frame = author.ev(author.head)
    frame["d"][field] = 1 if field == "len" else "0" * 64
    taken = channel.ev(frame)
    assert (taken.applied, taken.resubscribe) == (True, True)
    assert channel.integrity_failures == 1
    assert channel.since is None, "the next subscription has no since"


def test_an_event_that_does_not_fit_is_counted(author: Author) -> None:
    channel = following(author)
    author.delta(0, "four")
    frame = author.ev(author.head)
    frame["d"]["off"] += 1
    taken = channel.ev(frame)
    assert (taken.applied, taken.resubscribe) == (False, True)
    assert channel.integrity_failures == 1
    assert channel.since is None


def test_events_of_messages_that_are_not_held_change_nothing(author: Author) -> None:
    channel = following(author)
    frame = author.ev(author.head) | {"seq": author.head + 1}
    frame["d"]["reply"] = "older than what is held"
    assert channel.ev(frame).applied
    assert channel.state == author.state


def frame(ch: str, seq: int, e: str, d: Frame) -> Frame:
    return {"t": "ev", "ch": ch, "seq": seq, "e": e, "d": d, "ts": 0}


def with_state(ch: str, state: Frame) -> ChannelState:
    channel = ChannelState(ch)
    channel.snap({"t": "snap", "ch": ch, "ep": "e", "seq": 0, "part": 0, "more": False, "state": state})
    return channel


def test_the_state_of_tasks() -> None:
    channel = with_state("tasks", {"items": [{"id": "a", "title": "old"}]})
    channel.ev(frame("tasks", 1, "task.created", {"id": "b", "title": "new"}))
    channel.ev(frame("tasks", 2, "task.updated", {"id": "a", "title": "changed"}))
    assert channel.state == {"items": [{"id": "b", "title": "new"}, {"id": "a", "title": "changed"}]}
    channel.ev(frame("tasks", 3, "task.deleted", {"id": "a"}))
    assert channel.state == {"items": [{"id": "b", "title": "new"}]}


def test_the_state_of_the_inbox() -> None:
    ch = "user:me"
    channel = with_state(ch, {"conversations": [{"id": "a", "updated_at": "2026-01-01"}], "jobs": []})
    channel.ev(frame(ch, 1, "conversation.created", {"id": "b", "updated_at": "2026-01-02"}))
    channel.ev(frame(ch, 2, "job.updated", {"id": "j", "status": "running"}))
    channel.ev(frame(ch, 3, "conversation.updated", {"id": "a", "updated_at": "2026-01-03"}))
    assert [item["id"] for item in channel.state["conversations"]] == ["a", "b"]
    assert channel.state["jobs"] == [{"id": "j", "status": "running"}]
    channel.ev(frame(ch, 4, "job.updated", {"id": "j", "status": "completed"}))
    channel.ev(frame(ch, 5, "conversation.deleted", {"id": "b"}))
    channel.ev(frame(ch, 6, "notice", {"text": "hello"}))
    assert channel.state == {"conversations": [{"id": "a", "updated_at": "2026-01-03"}], "jobs": []}
    assert channel.last == 6


def test_the_state_of_a_conversation() -> None:
    ch = "conversation:c1"
    conversation = {"id": "c1", "title": "old", "pinned": True, "current_id": None}
    channel = with_state(ch, {"conversation": conversation, "messages": []})
    channel.ev(frame(ch, 1, "message.created", {"id": "m1", "parent_id": None, "parts": []}))
    channel.ev(frame(ch, 2, "message.created", {"id": "m2", "parent_id": None, "parts": []}))
    assert channel.state["conversation"]["current_id"] == "m2"
    channel.ev(frame(ch, 3, "conversation.changed", {"id": "c1", "title": "new", "current_id": "m1"}))
    # Whether one has pinned it is one's own, and not in the event.
    assert channel.state["conversation"] == {"id": "c1", "title": "new", "pinned": True, "current_id": "m1"}


def test_the_state_of_a_keyed_channel() -> None:
    ch = "positions:a1"
    channel = with_state(ch, {"items": {"X": {"key": "X", "n": 1}}})
    channel.ev(frame(ch, 1, "position.upsert", {"key": "Y", "n": 2}))
    channel.ev({**frame(ch, 3, "position.upsert", {"key": "X", "n": 5}), "from": 1})
    channel.ev(frame(ch, 4, "position.remove", {"key": "Y"}))
    assert channel.state == {"items": {"X": {"key": "X", "n": 5}}}


def test_parts_of_a_keyed_snapshot_are_joined() -> None:
    channel = ChannelState("positions:a1")
    for part, items in enumerate(({"X": 1}, {"Y": 2})):
        channel.snap({"t": "snap", "ch": "positions:a1", "ep": "e", "seq": 7, "part": part, "more": part == 0,
                      "state": {"items": items}})  # fmt: skip
    assert channel.state == {"items": {"X": 1, "Y": 2}}
