"""A channel as a client of the protocol's rule holds it, with the texts of the replies that run in it."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

TERMINAL = {"reply.completed", "reply.failed", "reply.cancelled"}

OnEvent = Callable[["Channel", str, dict[str, Any], int], None]
"""Told of every event that was applied: channel, name, data, and when its frame was read (monotonic ns)."""


@dataclass
class Wrong:
    """What must stay at zero."""

    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    mismatched: int = 0
    left_open: int = 0
    refused: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in asdict(self).items())

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def add(self, other: dict[str, int]) -> None:
        """Count what another process found."""
        for name, count in other.items():
            setattr(self, name, getattr(self, name) + count)


class Text:
    """What a reply has said, part by part."""

    __slots__ = ("lengths", "pieces")

    def __init__(self) -> None:
        self.pieces: dict[int, list[str]] = {}
        self.lengths: dict[int, int] = {}

    def set(self, part: int, text: str) -> None:
        self.pieces[part], self.lengths[part] = [text], len(text)

    def cut(self, part: int, length: int) -> None:
        """Shorten, as `reply.reset` asks: later parts go too."""
        for later in [number for number in self.pieces if number > part]:
            del self.pieces[later], self.lengths[later]
        self.set(part, "".join(self.pieces.get(part, []))[:length])

    @property
    def whole(self) -> str:
        return "".join("".join(self.pieces[part]) for part in sorted(self.pieces))


class Channel:
    """One channel. `seen` is the last position of the connection that is heard, `last` the one that was applied.

    With `keep` off only offsets are checked, and texts are not: for those who watch very much.
    """

    __slots__ = ("_keep", "_on_event", "_state", "epoch", "last", "name", "seen", "snapshots", "texts", "wrong")

    def __init__(self, name: str, wrong: Wrong, on_event: OnEvent | None = None, *, keep: bool = True) -> None:
        self.name = name
        self.wrong = wrong
        self.epoch: str | None = None
        self.last = -1
        self.seen = -1
        self.snapshots = 0
        self.texts: dict[str, Text] = {}
        self._on_event = on_event
        self._keep = keep
        self._state: list[dict[str, Any]] = []

    @property
    def sub(self) -> dict[str, Any]:
        """The subscription of a `hello`: live only at first, later from where it stands."""
        since = {"seq": -1} if self.epoch is None else {"ep": self.epoch, "seq": self.last}
        return {"ch": self.name, "since": since}

    def subbed(self, frame: dict[str, Any], asked: int) -> None:
        """Hear that a connection has subscribed, which had asked for what is after this position."""
        if frame["recovered"] and self.epoch is not None:
            self.seen = asked
        else:
            self.seen = frame["head"]
            if self.epoch is None:
                self.last = frame["head"]
        self.epoch = frame["ep"]

    def snap(self, frame: dict[str, Any]) -> None:
        """Take a part of a snapshot."""
        if frame["part"] == 0:
            self._state = []
        self._state += frame["state"].get("messages", ())
        if frame["more"]:
            return
        self.snapshots += 1
        self.last = self.seen = frame["seq"]
        for message in self._state:
            if message["status"] == "streaming":
                text = self.texts[message["id"]] = Text()
                for number, part in enumerate(message["parts"]):
                    if part["type"] == "text":
                        text.set(number, part["text"])

    def event(self, frame: dict[str, Any], now: int) -> None:
        """Take an event by the rule; on one connection every position comes once and none is left out."""
        seq = frame["seq"]
        first = frame.get("from", seq)
        if first <= self.seen:
            self.wrong.doubled += 1
        elif first > self.seen + 1:
            self.wrong.lost += 1
        self.seen = max(self.seen, seq)
        if seq <= self.last:
            return
        self.last = seq
        name, d = frame["e"], frame["d"]
        if name == "reply.delta" and not self._delta(d):
            return
        if name == "reply.reset":
            self._text(d["reply"]).cut(d["part"], d["to_off"])
        elif name in TERMINAL:
            self._check(d)
        if self._on_event is not None:
            self._on_event(self, name, d, now)

    def _text(self, reply: str) -> Text:
        text = self.texts.get(reply)
        if text is None:
            text = self.texts[reply] = Text()
        return text

    def _delta(self, d: dict[str, Any]) -> bool:
        """Take a delta, or what is new of it; tell whether anything was."""
        text, part = self._text(d["reply"]), d["part"]
        length = text.lengths.get(part, 0)
        if d["off"] > length:
            self.wrong.lost += 1
        elif d["off"] < length:
            d["x"] = d["x"][length - d["off"] :]
            if not d["x"]:
                return False
        text.lengths[part] = max(length, d["off"]) + len(d["x"])
        if self._keep:
            text.pieces.setdefault(part, []).append(d["x"])
        return True

    def _check(self, d: dict[str, Any]) -> None:
        """Compare the text with what its last event vouches for."""
        text = self._text(d["reply"])
        length = sum(text.lengths.values())
        whole = text.whole if self._keep else ""
        if length != d["len"] or (self._keep and hashlib.sha256(whole.encode()).hexdigest() != d["sha256"]):
            self.wrong.mismatched += 1
