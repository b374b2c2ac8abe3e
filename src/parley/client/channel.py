"""The client rule of `parley.v1` (docs/protocol.md, section 3) for one channel. No clock, no socket: frames in."""

from dataclasses import dataclass
from typing import Any

from parley.client.states import State, fold_for, is_intact, unseen

Frame = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Taken:
    """What an `ev` did. `d` is what was new of it: a merged range that was half known is cut."""

    applied: bool = False
    resubscribe: bool = False
    d: dict[str, Any] | None = None


_DROPPED = Taken()
_GAP = Taken(resubscribe=True)


class ChannelState:
    """`{ep, last}` of a channel together with the state that it produced.

    `last` is None while no position holds: before the first snapshot, and after the state was dropped.
    """

    def __init__(self, ch: str) -> None:
        self.ch = ch
        self.ep: str | None = None
        self.last: int | None = None
        self.state: State = {}
        self.integrity_failures = 0
        self._fold = fold_for(ch)
        self._parts: list[State] = []
        self._parts_of: tuple[str, int] | None = None
        self._awaits_snapshot = False

    @property
    def since(self) -> dict[str, Any] | None:
        """Where to resume, or None: a snapshot is needed."""
        return None if self.last is None else {"ep": self.ep, "seq": self.last}

    def forget(self) -> None:
        """Drop the position; the next subscription brings a snapshot. The old state stays until then, for display."""
        self.last = None
        self._parts, self._parts_of = [], None

    def is_behind(self, head: int) -> bool:
        """Rule 3: whether the server's head is past what is held here."""
        return self.last is None or head > self.last

    def subbed(self, frame: Frame) -> None:
        """Take the answer to a `sub`. Without recovery a snapshot follows, and nothing before it counts.

        The position holds until then, unless the log is another one: the connection may break before the snapshot.
        """
        self._parts, self._parts_of = [], None
        self._awaits_snapshot = not frame["recovered"]
        if frame["ep"] != self.ep or (self._awaits_snapshot and frame.get("why") == "epoch"):
            self.forget()

    def snap(self, frame: Frame) -> bool | None:
        """Rule 1. Returns True when the state was replaced, False when parts are to come, None when one is missing."""
        of = (frame["ep"], frame["seq"])
        if frame["part"] == 0:
            self._parts, self._parts_of = [], of
        if of != self._parts_of or frame["part"] != len(self._parts):
            self.forget()
            return None
        self._parts.append(frame["state"])
        if frame["more"]:
            return False
        parts, self._parts, self._parts_of = self._parts, [], None
        self._awaits_snapshot = False
        if self.last is not None and self.ep == frame["ep"] and frame["seq"] < self.last:
            # Asked for over a new connection while the old one still told what came next: that is not told twice.
            return False
        self.state = _joined(parts)
        self.ep, self.last = of
        return True

    def ev(self, frame: Frame) -> Taken:
        """Rules 2 and 4."""
        seq: int = frame["seq"]
        lo: int = frame.get("from", seq)
        if self.last is None or self._awaits_snapshot or seq <= self.last:
            return _DROPPED
        if lo > self.last + 1:
            return _GAP
        e, d = frame["e"], frame["d"]
        if lo <= self.last:
            d = unseen(self.state, e, d)
        intact = is_intact(self.state, e, d)
        fits = self._fold(self.state, e, d)
        self.last = seq
        if not (intact and fits):
            self.integrity_failures += 1
            self.forget()
            return Taken(applied=fits, resubscribe=True, d=d)
        return Taken(applied=True, d=d)


def _joined(parts: list[State]) -> State:
    state = dict(parts[0])
    for part in parts[1:]:
        for key, value in part.items():
            if isinstance(value, list) and isinstance(state.get(key), list):
                state[key] = state[key] + value
            elif isinstance(value, dict) and isinstance(state.get(key), dict):
                state[key] = state[key] | value
            else:
                state[key] = value
    return state
