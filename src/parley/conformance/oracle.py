"""The client rule (section 3 of the protocol), kept by hand: what a client holds, and whether it should have come so.

A client drops what it has and asks again on a gap. The oracle does neither: a server has no reason to send either, so
it writes down what was wrong and goes on.
"""

import hashlib
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from parley.conformance.errors import Failed
from parley.conformance.transcript import Frame

TERMINAL = ("reply.completed", "reply.failed", "reply.cancelled")


@dataclass(frozen=True)
class Applied:
    """An event that was taken: what it covers, its name, its data."""

    lo: int
    seq: int
    e: str
    d: dict[str, Any]


def visible_text(message: dict[str, Any]) -> str:
    """Return the text parts of a message, joined."""
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


class Oracle:
    """What one client holds of one channel."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.ep = ""
        self.last: int | None = None
        self.state: dict[str, Any] = {}
        self.messages: dict[str, dict[str, Any]] = {}
        self.applied: list[Applied] = []
        self.snapshots = 0
        self.live_at: int | None = None
        self.ended: dict[str, Frame] = {}
        self.problems: list[tuple[str, Frame]] = []
        self._snap: list[Frame] = []
        self._base: tuple[int, dict[str, dict[str, Any]]] = (0, {})

    @property
    def since(self) -> Frame:
        """The position to resume from."""
        return {"ep": self.ep, "seq": self.last}

    def take(self, frame: Frame) -> None:
        """Take a frame from the server; one of another channel is none of ours."""
        if frame.get("ch") != self.channel:
            return
        match frame["t"]:
            case "subbed":
                self.ep = frame["ep"]
                self.live_at = None
            case "snap":
                self._take_snap(frame)
            case "ev":
                self._take_event(frame)
            case "live":
                self._take_live(frame)

    def assert_sound(self) -> None:
        """Raise `Failed` with the first thing that was wrong."""
        if self.problems:
            reason, frame = self.problems[0]
            raise Failed(reason, frame)

    def fork(self, seq: int) -> "Oracle":
        """Return what a client held that had read up to an event and no further."""
        made = Oracle(self.channel)
        made.ep = self.ep
        made.last = self._base[0]
        made.messages = deepcopy(self._base[1])
        for event in self.applied:
            if event.seq <= seq:
                made._apply(event, {})
                made.last = event.seq
        made._base = (made.last, deepcopy(made.messages))
        return made

    def text(self, reply: str) -> str:
        """Return what a reader sees of a reply."""
        message = self.messages.get(reply)
        return "" if message is None else visible_text(message)

    def of(self, reply: str) -> list[Applied]:
        """Return the events of a reply."""
        return [event for event in self.applied if event.d.get("reply") == reply]

    # -- frames --------------------------------------------------------------------------------------------------

    def _wrong(self, reason: str, frame: Frame) -> None:
        self.problems.append((reason, frame))

    def _take_snap(self, frame: Frame) -> None:
        if frame["part"] == 0:
            self._snap = []
        if frame["part"] != len(self._snap):
            self._wrong(f"part {frame['part']} of a snapshot came where {len(self._snap)} was due", frame)
        if self._snap and (frame["seq"], frame["ep"]) != (self._snap[0]["seq"], self._snap[0]["ep"]):
            self._wrong("the parts of one snapshot are of different positions", frame)
        self._snap.append(frame)
        if frame["more"]:
            return
        state: dict[str, Any] = {}
        for part in self._snap:
            for key, value in part["state"].items():
                state[key] = [*state.get(key, []), *value] if isinstance(value, list) else value
        self._snap = []
        self.snapshots += 1
        self.state = state
        self.messages = {message["id"]: message for message in state.get("messages", [])}
        self.ep, self.last = frame["ep"], frame["seq"]
        self.applied = []
        self._base = (frame["seq"], deepcopy(self.messages))

    def _take_live(self, frame: Frame) -> None:
        if self._snap:
            self._wrong("`live` came before the last part of the snapshot", frame)
        if self.last is None:
            self.last = frame["seq"]
            self._base = (self.last, {})
        elif frame["seq"] != self.last:
            self._wrong(f"`live` says {frame['seq']} and what came before it goes to {self.last}", frame)
        self.live_at = frame["seq"]

    def _take_event(self, frame: Frame) -> None:
        seq: int = frame["seq"]
        lo: int = frame.get("from", seq)
        if lo > seq:
            self._wrong(f"a merged event goes from {lo} down to {seq}", frame)
            return
        if self.last is None:
            self._base = (lo - 1, {})
        last: int = lo - 1 if self.last is None else self.last
        if seq <= last:
            self._wrong(f"event {seq} came although the client is at {last}: doubled or out of order", frame)
            return
        if lo > last + 1:
            missing = f"{last + 1}" if lo == last + 2 else f"{last + 1} to {lo - 1}"
            self._wrong(f"a gap: event {lo} came after {last}, {missing} is missing", frame)
        elif lo <= last:
            self._wrong(f"an overlap: {lo} to {seq} came although the client is at {last}", frame)
        event = Applied(lo, seq, frame["e"], frame["d"])
        if "from" in frame and lo < seq and frame["e"] != "reply.delta":
            self._wrong(f"only deltas may be merged, and {lo} to {seq} is a {frame['e']}", frame)
        self._apply(event, frame)
        self.applied.append(event)
        self.last = seq

    # -- events --------------------------------------------------------------------------------------------------

    def _apply(self, event: Applied, frame: Frame) -> None:
        e, d = event.e, event.d
        if e in {"message.created", "message.updated"}:
            self.messages[d["id"]] = deepcopy({key: value for key, value in d.items() if key != "cid"})
        elif e == "message.deleted":
            self.messages.pop(d["id"], None)
        elif e.startswith("reply."):
            self._apply_reply(event, frame)

    def _apply_reply(self, event: Applied, frame: Frame) -> None:
        e, d = event.e, event.d
        reply = d["reply"]
        message = self.messages.get(reply)
        if reply in self.ended:
            self._wrong(f"{e} came after the end of its reply", frame)
            return
        if message is None:
            self._wrong(f"{e} came before the message of its reply", frame)
            return
        match e:
            case "reply.started" | "reply.resumed":
                message["status"] = "streaming"
            case "reply.part":
                self._part(message, d, frame)
            case "reply.delta":
                self._delta(message, d, frame)
            case "reply.tool":
                self._tool(message, d, frame)
            case "reply.reset":
                self._reset(message, d)
            case "reply.completed" | "reply.failed" | "reply.cancelled":
                self._end(message, e, d, frame)

    def _part(self, message: dict[str, Any], d: dict[str, Any], frame: Frame) -> None:
        parts = message["parts"]
        if d["state"] != "start":
            if d["part"] >= len(parts):
                self._wrong(f"part {d['part']} ends that has not begun", frame)
            return
        if d["part"] > len(parts):
            self._wrong(f"part {d['part']} begins and there are {len(parts)} before it", frame)
            return
        if d["part"] < len(parts) and parts[d["part"]]["type"] == d["kind"]:
            # After a reset the same part goes on.
            return
        parts[d["part"] :] = [{"type": d["kind"]} if d["kind"] == "tool" else {"type": d["kind"], "text": ""}]

    def _delta(self, message: dict[str, Any], d: dict[str, Any], frame: Frame) -> None:
        if d["part"] >= len(message["parts"]):
            self._wrong(f"a delta came before the start of its part {d['part']}", frame)
            return
        part = message["parts"][d["part"]]
        if "text" not in part:
            self._wrong(f"a delta came for part {d['part']}, which is no text", frame)
            return
        have = len(part["text"])
        if d["off"] != have:
            self._wrong(f"a delta has off {d['off']} and its part has {have} code points", frame)
        if d["off"] <= have:
            part["text"] += d["x"][have - d["off"] :]

    def _tool(self, message: dict[str, Any], d: dict[str, Any], frame: Frame) -> None:
        if d["part"] >= len(message["parts"]):
            self._wrong(f"a tool event came before the start of its part {d['part']}", frame)
            return
        message["parts"][d["part"]].update({key: d[key] for key in ("call", "name", "state") if key in d})

    @staticmethod
    def _reset(message: dict[str, Any], d: dict[str, Any]) -> None:
        parts = message["parts"]
        del parts[d["part"] + 1 :]
        if d["part"] < len(parts) and "text" in parts[d["part"]]:
            parts[d["part"]]["text"] = parts[d["part"]]["text"][: d["to_off"]]

    def _end(self, message: dict[str, Any], e: str, d: dict[str, Any], frame: Frame) -> None:
        self.ended[d["reply"]] = frame
        text = visible_text(message)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if (d["len"], d["sha256"]) != (len(text), digest):
            self._wrong(
                f"the text that was read has {len(text)} code points and sha256 {digest[:12]}…; "
                f"the {e} says {d['len']} and {str(d['sha256'])[:12]}…",
                frame,
            )
        whole = d["message"]
        if not isinstance(whole, dict) or whole.get("id") != d["reply"]:
            self._wrong(f"the {e} does not carry its whole message", frame)
            return
        if visible_text(whole) != text:
            self._wrong(f"the message in the {e} has another text than its deltas", frame)
        if whole["status"] != e.removeprefix("reply."):
            self._wrong(f"the message in the {e} has the status {whole['status']}", frame)
        self.messages[d["reply"]] = deepcopy(whole)
