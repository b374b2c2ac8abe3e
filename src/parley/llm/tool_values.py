"""What goes into a tool and what comes out of it: both are bounded before anyone stores or reads them."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

ARGUMENT_CHARACTERS: Final = 32_000
ARGUMENT_DEPTH: Final = 16
ARGUMENT_VALUES: Final = 1_000
RESULT_CHARACTERS: Final = 16_000

_RESULT_DEPTH = 64
_BEGINNING = 2_000
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def refusal_of(arguments: dict[str, Any] | None, raw: str) -> str | None:
    """Return why a model's arguments cannot be looked at at all, in words for the model; None when they can be.

    Looked at are size, depth and characters, before anything is stored; `raw` is what the model sent.
    """
    if len(raw) > ARGUMENT_CHARACTERS:
        return f"The arguments are too long: at most {ARGUMENT_CHARACTERS} characters."
    if arguments is None:
        return "The arguments are not a JSON object."
    values, characters = 0, 0
    # No recursion: a model's nesting must not be ours.
    waiting: list[tuple[Any, int]] = [(arguments, 1)]
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, dict | list) and depth > ARGUMENT_DEPTH:
            return f"The arguments are nested too deeply: at most {ARGUMENT_DEPTH} levels."
        if isinstance(value, str):
            characters += len(value)
            if _UNSTORABLE.search(value):
                return "The arguments hold NUL or unpaired surrogates."
        if isinstance(value, dict):
            waiting += [(key, depth) for key in value]
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        if values + len(waiting) > 2 * ARGUMENT_VALUES:
            return f"The arguments hold too many values: at most {ARGUMENT_VALUES}."
        if characters > ARGUMENT_CHARACTERS:
            return f"The arguments are too long: at most {ARGUMENT_CHARACTERS} characters."
    return None


def fingerprint(arguments: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of arguments as canonical JSON: the same for the same arguments, however they are written."""
    return hashlib.sha256(orjson.dumps(arguments, option=orjson.OPT_SORT_KEYS)).digest()


def bounded_result(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's output as JSON holds it, or a note with its beginning where it is too long for a model.

    No more than the bound is ever written: what follows it is not even looked at. Raises `ValueError` for what nests
    without an end.
    """
    pieces: list[str] = []
    length = 0
    for piece in _json(output, 0):
        pieces.append(piece)
        length += len(piece)
        if length > RESULT_CHARACTERS:
            beginning = "".join(pieces)[:_BEGINNING]
            return {"error": f"the result is longer than {RESULT_CHARACTERS} characters", "beginning": beginning}
    whole: dict[str, Any] = orjson.loads("".join(pieces))
    return whole


def _json(value: Any, depth: int) -> Iterator[str]:
    if depth > _RESULT_DEPTH:
        raise ValueError("a tool's result is nested too deeply")
    if isinstance(value, Mapping):
        yield from _object(value, depth)
    elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes | bytearray):
        yield "["
        for number, item in enumerate(value):
            if number:
                yield ","
            yield from _json(item, depth + 1)
        yield "]"
    else:
        yield _scalar(value)


def _object(value: Mapping[Any, Any], depth: int) -> Iterator[str]:
    yield "{"
    for number, (key, item) in enumerate(value.items()):
        yield ("," if number else "") + _text(str(key)) + ":"
        yield from _json(item, depth + 1)
    yield "}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    if value is None or isinstance(value, bool | float):
        return orjson.dumps(value).decode()
    if isinstance(value, int):
        return str(value) if -(2**53) < value < 2**53 else f'"{value}"'
    return _text(str(value))


def _text(value: str) -> str:
    # One character more than can be taken: it is too long then, however long it is.
    clipped = _UNSTORABLE.sub("\ufffd", value[: RESULT_CHARACTERS + 1])
    return orjson.dumps(clipped).decode()
