"""Writes a conversation's log for tests, and keeps the truth by simpler means than the fold."""

import copy
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

Frame = dict[str, Any]
CHANNEL = "conversation:c1"

texts = st.text(alphabet="aé€😀\n ", min_size=1, max_size=5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask")),
        st.tuples(st.just("delta"), st.integers(0, 3), texts),
        st.tuples(st.just("delta"), st.integers(0, 3), texts),
        st.tuples(st.just("delta"), st.integers(0, 3), texts),
        st.tuples(st.just("part"), st.integers(0, 3), st.sampled_from(["text", "reasoning"])),
        st.tuples(st.just("tool"), st.integers(0, 3)),
        st.tuples(st.just("resume"), st.integers(0, 3), st.sampled_from(["demo", "other"])),
        st.tuples(st.just("reset"), st.integers(0, 3), st.integers(0, 5), st.integers(0, 12)),
        st.tuples(st.just("end"), st.integers(0, 3), st.sampled_from(["completed", "failed", "cancelled"])),
        st.tuples(st.just("edit"), st.integers(0, 9)),
        st.tuples(st.just("delete"), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=60,
)


def message(id: str, role: str, status: str, parts: list[Frame], parent: str | None) -> Frame:
    return {
        "id": id, "conversation_id": "c1", "role": role, "parts": parts, "status": status, "model": None,
        "parent_id": parent, "usage": None, "cost": None, "error": None, "created_at": "2026-01-01T00:00:00Z",
        "completed_at": None,
    }  # fmt: skip


@dataclass
class Author:
    """Appends events; `states[n]` is the truth after event `n`."""

    ep: str = "e1"
    events: list[tuple[str, Frame]] = field(default_factory=list)
    state: Frame = field(default_factory=lambda: {"conversation": {"id": "c1", "current_id": None}, "messages": []})
    states: list[Frame] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.states.append(copy.deepcopy(self.state))

    @property
    def head(self) -> int:
        return len(self.events)

    def log(self, e: str, d: Frame) -> None:
        self.events.append((e, copy.deepcopy(d)))
        self.states.append(copy.deepcopy(self.state))

    def write(self, todo: list[tuple[Any, ...]]) -> "Author":
        for name, *arguments in todo:
            getattr(self, name)(*arguments)
        return self

    def _open(self, which: int = 0) -> Frame | None:
        found = [
            m for m in self.state["messages"] if m["role"] == "assistant" and m["status"] in {"queued", "streaming"}
        ]
        return found[which % len(found)] if found else None

    def _add(self, made: Frame, cid: str | None) -> None:
        self.state["messages"].append(made)
        self.state["conversation"]["current_id"] = made["id"]
        self.log("message.created", {**made, "cid": cid})

    def ask(self) -> str:
        self._count += 1
        question, reply = f"m{self._count:04}q", f"m{self._count:04}r"
        self._add(message(question, "user", "completed", [{"type": "text", "text": "why?"}], None), "cid")
        made = message(reply, "assistant", "queued", [], question)
        self._add(made, None)
        made["status"], made["model"] = "streaming", "demo"
        self.log("reply.started", {"reply": reply, "to": question, "model": "demo", "attempt": 1})
        return reply

    def part(self, which: int, kind: str) -> None:
        if reply := self._open(which):
            reply["parts"].append({"type": kind, "text": ""})
            self.log(
                "reply.part", {"reply": reply["id"], "part": len(reply["parts"]) - 1, "kind": kind, "state": "start"}
            )

    def delta(self, which: int, text: str) -> None:
        reply = self._open(which)
        if reply is None:
            return
        if not reply["parts"] or reply["parts"][-1]["type"] == "tool":
            self.part(which, "text")
        part = reply["parts"][-1]
        off = len(part["text"])
        part["text"] += text
        self.log("reply.delta", {"reply": reply["id"], "part": len(reply["parts"]) - 1, "off": off, "x": text})

    def tool(self, which: int) -> None:
        if reply := self._open(which):
            index, call = len(reply["parts"]), f"call{self.head}"
            part = {
                "type": "tool",
                "call": call,
                "name": "add_task",
                "state": "input",
                "input": {"a": 1},
                "output": None,
            }
            about = {"reply": reply["id"], "part": index}
            empty = {**part, "call": None, "name": None, "input": None}
            reply["parts"].append(empty)
            self.log("reply.part", {**about, "kind": "tool", "state": "start"})
            reply["parts"][index] = part
            self.log("reply.tool", {**about, "call": call, "name": "add_task", "state": "input", "input": {"a": 1}})
            part["state"], part["output"] = "done", {"ok": True}
            self.log("reply.tool", {**about, "call": call, "name": "add_task", "state": "done", "output": {"ok": True}})
            self.log("reply.part", {**about, "kind": "tool", "state": "end"})

    def resume(self, which: int, model: str) -> None:
        if reply := self._open(which):
            reply["model"] = model
            about = {"reply": reply["id"], "attempt": 2, "model": model}
            self.log("reply.resumed", {**about, "strategy": "prefill"})

    def reset(self, which: int, part: int, to_off: int) -> None:
        reply = self._open(which)
        if reply is None or not reply["parts"]:
            return
        index = part % len(reply["parts"])
        to_off = min(to_off, len(reply["parts"][index].get("text", "")))
        del reply["parts"][index + 1 :]
        if "text" in reply["parts"][index]:
            reply["parts"][index]["text"] = reply["parts"][index]["text"][:to_off]
        self.log("reply.reset", {"reply": reply["id"], "attempt": 2, "part": index, "to_off": to_off})

    def end(self, which: int, status: str) -> None:
        if reply := self._open(which):
            reply["status"], reply["completed_at"] = status, "2026-01-01T00:00:09Z"
            text = "".join(part["text"] for part in reply["parts"] if part["type"] == "text")
            check = {"len": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            self.log(f"reply.{status}", {"reply": reply["id"], "message": reply, **check})

    def edit(self, which: int) -> None:
        questions = [m for m in self.state["messages"] if m["role"] == "user"]
        if questions:
            edited = questions[which % len(questions)]
            edited["parts"] = [{"type": "text", "text": f"edited {self.head}"}]
            self.log("message.updated", {**edited, "cid": None})

    def delete(self, which: int) -> None:
        gone = [m for m in self.state["messages"] if m["status"] in {"completed", "failed", "cancelled"}]
        if gone:
            victim = gone[which % len(gone)]
            self.state["messages"].remove(victim)
            if self.state["conversation"]["current_id"] == victim["id"]:
                self.state["conversation"]["current_id"] = victim["parent_id"]
            self.log("message.deleted", {"id": victim["id"]})

    # -- frames --------------------------------------------------------------------------------------------------

    def ev(self, first: int, most: int = 1) -> Frame:
        """Return the frame that begins with an event; up to `most` deltas of one part are merged into it."""
        e, d = self.events[first - 1]
        last, d = first, dict(d)
        while e == "reply.delta" and last < self.head and last - first + 1 < most:
            e2, d2 = self.events[last]
            if e2 != e or (d2["reply"], d2["part"]) != (d["reply"], d["part"]) or d2["off"] != d["off"] + len(d["x"]):
                break
            d["x"] += d2["x"]
            last += 1
        merged = {"from": first} if last > first else {}
        return wire({"t": "ev", "ch": CHANNEL, **merged, "seq": last, "e": e, "d": d, "ts": 0})

    def subbed(self, *, recovered: bool, **fields: Any) -> Frame:
        return {
            "t": "subbed", "ch": CHANNEL, "ep": self.ep, "head": self.head, "floor": 0, "mode": "log",
            "recovered": recovered, "why": "ok" if recovered else "initial", **fields,
        }  # fmt: skip

    def snap(self, seq: int | None = None, *, per_part: int = 50) -> list[Frame]:
        seq = self.head if seq is None else seq
        state = self.states[seq]
        messages = state["messages"]
        lists = [messages[at : at + per_part] for at in range(0, len(messages), per_part)] or [[]]
        return [
            wire({
                "t": "snap", "ch": CHANNEL, "ep": self.ep, "seq": seq, "part": number, "more": number + 1 < len(lists),
                "state": {"conversation": state["conversation"], "messages": part},
            })
            for number, part in enumerate(lists)
        ]  # fmt: skip

    def live(self) -> Frame:
        return {"t": "live", "ch": CHANNEL, "seq": self.head}

    def answer(self, since: Frame | None) -> list[Frame]:
        """Return the frames that answer a `sub`."""
        if since is None or since["ep"] != self.ep or since["seq"] > self.head:
            return [self.subbed(recovered=False), *self.snap(), self.live()]
        replay = [self.ev(seq) for seq in range(since["seq"] + 1, self.head + 1)]
        return [self.subbed(recovered=True), *replay, self.live()]


def wire(frame: Frame) -> Frame:
    """Return a frame as it comes from the wire: nothing of it is shared."""
    copied: Frame = json.loads(json.dumps(frame))
    return copied
