"""Every oracle can fail: a run that is right passes, and each way of being wrong is found."""

import hashlib
from typing import Any

import pytest

from tests.faults import oracles
from tests.faults.oracles import Counts, Event, Reply
from tests.faults.recorder import Received, Step
from tests.faults.script import Plan
from tests.faults.shown import Frame

QUESTION = "seed=3 deltas=6 rate=0"
TEXT = Plan.read(QUESTION).text
HALF = len(TEXT) // 2


def _message(id_: str, role: str, **fields: Any) -> Frame:
    return {"id": id_, "role": role, "parts": [], "status": "completed", "parent_id": None, **fields}


def _end(text: str, *, status: str = "completed", said: str | None = None) -> Frame:
    said = text if said is None else said
    message = _message("r", "assistant", parts=[{"type": "text", "text": said}], status=status, parent_id="q")
    return {"reply": "r", "message": message, "len": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _log(text: str = TEXT, status: str = "completed") -> list[Event]:
    rows: list[tuple[str, Frame]] = [
        ("message.created", _message("q", "user", parts=[{"type": "text", "text": QUESTION}], cid="c")),
        ("message.created", _message("r", "assistant", status="queued", parent_id="q", cid=None)),
        ("reply.started", {"reply": "r", "to": "q", "model": "m", "attempt": 1}),
        ("reply.part", {"reply": "r", "part": 0, "kind": "text", "state": "start"}),
        ("reply.delta", {"reply": "r", "part": 0, "off": 0, "x": text[:HALF]}),
        ("reply.delta", {"reply": "r", "part": 0, "off": HALF, "x": text[HALF:]}),
        (f"reply.{status}", _end(text, status=status)),
    ]
    return [Event(seq, e, d) for seq, (e, d) in enumerate(rows, 1)]


def _steps(log: list[Event]) -> list[Step]:
    return [
        Step("snap", "ep", 0, 0, state={"messages": []}),
        *(Step("ev", "ep", ev.seq, ev.seq, ev.e, ev.d) for ev in log),
    ]


def _reply(log: list[Event]) -> Reply:
    return oracles.replies_of(log)["r"]


def _received(*frames: Frame, connection: int = 1) -> list[Received]:
    return [Received(frame, connection, 0.0) for frame in frames]


def _ev(seq: int, **fields: Any) -> Frame:
    return {"t": "ev", "ch": "c", "seq": seq, "e": "reply.started", "d": {}, "ts": 1, **fields}


def test_a_run_that_is_right_passes_all_of_them() -> None:
    log = _log()
    steps = _steps(log)
    assert oracles.text_is_the_script(_reply(log)) == []
    assert oracles.end_is_what_was_said(_reply(log)) == []
    assert oracles.text_never_shrinks("a", steps) == []
    assert oracles.ranges_are_dense("a", steps) == []
    assert oracles.table_is_dense(log, 7) == []
    assert oracles.agrees_with_table("a", steps, {event.seq: event for event in log}, epoch="ep") == []
    assert oracles.agree({"a": steps, "b": _steps(_log())}) == []
    assert oracles.ends_once((event.seq, event.e, event.d) for event in log) == []


# O1


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:-1],
        TEXT + "x",
        TEXT[1:],
        TEXT[:3] + TEXT[4:],
        TEXT[:HALF] + TEXT[HALF - 1 :],
        TEXT[:4] + "#" + TEXT[5:],
        "",
    ],
    ids=["cut", "longer", "late", "a hole", "said twice", "another character", "nothing"],
)
def test_a_text_that_is_not_the_script_is_found(text: str) -> None:
    assert oracles.text_is_the_script(_reply(_log(text)))


def test_a_kept_text_must_be_a_beginning() -> None:
    assert oracles.text_is_the_script(_reply(_log(TEXT[:9], "failed"))) == []
    assert oracles.text_is_the_script(_reply(_log("#" + TEXT[1:9], "failed")))
    assert oracles.text_is_the_script(_reply(_log(TEXT + "x", "cancelled")))


def test_a_continuation_by_another_model_is_not_held_to_the_script() -> None:
    log = _log(TEXT[:HALF] + "other words")
    assert oracles.text_is_the_script(_reply(log))
    resumed = Event(5, "reply.resumed", {"reply": "r", "attempt": 2, "model": "n", "strategy": "fallback"})
    assert oracles.text_is_the_script(_reply([*log[:4], resumed, *log[4:]])) == []
    exact = Event(5, "reply.resumed", {"reply": "r", "attempt": 2, "model": "n", "strategy": "prefill"})
    assert oracles.text_is_the_script(_reply([*log[:4], exact, *log[4:]]))


def test_text_that_is_taken_back_is_found() -> None:
    log = _log()
    shorter = {"messages": [_message("r", "assistant", parts=[{"type": "text", "text": TEXT[: HALF - 1]}])]}
    steps = [*_steps(log[:5]), Step("snap", "ep", 5, 5, state=shorter)]
    assert oracles.text_never_shrinks("a", steps)
    rewritten = Step("ev", "ep", 6, 6, "reply.delta", {"reply": "r", "part": 0, "off": HALF - 2, "x": "##"})
    assert oracles.text_never_shrinks("a", [*_steps(log[:5]), rewritten])
    late = Step("ev", "ep", 6, 6, "reply.delta", {"reply": "r", "part": 0, "off": HALF + 1, "x": "#"})
    assert oracles.text_never_shrinks("a", [*_steps(log[:5]), late])
    reset = Step("ev", "ep", 6, 6, "reply.reset", {"reply": "r", "attempt": 2, "part": 0, "to_off": 2})
    after = Step("ev", "ep", 7, 7, "reply.delta", {"reply": "r", "part": 0, "off": 2, "x": "##"})
    assert oracles.text_never_shrinks("a", [*_steps(log[:5]), reset, after]) == []


# O2


def test_ranges_that_do_not_follow_are_found() -> None:
    steps = _steps(_log())
    assert oracles.ranges_are_dense("a", [steps[0], *steps[2:]]), "a gap"
    assert oracles.ranges_are_dense("a", [*steps, steps[-1]]), "a repeat"
    assert oracles.ranges_are_dense("a", [steps[0], steps[2], steps[1]]), "the wrong order"
    assert oracles.ranges_are_dense("a", steps[1:]), "no beginning"
    wide = Step("ev", "ep", 3, 6, "reply.delta", {"reply": "r", "part": 0, "off": 0, "x": TEXT})
    assert oracles.ranges_are_dense("a", [*steps[:5], wide]) == [], "deltas may overlap"
    other = Step("ev", "ep", 3, 6, "reply.tool", {})
    assert oracles.ranges_are_dense("a", [*steps[:5], other]), "nothing else may"


def test_a_wire_with_gaps_or_repeats_is_found() -> None:
    subbed = {"t": "subbed", "ch": "c"}
    snap = {"t": "snap", "ch": "c", "seq": 4}
    assert oracles.wire_is_dense("a", "c", _received(subbed, snap, _ev(5), _ev(8, **{"from": 6}))) == []
    assert oracles.wire_is_dense("a", "c", _received(subbed, snap, _ev(6)))
    assert oracles.wire_is_dense("a", "c", _received(subbed, snap, _ev(5), _ev(5)))
    assert oracles.wire_is_dense("a", "c", _received(subbed, snap, _ev(5), _ev(7, **{"from": 5})))
    again = [*_received(subbed, _ev(5)), *_received(subbed, _ev(5), connection=2)]
    assert oracles.wire_is_dense("a", "c", again) == [], "another connection has its own place"


def test_a_log_with_holes_is_found() -> None:
    log = _log()
    assert oracles.table_is_dense([*log[:2], *log[3:]], 7)
    assert oracles.table_is_dense([*log, log[-1]], 7)
    assert oracles.table_is_dense(log, 8)
    assert oracles.table_is_dense(log[3:], 7) == [], "what was trimmed at the front is no hole"


# O3


def test_what_is_not_in_the_log_is_found() -> None:
    log = _log()
    table = {event.seq: event for event in log}
    steps = _steps(log)
    assert oracles.agrees_with_table("a", steps, {**table, 6: Event(6, "reply.delta", {"reply": "r"})}, epoch="ep")
    assert oracles.agrees_with_table("a", steps, {seq: e for seq, e in table.items() if seq != 7}, epoch="ep")
    joined = Step("ev", "ep", 5, 6, "reply.delta", {"reply": "r", "part": 0, "off": 0, "x": TEXT})
    assert oracles.agrees_with_table("a", [joined], table, epoch="ep") == []
    too_far = Step("ev", "ep", 4, 6, "reply.delta", {"reply": "r", "part": 0, "off": 0, "x": TEXT})
    assert oracles.agrees_with_table("a", [too_far], table, epoch="ep"), "merged over another event"
    assert oracles.agrees_with_table("a", [joined], table, epoch="another") == []


def test_clients_that_disagree_are_found() -> None:
    other = _log("#" * len(TEXT))
    assert oracles.agree({"a": _steps(_log()), "b": _steps(other)})


# O4


def test_ends_that_are_wrong_are_found() -> None:
    def judged(*events: Event, all_ended: bool = True) -> list[str]:
        return oracles.ends_once(((event.seq, event.e, event.d) for event in events), all_ended=all_ended)

    log = _log()
    assert judged(*log[:-1]), "no end"
    assert judged(*log[:-1], all_ended=False) == []
    assert judged(*log, Event(8, "reply.failed", _end(TEXT, status="failed"))), "two ends"
    assert judged(*log, Event(8, "reply.delta", {"reply": "r", "part": 0, "off": 0, "x": ""})), "more after the end"
    assert judged(Event(1, "reply.completed", _end(TEXT, said=TEXT[1:]))), "the check of another text"
    assert judged(Event(1, "reply.completed", _end(TEXT, status="failed"))), "another status in the message"
    vouched = [*log[:-1], Event(7, "reply.completed", _end(TEXT[:-1]))]
    assert oracles.end_is_what_was_said(_reply(vouched)), "the end vouches for other text than was said"


# O5


def test_what_is_left_behind_is_found() -> None:
    assert oracles.none_left_open([{"id": "r", "status": "completed", "leased": False}]) == []
    assert "without a live lease" in oracles.none_left_open([{"id": "r", "status": "streaming", "leased": False}])[0]
    assert oracles.none_left_open([{"id": "r", "status": "streaming", "leased": True}])
    assert oracles.none_left_open([{"id": "r", "status": "queued", "leased": False}])


# O6


def test_frames_that_are_not_the_protocols_are_found() -> None:
    channel = "conversation:01a1fd22-d372-7701-bb97-b0be9c7d2b11"
    reply = "01a1fd22-d372-7701-bb97-b0be9c7d2b12"
    good: Frame = {"t": "live", "ch": channel, "seq": 1}
    assert oracles.frames_are_valid("a", _received(good)) == []
    assert oracles.frames_are_valid("a", _received({**good, "t": "lively"}))
    assert oracles.frames_are_valid("a", _received({**good, "seq": "1"}))
    assert oracles.frames_are_valid("a", _received({"t": "live", "ch": channel}))
    delta = {"reply": reply, "part": 0, "off": 0, "x": "a"}
    event = {"t": "ev", "ch": channel, "seq": 1, "e": "reply.delta", "d": delta, "ts": 1795123401789}
    assert oracles.frames_are_valid("a", _received(event)) == []
    assert oracles.frames_are_valid("a", _received({**event, "e": "reply.sung"}))
    assert oracles.frames_are_valid("a", _received({**event, "d": {**delta, "off": -1}}))


# O7


def test_a_snapshot_that_is_not_the_fold_is_found() -> None:
    log = _log()
    question = {key: value for key, value in log[0].d.items() if key != "cid"}
    reply = _message("r", "assistant", status="streaming", parent_id="q", model="m")
    reply["parts"] = [{"type": "text", "text": TEXT[:HALF]}]

    def judged(*messages: Frame, at: int = 5) -> list[str]:
        return oracles.snapshot_is_the_fold("a", Step("snap", "ep", at, at, state={"messages": list(messages)}), log)

    assert judged(question, reply) == []
    assert judged(question), "a message is missing"
    assert judged(question, reply, at=4), "text that comes later"
    assert judged(question, reply, at=6), "text that is missing"
    assert judged(question, {**reply, "status": "completed"}), "another status"


# O8


def test_what_a_process_keeps_is_found() -> None:
    before = Counts(memory_bytes=1000, descriptors=10, tasks=5)
    assert oracles.back_to_baseline("p", before, Counts(1050, 10, 5), memory_bytes=100) == []
    assert oracles.back_to_baseline("p", before, Counts(1000, 11, 5), memory_bytes=100)
    assert oracles.back_to_baseline("p", before, Counts(1000, 10, 6), memory_bytes=100)
    assert oracles.back_to_baseline("p", before, Counts(1101, 10, 5), memory_bytes=100)


# The script itself


def test_the_script_is_made_of_its_seed_and_holds_what_is_hard_to_cut() -> None:
    text = Plan.read("seed=5 deltas=4000").text
    assert text == Plan.read("say this: deltas=4000 seed=5").text != Plan.read("seed=6 deltas=4000").text
    assert all(hard in text for hard in ("👩‍👩‍👧", "e\u0301", "שלום", "\\", '"', "\u2028"))
    assert any(piece.startswith("\u0301") for piece in Plan.read("seed=5 deltas=4000").pieces())
    assert max(map(len, Plan.read("seed=5 deltas=4000").pieces())) > 1000
    assert "\x00" not in text
    assert text.encode().decode() == text
