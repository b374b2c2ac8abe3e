"""What the provider of the fault tests says: a text that follows from the last user message and from nothing else."""

import random
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Self

_PLAIN = "etaoin shrdlu cmfwyp vbgkjq xz.,\n"
# Characters of several code points, right-to-left text, and what JSON and HTML have to escape.
_ODD = (
    "é", "e\u0301", "\u0301", "o\u0308\u0323", "ß", "שלום", "مرحبا", "\u202eabc\u202c", "日本語", "क्ष", "😀", "👩‍👩‍👧",
    "🇫🇷", "🏴\U000e0067\U000e0062\U000e007f", "\u200f", "\u200d", '"', "\\", "\\n", "</script>", "\u2028", "\x7f",
)  # fmt: skip
_LONG_EVERY = 150
_LONG_CHARACTERS = 3000


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is answered: `key=value` words of the last user message, other words are left alone."""

    seed: int = 1
    deltas: int = 40
    rate: float = 200.0  # deltas per second; 0: all at once
    ttft: float = 0.0  # seconds before the first delta
    reasoning: int = 0  # deltas of reasoning before the text
    stall: str = ""  # "N:S": before delta N nothing for S seconds
    tool: str = ""  # the name of a tool that is called between two halves of the text
    fail: str = ""  # "429", "500", "reset:N", "eof:N", "garbage:N", "error:N"
    fail_first: int = 0  # only so many calls with this very text fail; 0: all of them

    @classmethod
    def read(cls, text: str) -> Self:
        """Read a plan from a message."""
        values: dict[str, object] = {}
        kinds: dict[str, type] = {field.name: type(getattr(_DEFAULTS, field.name)) for field in fields(cls)}
        for word in text.split():
            key, equals, value = word.partition("=")
            if equals and key in kinds:
                values[key] = kinds[key](value)
        return cls(**values)  # type: ignore[arg-type]  # each was made by its field's own type

    @property
    def stages(self) -> int:
        """How many model calls the reply takes."""
        return 2 if self.tool else 1

    def pieces(self, stage: int = 0) -> tuple[str, ...]:
        """Return the deltas of a stage's visible text."""
        return _pieces(self.seed * 2 + stage, self.deltas)

    def thoughts(self, stage: int = 0) -> tuple[str, ...]:
        """Return the deltas of reasoning; only the first stage has any."""
        return tuple(f"thought {n} 😀 " for n in range(self.reasoning)) if stage == 0 else ()

    @property
    def text(self) -> str:
        """The whole visible text of a reply that nothing disturbs."""
        return "".join("".join(self.pieces(stage)) for stage in range(self.stages))

    def fault(self) -> tuple[str, int]:
        """Return the fault's name and the delta at which it comes."""
        name, _, at = self.fail.partition(":")
        return name, int(at or 0)

    def pause(self) -> tuple[int, float]:
        """Return the delta before which the provider stalls, and for how long."""
        at, _, seconds = self.stall.partition(":")
        return (int(at), float(seconds)) if seconds else (-1, 0.0)


_DEFAULTS = Plan()


@lru_cache(maxsize=512)
def _pieces(seed: int, deltas: int) -> tuple[str, ...]:
    choose = random.Random(seed)
    made = []
    for _ in range(deltas):
        if choose.randrange(_LONG_EVERY) == 0:
            made.append("".join(choose.choices(_PLAIN + "日é", k=choose.randint(1, _LONG_CHARACTERS))))
            continue
        piece = "".join(choose.choices(_PLAIN, k=choose.randint(1, 7)))
        made.append(
            choose.choice((piece + choose.choice(_ODD), choose.choice(_ODD))) if choose.random() < 0.2 else piece
        )
    return tuple(made)
