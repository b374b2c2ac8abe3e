"""Makes text from providers safe to store: whole code points, no lone surrogate, no NUL."""

import json
import re
from typing import Any

import orjson

from parley.llm.errors import BadOutput

_UNSAFE = re.compile("[\x00\ud800-\udfff]")


def clean(text: str) -> str:
    """Join surrogate pairs, put U+FFFD for lone surrogates, and drop NULs, which PostgreSQL cannot store."""
    if not _UNSAFE.search(text):
        return text
    return text.replace("\x00", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class TextJoiner:
    """Cleans text that comes in pieces: a surrogate pair may be cut between two of them."""

    __slots__ = ("_high",)

    def __init__(self) -> None:
        self._high = ""

    @property
    def waiting(self) -> bool:
        """Whether half a character is held back."""
        return bool(self._high)

    def feed(self, piece: str) -> str:
        """Return the text that is complete; empty when all of it has to wait for the next piece."""
        if not self._high and not _UNSAFE.search(piece):
            return piece
        piece = (self._high + piece).replace("\x00", "")
        self._high = ""
        if "\ud800" <= piece[-1:] <= "\udbff":
            self._high = piece[-1]
            piece = piece[:-1]
        return clean(piece)

    def flush(self) -> str:
        """Return what stands for a first half whose second half never came."""
        held, self._high = self._high, ""
        return "\ufffd" if held else ""


def read_json(data: bytes) -> Any:
    """Parse JSON from a provider. Raises `BadOutput`.

    orjson refuses lone surrogate escapes, which some providers send when they cut an emoji in two; the standard parser
    takes them, so strings may hold surrogates.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if b"\\u" not in data:
            raise BadOutput from None
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise BadOutput from None


def read_arguments(raw: str) -> dict[str, Any] | None:
    """Parse the arguments of a tool call; None when they are not a JSON object. Empty text means no arguments."""
    if not raw.strip():
        return {}
    try:
        value = read_json(raw.encode())
    except BadOutput:
        return None
    if not isinstance(value, dict):
        return None
    try:
        value = _clean_within(value) if "\\u" in raw else value
        # What cannot be written again (deeper than 254, beyond 64 bits) can be neither stored nor sent.
        orjson.dumps(value)
    except (TypeError, RecursionError):
        return None
    return value


def _clean_within(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_clean_within(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): _clean_within(item) for key, item in value.items()}
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
