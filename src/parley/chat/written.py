"""What the log has of a reply, for whoever goes on with it or ends it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parley.realtime.fold import apply_reply_event


@dataclass(frozen=True, slots=True)
class Written:
    """What the log has of a reply. `is_open`: its last part is text that has not ended."""

    parts: list[dict[str, Any]]
    is_open: bool

    @classmethod
    def from_events(cls, events: Iterable[tuple[str, dict[str, Any]]]) -> "Written":
        """Fold a reply's events."""
        folded: dict[str, Any] = {"status": "queued", "parts": [], "model": None}
        is_open = False
        for e, d in events:
            apply_reply_event(folded, e, d)
            if e == "reply.part":
                is_open = d["state"] == "start" and d["kind"] != "tool"
        return cls(folded["parts"], is_open)

    @property
    def ending(self) -> list[dict[str, Any]]:
        """The parts as they are when nothing follows: a call that was under way has an unknown outcome."""
        return settled(self.parts)


def settled(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parts of which nothing is expected any more: a call that was cut off has an unknown outcome."""
    return [{**part, "state": "unknown"} if part.get("state") in {"input", "running"} else part for part in parts]
