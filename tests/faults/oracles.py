"""What must hold after every run. Each function takes what was recorded and returns what is wrong with it.

The table of events is the truth: what clients saw is compared with it, and it with what the provider said.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fake_provider import Plan as BackgroundPlan
from parley.realtime.fold import apply_reply_event
from tests.documented import NotDocumented, documented
from tests.faults.recorder import Received, Step
from tests.faults.script import Plan
from tests.faults.shown import TERMINAL, Frame

Problems = list[str]

# Strategies after which the whole reply is one script, said once.
EXACT = frozenset({"restart", "reattach", "prefill"})


@dataclass(frozen=True, slots=True)
class Event:
    """A row of the log."""

    seq: int
    e: str
    d: Frame


@dataclass
class Reply:
    """What the log says of one reply."""

    id: str
    question: str = ""
    model: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    strategies: list[str] = field(default_factory=list)
    end: Event | None = None
    started: int = 0

    @property
    def status(self) -> str | None:
        return None if self.end is None else self.end.e.removeprefix("reply.")

    @property
    def whole(self) -> str:
        """What its provider says when nothing disturbs it."""
        if self.model == "reattach":
            return "".join(BackgroundPlan.read(self.question, with_tools=True).pieces())
        return Plan.read(self.question).text

    @property
    def text(self) -> str:
        """The visible text."""
        return "".join(text for part, text in sorted(self.texts.items()) if self.kinds.get(part) == "text")


def replies_of(table: Sequence[Event]) -> dict[str, Reply]:
    """Read the replies out of the log, by a fold that is not the product's."""
    questions: dict[str, str] = {}
    found: dict[str, Reply] = {}
    for event in table:
        d = event.d
        if event.e == "message.created":
            if d["role"] == "user":
                questions[d["id"]] = "\n\n".join(part["text"] for part in d["parts"])
            else:
                found[d["id"]] = Reply(d["id"], questions.get(d["parent_id"], ""), d.get("model") or "")
        reply = found.get(d.get("reply", ""))
        if reply is None:
            continue
        match event.e:
            case "reply.started":
                reply.started += 1
            case "reply.resumed":
                reply.strategies.append(d["strategy"])
            case "reply.part" if d["state"] == "start":
                reply.kinds[d["part"]] = d["kind"]
                reply.texts.setdefault(d["part"], "")
            case "reply.delta":
                held = reply.texts.get(d["part"], "")
                reply.texts[d["part"]] = held[: d["off"]] + d["x"]
            case "reply.reset":
                reply.texts = {part: text for part, text in reply.texts.items() if part <= d["part"]}
                reply.texts[d["part"]] = reply.texts.get(d["part"], "")[: d["to_off"]]
            case _ if event.e in TERMINAL and reply.end is None:
                reply.end = event
    return found


# -- O1: the text ----------------------------------------------------------------------------------------------------


def text_is_the_script(reply: Reply) -> Problems:
    """A completed reply is the provider's script, whole; any other is a beginning of it."""
    whole = reply.whole
    if reply.status == "completed" and EXACT.issuperset(reply.strategies):
        if reply.text != whole:
            return [f"{reply.id}: completed with {_difference(reply.text, whole)}"]
    elif EXACT.issuperset(reply.strategies) and not whole.startswith(reply.text):
        return [f"{reply.id}: kept text is no beginning of the script: {_difference(reply.text, whole)}"]
    return []


def _difference(text: str, whole: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), min(len(text), len(whole)))
    return f"{len(text)} characters of {len(whole)}, different from {at}: {text[at : at + 20]!r}, not {whole[at : at + 20]!r}"


def text_never_shrinks(name: str, steps: Sequence[Step]) -> Problems:
    """What a client has shown stays, but for `reply.reset`; snapshots may only add."""
    problems: Problems = []
    shown: dict[tuple[str, int], str] = {}
    for step in steps:
        if step.kind == "snap":
            for message in step.state.get("messages", []):
                for part, value in enumerate(message["parts"]):
                    before, text = shown.get((message["id"], part), ""), value.get("text") or ""
                    if not text.startswith(before):
                        problems.append(f"{name}: a snapshot at {step.seq} took text of {message['id']} back")
                    shown[message["id"], part] = text
        elif step.e == "reply.delta":
            key = (step.d["reply"], step.d["part"])
            held, off = shown.get(key, ""), step.d["off"]
            overlap = held[off : off + len(step.d["x"])]
            if off > len(held) or not step.d["x"].startswith(overlap):
                problems.append(f"{name}: {step.lo}..{step.seq} does not fit what stands there ({len(held)}, {off})")
            shown[key] = held[:off] + step.d["x"] + held[off + len(step.d["x"]) :]
        elif step.e == "reply.reset":
            for key in [key for key in shown if key[0] == step.d["reply"] and key[1] > step.d["part"]]:
                del shown[key]
            key = (step.d["reply"], step.d["part"])
            shown[key] = shown.get(key, "")[: step.d["to_off"]]
    return problems


# -- O2: order -------------------------------------------------------------------------------------------------------


def ranges_are_dense(name: str, steps: Sequence[Step]) -> Problems:
    """What was applied follows on from what was there: no number is left out, none comes twice, none goes back."""
    problems: Problems = []
    last: int | None = None
    for step in steps:
        if step.kind == "snap":
            last = step.seq
            continue
        if last is None or not step.lo <= last + 1 <= step.seq:
            problems.append(f"{name}: {step.lo}..{step.seq} was applied after {last}")
        elif step.lo != last + 1 and step.e != "reply.delta":
            problems.append(f"{name}: {step.e} {step.lo}..{step.seq} overlaps {last}")
        last = step.seq
    return problems


def wire_is_dense(name: str, channel: str, received: Sequence[Received]) -> Problems:
    """On one connection the events of a subscription follow each other without a gap or a repeat."""
    problems: Problems = []
    place: dict[int, int | None] = {}
    for one in received:
        frame = one.frame
        if frame.get("ch") != channel:
            continue
        if frame["t"] == "subbed":
            place[one.connection] = None
        elif frame["t"] == "snap":
            place[one.connection] = frame["seq"]
        elif frame["t"] == "ev":
            lo, before = frame.get("from", frame["seq"]), place.get(one.connection)
            if before is not None and lo != before + 1:
                problems.append(f"{name}: connection {one.connection} got {lo}..{frame['seq']} after {before}")
            if lo > frame["seq"]:
                problems.append(f"{name}: a range {lo}..{frame['seq']} that goes backwards")
            place[one.connection] = frame["seq"]
    return problems


def table_is_dense(table: Sequence[Event], head: int) -> Problems:
    """The log skips no number and has none above its head."""
    seqs = [event.seq for event in table]
    if seqs and seqs != list(range(seqs[0], seqs[0] + len(seqs))):
        return [f"the log has holes or doubles: {_holes(seqs)}"]
    return [] if not seqs or seqs[-1] == head else [f"the head is {head}, the last event {seqs[-1]}"]


def _holes(seqs: Sequence[int]) -> str:
    pairs = itertools.pairwise(seqs)
    return ", ".join(f"{a}→{b}" for a, b in pairs if b != a + 1)[:200]


# -- O3: everyone has the same -----------------------------------------------------------------------------------------


def agrees_with_table(name: str, steps: Sequence[Step], table: Mapping[int, Event], *, epoch: str) -> Problems:
    """Every event that a client applied is in the log, as it was delivered: nothing visible was not committed."""
    problems: Problems = []
    for step in steps:
        if step.kind == "snap" or step.ep != epoch:
            continue
        rows = [table.get(seq) for seq in range(step.lo, step.seq + 1)]
        if any(row is None for row in rows):
            problems.append(f"{name}: {step.lo}..{step.seq} ({step.e}) is not in the log")
            continue
        expected = _merged([row for row in rows if row is not None])
        if expected is None or (expected.e, expected.d) != (step.e, step.d):
            problems.append(f"{name}: {step.lo}..{step.seq} is {step.e} {str(step.d)[:120]}, not what the log has")
    return problems


def _merged(rows: Sequence[Event]) -> Event | None:
    """Join deltas of one part as a server may; None for events that may not be joined."""
    first = rows[0]
    if len(rows) == 1:
        return first
    text = ""
    for row in rows:
        d = row.d
        same = row.e == "reply.delta" and (d["reply"], d["part"]) == (first.d["reply"], first.d["part"])
        if not same or d["off"] != first.d["off"] + len(text):
            return None
        text += d["x"]
    return Event(rows[-1].seq, first.e, {**first.d, "x": text})


def agree(traces: Mapping[str, Sequence[Step]]) -> Problems:
    """Clients that got the same range got the same content."""
    problems: Problems = []
    seen: dict[tuple[str, int, int], tuple[str, str, Frame]] = {}
    for name, steps in traces.items():
        for step in steps:
            if step.kind == "ev":
                first = seen.setdefault((step.ep, step.lo, step.seq), (name, step.e, step.d))
                if first[1:] != (step.e, step.d):
                    problems.append(f"{name} and {first[0]} got different events at {step.lo}..{step.seq}")
    return problems


# -- O4: one end -----------------------------------------------------------------------------------------------------


def ends_once(events: Iterable[tuple[int, str, Frame]], *, all_ended: bool = True) -> Problems:
    """Every reply has one terminal event, nothing follows it, and its check is that of the text before it."""
    problems: Problems = []
    ended: dict[str, int] = {}
    begun: set[str] = set()
    for seq, e, d in events:
        reply = d.get("reply")
        if reply is None:
            continue
        begun.add(reply)
        if reply in ended:
            problems.append(f"{reply}: {e} at {seq} comes after its end at {ended[reply]}")
        if e in TERMINAL:
            ended[reply] = seq
            text = "".join(part["text"] for part in d["message"]["parts"] if part["type"] == "text")
            if not check_holds(d, text):
                problems.append(f"{reply}: len and sha256 at {seq} are not those of its message")
            if d["message"]["status"] != e.removeprefix("reply."):
                problems.append(f"{reply}: ended as {e}, its message says {d['message']['status']}")
    if all_ended:
        problems += [f"{reply}: has no end" for reply in sorted(begun - ended.keys())]
    return problems


def check_holds(d: Frame, text: str) -> bool:
    """Whether `len` and `sha256` of a terminal event are those of a text."""
    return (d["len"], d["sha256"]) == (len(text), hashlib.sha256(text.encode()).hexdigest())


def end_is_what_was_said(reply: Reply) -> Problems:
    """The text of the terminal event is the text of the deltas before it."""
    if reply.end is None or check_holds(reply.end.d, reply.text):
        return []
    return [f"{reply.id}: its end vouches for {reply.end.d['len']} characters, its deltas are {len(reply.text)}"]


# -- O5: nothing left behind -----------------------------------------------------------------------------------------


def none_left_open(rows: Iterable[Mapping[str, Any]]) -> Problems:
    """No run record is open at the end; one that runs without a lease would never be."""
    problems: Problems = []
    for row in rows:
        if row["status"] == "streaming" and not row["leased"]:
            problems.append(f"{row['id']}: runs without a live lease")
        elif row["status"] in {"queued", "streaming"}:
            problems.append(f"{row['id']}: left {row['status']}")
    return problems


# -- O6: frames ------------------------------------------------------------------------------------------------------


def frames_are_valid(name: str, received: Sequence[Received]) -> Problems:
    """Every frame is one that the AsyncAPI document has."""
    problems: Problems = []
    for one in received:
        try:
            documented().received(one.frame)
        except NotDocumented as fault:
            problems.append(f"{name}: {str(fault)[:300]}")
    return problems


# -- O7: snapshots ---------------------------------------------------------------------------------------------------

_NEWEST = 50


def snapshot_is_the_fold(name: str, step: Step, table: Sequence[Event]) -> Problems:
    """A snapshot at a position is what the events up to it make. `table` is the log from its first event."""
    messages: dict[str, Frame] = {}
    for event in table:
        if event.seq > step.seq:
            break
        if event.e in {"message.created", "message.updated"}:
            messages[event.d["id"]] = {key: value for key, value in event.d.items() if key != "cid"}
            messages[event.d["id"]]["parts"] = [dict(part) for part in event.d["parts"]]
        elif event.e == "message.deleted":
            messages.pop(event.d["id"], None)
        elif event.d.get("reply") in messages:
            apply_reply_event(messages[event.d["reply"]], event.e, event.d)
    expected = sorted(messages.values(), key=lambda message: message["id"])[-_NEWEST:]
    given = step.state["messages"]
    if [m["id"] for m in given] != [m["id"] for m in expected]:
        return [f"{name}: the snapshot at {step.seq} has {len(given)} messages, its events make {len(expected)}"]
    problems: Problems = []
    for had, made in zip(given, expected, strict=True):
        wrong = sorted(key for key in made if key not in had or had[key] != made[key])
        if wrong:
            problems.append(f"{name}: the snapshot at {step.seq} differs from the fold in {wrong} of {had['id']}")
    return problems


# -- O8: resources ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """What a process holds."""

    memory_bytes: int
    descriptors: int
    tasks: int


def back_to_baseline(name: str, before: Counts, after: Counts, *, memory_bytes: int) -> Problems:
    """A process holds no more than before, but for so much memory that caches may keep."""
    problems: Problems = []
    if after.descriptors > before.descriptors:
        problems.append(f"{name}: {after.descriptors} descriptors, {before.descriptors} before")
    if after.tasks > before.tasks:
        problems.append(f"{name}: {after.tasks} tasks, {before.tasks} before")
    if after.memory_bytes > before.memory_bytes + memory_bytes:
        problems.append(f"{name}: {after.memory_bytes >> 10} KiB, {before.memory_bytes >> 10} KiB before")
    return problems
