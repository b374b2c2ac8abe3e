"""How the fake provider is told to answer, and the text that it then streams."""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

_LETTERS = "etaoin shrdlu cmfwyp vbgkjq xz.,\n"
_OTHERS = (
    "é",
    "e\u0301",
    "o\u0308",
    "ß",
    "שלום",
    "مرحبا",
    "日本",
    "क्ष",
    "😀",
    "👩‍👩‍👧",
    "🇫🇷",
    "\u200f",
    '"',
    "\\",
    "</a>",
)


@lru_cache(maxsize=256)
def script(seed: int, deltas: int, size: int) -> tuple[str, ...]:
    """Return the pieces of text that a plan streams: about `size` characters each, one in eight from other scripts."""
    choose = random.Random(seed)
    pieces = []
    for _ in range(deltas):
        piece = "".join(choose.choice(_LETTERS) for _ in range(max(1, choose.randint(size - 1, size + 1))))
        pieces.append(piece + choose.choice(_OTHERS) if choose.random() < 0.125 else piece)
    return tuple(pieces)


@dataclass(slots=True)
class Plan:
    """How a call is answered."""

    deltas: int = 20
    rate: float = 0.0  # deltas per second; 0 is as fast as the reader takes them
    ttft: float = 0.0  # seconds before the first delta
    seed: int = 1
    size: int = 4
    reasoning: int = 0  # deltas of reasoning before the text
    burst: int = 0  # 1: all deltas in one write
    stamp: int = 0  # 1: each delta is "<time.monotonic_ns()>|" at its sending
    retry_after: str = ""  # the header of a refusal
    fail: str = ""
    """A status such as 429, 400ctx, 400filter; `garbage`, `nothing`, `slow_headers`, `huge_line`, `no_done`, `html`;
    `endless_line` (a gigabyte, if it is taken); `drip`, twenty deltas in a second;
    with a number of deltas `die_at:N`, `end_at:N`, `stall_at:N`, `error_event_at:N`; or two odd encodings of a good
    answer, `split_utf8` (cut inside characters) and `surrogates` (pairs cut between two deltas)."""
    spare_first: int = 0  # do not fail so many calls with this very text
    fail_first: int = 0  # then fail only so many of them; 0 is all
    tools: list[tuple[str, str]] = field(default_factory=list)  # name and raw arguments
    say: str = ""  # the text itself, instead of the script; in a plan it is one word
    end: str = ""  # why it ends: `length`, `filter`, or `refusal`, whose text comes as one
    given: str = ""  # the beginning of the answer, if the caller gave it and it is that
    echo: int = 0  # 1: say the given beginning again, as Mistral does: white space at its end comes with what follows

    # How a response in the background is read a second time.
    expired: int = 0  # the status, such as 400, with which it is not streamed again
    forget: int = 0  # 1: nor known as an object
    other: int = 0  # 1: its object holds another text
    overlap: int = 0  # so many events before those that are wanted come again; below 0, so many are left out
    poll_faults: int = 0  # so many times its object cannot be had
    deaf: int = 0  # 1: an order to stop is not answered
    refail: str = ""  # as `fail`, for the connection that reads again

    @classmethod
    def read(cls, text: str, *, with_tools: bool) -> Self:
        """Read a plan from a message; words that are none of it are left alone."""
        plan = cls()
        for word in text.split():
            key, equals, value = word.partition("=")
            if key == "tool" and equals:
                name, _, arguments = value.partition(":")
                if with_tools:
                    plan.tools.append((name, arguments or "{}"))
            elif equals and key in cls.__slots__:
                before = getattr(plan, key)
                setattr(plan, key, type(before)(value))
        return plan

    def spare(self, number: int) -> None:
        """Leave the fault out of a call that it is not meant for: the so-manieth with this text, from 1."""
        number -= self.spare_first
        if number <= 0 or 0 < self.fail_first < number:
            self.fail = ""

    @property
    def pace(self) -> float:
        """Deltas per second."""
        return 20 if self.fail == "drip" else self.rate

    @property
    def fault(self) -> tuple[str, int]:
        """The name of the fault and the delta at which it comes."""
        name, _, at = self.fail.partition(":")
        return name, int(at or 0)

    def pieces(self) -> tuple[str, ...]:
        """Return the text, piece by piece."""
        whole = script(self.seed, self.deltas, self.size)
        if self.say:
            whole = tuple(self.say[at : at + self.size] for at in range(0, len(self.say), self.size))
        if not self.given or not "".join(whole).startswith(self.given):
            return whole
        left, at = len(self.given), 0
        while left and left >= len(whole[at]):
            left -= len(whole[at])
            at += 1
        rest = (whole[at][left:], *whole[at + 1 :]) if left else whole[at:]
        if self.echo:
            kept = self.given.rstrip()
            rest = (kept, self.given[len(kept) :] + (rest[0] if rest else ""), *rest[1:])
        return tuple(piece for piece in rest if piece)
