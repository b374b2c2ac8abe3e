"""Where a reply that was cut off can go on: what its model has been told, what it has said, what the provider has."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from parley.llm.ports import ModelMessage, TextPart, ToolCallPart, ToolResultPart


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
        start = max((index for index, part in enumerate(parts) if part["type"] == "tool"), default=-1) + 1
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


def model_messages(role: str, parts: Iterable[dict[str, Any]]) -> Iterable[ModelMessage]:
    """Return a stored message as models take it: a reply with tool calls is several of theirs."""
    if role != "assistant":
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        yield ModelMessage("system" if role == "system" else "user", (TextPart(text),))
        return
    said: list[TextPart | ToolCallPart] = []
    results: list[ToolResultPart] = []
    for part in parts:
        if part["type"] == "text" and part["text"]:
            if results:
                yield ModelMessage("assistant", tuple(said))
                yield from (ModelMessage("tool", (result,)) for result in results)
                said, results = [], []
            said.append(TextPart(part["text"]))
        elif part["type"] == "tool":
            said.append(ToolCallPart(part["call"], part["name"], part["input"] or {}))
            output = part["output"] if part["output"] is not None else {"error": "the outcome is unknown"}
            results.append(
                ToolResultPart(
                    part["call"], part["name"], orjson.dumps(output).decode(), failed=part["state"] != "done"
                )
            )
    if said:
        yield ModelMessage("assistant", tuple(said))
    yield from (ModelMessage("tool", (result,)) for result in results)
