"""Tells reasoning from an answer where a server sends both as text, the reasoning first and between two marks."""

from enum import Enum, auto

Pieces = list[tuple[bool, str]]
"""Pieces of text, each with whether it is reasoning."""


class _At(Enum):
    START = auto()
    INSIDE = auto()
    BEHIND = auto()


class ThoughtTags:
    """Takes text in pieces, cut anywhere, and gives it on without the marks.

    Only what stands at the very start, behind white space at most, is reasoning: a mark further on is the model's own
    text. Line ends behind the closing mark belong to neither. `over` says that nothing is left to find.
    """

    __slots__ = ("_at", "_close", "_held", "_open", "over")

    def __init__(self, opening: str, closing: str) -> None:
        self._open = opening
        self._close = closing
        self._held = ""
        self._at = _At.START
        self.over = False

    def feed(self, piece: str) -> Pieces:
        """Return what is certain now."""
        if self.over:
            return [(False, piece)]
        found: Pieces = []
        held = self._held + piece
        self._held = ""
        if self._at is _At.START:
            start = held.lstrip()
            if not start.startswith(self._open):
                if self._open.startswith(start):
                    self._held = held
                    return []
                self.over = True
                return [(False, held)]
            self._at = _At.INSIDE
            held = start[len(self._open) :]
        if self._at is _At.INSIDE:
            thought, mark, rest = held.partition(self._close)
            if not mark:
                kept = self._half_a_mark(held)
                thought, self._held = held[: len(held) - kept], held[len(held) - kept :]
            else:
                self._at = _At.BEHIND
            if thought:
                found.append((True, thought))
            held = rest
        if self._at is _At.BEHIND and (answer := held.lstrip("\n")):
            self.over = True
            found.append((False, answer))
        return found

    def flush(self) -> Pieces:
        """Return what was held back, at the end."""
        held, self._held = self._held, ""
        self.over = True
        return [(self._at is _At.INSIDE, held)] if held else []

    def _half_a_mark(self, text: str) -> int:
        """Return how much of the end of a text may be the beginning of the closing mark."""
        for size in range(min(len(self._close) - 1, len(text)), 0, -1):
            if self._close.startswith(text[-size:]):
                return size
        return 0
