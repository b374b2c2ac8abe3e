"""Words as the search takes them, and where they stand in a text."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Self

SNIPPET_LENGTH = 200
_BEFORE = 40
_LOOKED_AT = 200

_MARKS = re.compile("[\u0300-\u036f]")
_PUNCTUATION = str.maketrans(dict.fromkeys("!#$%&'()*+,./:;<=>?@[\\]^_`{|}~", " "))
_INNER_MINUS = re.compile(r"(?<=\S)-|-(?![\w\"])")
_PIECE = re.compile(r'(-?)"([^"]*)"?|(-?)([^\s"]+)')


def fold(text: str) -> str:
    """Return a text without accents and capitals, as the function `search_fold` of the database does."""
    if text.isascii():
        return text.lower()
    return _MARKS.sub("", unicodedata.normalize("NFKD", text)).lower()


class _SameLength(dict[int, int]):
    """For `str.translate`: each character folded to one, so that places stay what they are."""

    def __missing__(self, code: int) -> int:
        folded = fold(chr(code))
        self[code] = found = ord(folded[0]) if folded else code
        return found


_same_length = _SameLength()


@dataclass(frozen=True, slots=False)
class Words:
    """What is searched for, as `websearch_to_tsquery` takes it. `last_goes_on`: its last word may be a beginning."""

    query: str
    wanted: tuple[str, ...]
    last_goes_on: bool

    @classmethod
    def of(cls, text: str) -> Self:
        """Read what a user typed: words, "phrases", -without, or."""
        query = _INNER_MINUS.sub(" ", fold(text).translate(_PUNCTUATION))
        wanted: list[str] = []
        last_goes_on = False
        for phrase_minus, phrase, minus, word in _PIECE.findall(query):
            last_goes_on = bool(word) and not minus and word != "or"
            if word == "or" or minus or phrase_minus:
                continue
            wanted += [word] if word else phrase.split()
        return cls(query, tuple(wanted), last_goes_on and not query.endswith(" "))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        words = [rf"{re.escape(word)}(?!\w)" for word in self.wanted]
        if self.last_goes_on:
            words[-1] = rf"{re.escape(self.wanted[-1])}\w*"
        return re.compile(rf"(?<!\w)(?:{'|'.join(words)})")

    def snippet(self, text: str) -> tuple[str, list[list[int]]]:
        """Return the stretch of a text in which most of the words stand, and where in it they do."""
        if not self.wanted:
            return _cut(text, 0), []
        # An underscore parts words here, and is a letter to a regular expression.
        folded = text.translate(_same_length).replace("_", " ")
        places = [match.span() for _, match in zip(range(_LOOKED_AT), self._pattern.finditer(folded), strict=False)]
        start = max(_best(folded, places) - _BEFORE, 0)
        if start:
            # Not from the middle of a word.
            space = text.find(" ", start, start + _BEFORE)
            start = space + 1 if space >= 0 else start
        shown = _cut(text, start)
        shift = 1 - start if start else 0
        end = start + SNIPPET_LENGTH
        return shown, [[a + shift, b + shift] for a, b in places if a >= start and b <= end]


def _cut(text: str, start: int) -> str:
    end = start + SNIPPET_LENGTH
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _best(folded: str, places: list[tuple[int, int]]) -> int:
    """Return where a stretch begins that has the most different words."""
    best, most = 0, 0
    for index, (start, _) in enumerate(places):
        inside = {folded[a:b] for a, b in places[index : index + 20] if b <= start + SNIPPET_LENGTH - _BEFORE}
        if len(inside) > most:
            best, most = start, len(inside)
    return best
