"""The client rule as the checks keep it: what is wrong is seen, and what is right gives what our own fold gives."""

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.conformance.errors import Failed
from parley.conformance.oracle import Oracle
from parley.conformance.shapes import misshapen
from parley.realtime.fold import apply_reply_event, visible_text

CHANNEL = "conversation:1"
Frame = dict[str, Any]


def ev(seq: int, e: str, *, first: int | None = None, **d: Any) -> Frame:
    frame: Frame = {"t": "ev", "ch": CHANNEL, "seq": seq, "e": e, "d": {"reply": "r", **d}, "ts": 1}
    return frame if first is None else {**frame, "from": first}


def message(text: str = "", *, status: str = "queued") -> Frame:
    parts = [{"type": "text", "text": text}] if text else []
    return {"id": "r", "role": "assistant", "parts": parts, "status": status}


def end(seq: int, text: str, e: str = "reply.completed", **d: Any) -> Frame:
    whole = message(text, status=e.removeprefix("reply."))
    check = {"len": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return ev(seq, e, **{"message": whole, **check, **d})


def begun(*more: Frame) -> Oracle:
    """Return a client that has read the beginning of a reply, and then these."""
    oracle = Oracle(CHANNEL)
    for frame in (
        {"t": "subbed", "ch": CHANNEL, "ep": "a", "head": 0, "why": "initial"},
        {"t": "snap", "ch": CHANNEL, "ep": "a", "seq": 0, "part": 0, "more": False, "state": {"messages": []}},
        {"t": "live", "ch": CHANNEL, "seq": 0},
        {**ev(1, "message.created"), "d": {**message(), "cid": None}},
        ev(2, "reply.started", to="q", model="m", attempt=1),
        ev(3, "reply.part", part=0, kind="text", state="start"),
        *more,
    ):
        oracle.take(frame)
    return oracle


def delta(seq: int, off: int, x: str, **fields: Any) -> Frame:
    return ev(seq, "reply.delta", part=0, off=off, x=x, **fields)


def test_what_is_right_is_sound() -> None:
    oracle = begun(delta(4, 0, "one "), delta(6, 4, "two three", first=5), end(7, "one two three"))
    oracle.assert_sound()
    assert oracle.text("r") == "one two three"
    assert oracle.since == {"ep": "a", "seq": 7}


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([delta(5, 0, "x")], "a gap: event 5 came after 3, 4 is missing"),
        ([delta(7, 0, "x")], "4 to 6 is missing"),
        ([delta(4, 0, "x"), delta(4, 0, "x")], "doubled"),
        ([delta(4, 0, "x"), delta(5, 0, "xy", first=4)], "an overlap: 4 to 5"),
        ([delta(3, 0, "x", first=5)], "a merged event goes from 5 down to 3"),
        ([ev(5, "reply.part", first=4, part=0, kind="text", state="end")], "only deltas may be merged"),
        ([delta(4, 3, "x")], "a delta has off 3 and its part has 0 code points"),
        ([ev(4, "reply.delta", part=1, off=0, x="x")], "before the start of its part 1"),
        ([delta(4, 0, "x"), end(5, "x", sha256="0" * 64)], "the text that was read has 1 code points"),
        ([delta(4, 0, "x"), end(5, "x", len=2)], "the reply.completed says 2"),
        ([delta(4, 0, "x"), end(5, "x", message={"id": "another"})], "does not carry its whole message"),
        ([delta(4, 0, "x"), end(5, "x", message=message("x", status="failed"))], "has the status failed"),
        ([end(4, ""), delta(5, 0, "x")], "reply.delta came after the end of its reply"),
        ([end(4, ""), end(5, "")], "reply.completed came after the end of its reply"),
        ([ev(4, "reply.part", part=2, kind="text", state="start")], "part 2 begins and there are 1 before it"),
        ([ev(4, "reply.part", part=1, kind="text", state="end")], "part 1 ends that has not begun"),
        ([{**ev(4, "reply.started"), "d": {"reply": "unknown"}}], "came before the message of its reply"),
        ([{"t": "live", "ch": CHANNEL, "seq": 9}], "`live` says 9 and what came before it goes to 3"),
        (
            [{"t": "snap", "ch": CHANNEL, "ep": "a", "seq": 3, "part": 1, "more": False, "state": {}}],
            "part 1 of a snapshot came where 0 was due",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen(frames: list[Frame], reason: str) -> None:
    with pytest.raises(Failed) as failed:
        begun(*frames).assert_sound()
    assert reason in failed.value.reason
    assert failed.value.frames


def test_frames_of_another_channel_are_none_of_ours() -> None:
    oracle = begun({**delta(9, 9, "x"), "ch": "conversation:2"}, {"t": "hb", "ts": 1, "heads": {}})
    oracle.assert_sound()
    assert oracle.last == 3


def test_parts_of_a_snapshot_are_joined() -> None:
    oracle = Oracle(CHANNEL)
    for part, more in ((0, True), (1, False)):
        state = {"conversation": {"id": "1"}, "messages": [{**message("x"), "id": str(part)}]}
        oracle.take({"t": "snap", "ch": CHANNEL, "ep": "b", "seq": 8, "part": part, "more": more, "state": state})
    assert list(oracle.messages) == ["0", "1"]
    assert oracle.since == {"ep": "b", "seq": 8}


def test_a_reset_shortens_and_the_reply_goes_on() -> None:
    oracle = begun(
        delta(4, 0, "one two"),
        ev(5, "reply.resumed", attempt=2, model="m", strategy="reattach"),
        ev(6, "reply.reset", attempt=2, part=0, to_off=3),
        ev(7, "reply.part", part=0, kind="text", state="start"),
        delta(8, 3, " three"),
        end(9, "one three"),
    )
    oracle.assert_sound()


def test_a_fork_is_who_read_less() -> None:
    oracle = begun(delta(4, 0, "one "), delta(5, 4, "two"), end(6, "one two"))
    fork = oracle.fork(4)
    assert (fork.last, fork.text("r")) == (4, "one ")
    assert fork.messages["r"]["status"] == "streaming"
    fork.take(delta(5, 4, "two"))
    fork.take(end(6, "one two"))
    fork.assert_sound()
    assert oracle.text("r") == fork.text("r") == "one two"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.text(min_size=1, max_size=6)), max_size=30), st.data())
def test_oracle_and_fold_agree(pieces: list[tuple[int, str]], data: st.DataObject) -> None:
    """Two implementations of the same page, written apart, hold the same of any reply."""
    oracle, folded, seq = begun(), message(), 3
    apply_reply_event(folded, "reply.part", {"reply": "r", "part": 0, "kind": "text", "state": "start"})
    lengths = [0]
    for kind, text in pieces:
        if kind == 2:
            lengths.append(0)
            d: Frame = {"part": len(lengths) - 1, "kind": "text", "state": "start"}
            e = "reply.part"
        elif kind == 1:
            part = data.draw(st.integers(0, len(lengths) - 1))
            to_off = data.draw(st.integers(0, lengths[part]))
            del lengths[part + 1 :]
            lengths[part] = to_off
            e, d = "reply.reset", {"attempt": 2, "part": part, "to_off": to_off}
        else:
            e, d = "reply.delta", {"part": len(lengths) - 1, "off": lengths[-1], "x": text}
            lengths[-1] += len(text)
        seq += 1
        oracle.take(ev(seq, e, **d))
        assert apply_reply_event(folded, e, {"reply": "r", **d})
        assert oracle.text("r") == visible_text(folded)
    oracle.assert_sound()


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        ({"t": "live", "ch": CHANNEL, "seq": 1, "from_the_future": 1}, None),
        (delta(4, 0, "x"), None),
        (ev(4, "message.pinned"), None),
        ({"t": "live", "ch": CHANNEL}, "`live` lacks its field `seq`"),
        ({"t": "live", "ch": CHANNEL, "seq": "1"}, "`live.seq` must be a whole number"),
        ({"t": "live", "ch": CHANNEL, "seq": True}, "`live.seq` must be a whole number"),
        ({"t": "olleh"}, "the protocol has no frame `olleh`"),
        ({"t": "err", "code": "oops", "msg": "", "retry": "never"}, "`err.code` must be one of"),
        (ev(4, "reply.delta", part=0, off="0", x="x"), "`reply.delta.off` must be a whole number"),
        ({**delta(4, 0, "x"), "from": "3"}, "`ev.from` must be a whole number"),
    ],
)  # fmt: skip
def test_the_shape_of_a_frame(frame: Frame, problem: str | None) -> None:
    found = misshapen(frame)
    assert (found is None) == (problem is None)
    assert found is None or found.startswith(str(problem))
