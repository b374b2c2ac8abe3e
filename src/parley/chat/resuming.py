"""Where a reply that was cut off can go on: what its model has been told, what it has said, what the provider has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parley.chat.written import step_start


@dataclass(frozen=True, slots=True)
class Step:
    """A reply's parts, cut where its last call of the model began.

    `before` is of the calls that have ended; `said` the visible text of the one that has not, `reasoned` how much
    reasoning it has shown (code points).
    """

    before: list[dict[str, Any]]
    said: str
    reasoned: int

    @classmethod
    def last_of(cls, parts: Sequence[dict[str, Any]]) -> "Step":
        """Cut after the last tool call: what follows its result is a new call of the model."""
        start = step_start(parts)
        rest = parts[start:]
        return cls(
            before=list(parts[:start]),
            said="".join(part["text"] for part in rest if part["type"] == "text"),
            reasoned=sum(len(part["text"]) for part in rest if part["type"] == "reasoning"),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a provider's stream, with how much of it was in the log there.

    A tick may have taken a piece of text before the place behind it was known: the counts say how much of what the
    provider sends again is there already.
    """

    model: str
    said: int
    reasoned: int
    cursor: str

    def to_text(self) -> str:
        """Return what is stored with the run."""
        return f"{self.model}|{self.said}|{self.reasoned}|{self.cursor}"

    @classmethod
    def from_text(cls, text: str | None) -> "Place | None":
        """Read what was stored; None where there is nothing."""
        if not text:
            return None
        model, said, reasoned, cursor = text.split("|", 3)
        return cls(model, int(said), int(reasoned), cursor)
