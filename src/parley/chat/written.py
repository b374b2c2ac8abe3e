"""What the log has of a reply, for whoever goes on with it or ends it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parley.realtime.fold import apply_reply_event

UNSETTLED = frozenset({"input", "approval", "running"})
"""States of a tool call that something is to follow."""


@dataclass(frozen=True, slots=True)
class Written:
    """What the log has of a reply. `is_open`: its last part is text that has not ended.

    `model` is the one that was last said to be writing it.
    """

    parts: list[dict[str, Any]]
    is_open: bool
    model: str | None = None

    @classmethod
    def from_events(cls, events: Iterable[tuple[str, dict[str, Any]]]) -> "Written":
        """Fold a reply's events."""
        folded: dict[str, Any] = {"status": "queued", "parts": [], "model": None}
        is_open = False
        for e, d in events:
            apply_reply_event(folded, e, d)
            if e == "reply.part":
                is_open = d["state"] == "start" and d["kind"] != "tool"
            elif e == "reply.reset":
                is_open = _cut(folded["parts"], d["part"])
        return cls(folded["parts"], is_open, folded["model"])

    @property
    def ending(self) -> list[dict[str, Any]]:
        """The parts as they are when nothing follows: a call that was under way has an unknown outcome."""
        return settled(self.parts)


def _cut(parts: list[dict[str, Any]], index: int) -> bool:
    """Drop a part of which a reset left nothing: what comes next opens its own. Returns whether its text is open."""
    if index >= len(parts) or parts[index]["type"] == "tool":
        return False
    if parts[index]["text"]:
        return True
    del parts[index:]
    return False


def step_start(parts: Sequence[dict[str, Any]]) -> int:
    """Return the index where the last call of the model began: what follows a tool's result is a new call."""
    return max((index for index, part in enumerate(parts) if part["type"] == "tool"), default=-1) + 1


def settled(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parts of which nothing is expected any more.

    A call that was cut off has an unknown outcome; one that still waited for a yes was not made.
    """
    return [_settled(part) for part in parts]


def _settled(part: dict[str, Any]) -> dict[str, Any]:
    match part.get("state"):
        case "approval":
            return {**part, "state": "failed", "output": {"error": "The reply ended before this call was approved."}}
        case "input" | "running":
            return {**part, "state": "unknown"}
    return part
