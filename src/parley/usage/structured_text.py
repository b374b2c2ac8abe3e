"""Takes a JSON object out of what a model said, and says what is wrong with it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
from pydantic import BaseModel, ValidationError

from parley.llm.text import read_arguments

_FENCE = re.compile(r"```[A-Za-z0-9_-]*[ \t]*\n(.*?)```", re.DOTALL)
_MAX_STARTS = 50
_MAX_PROBLEMS = 20
_MAX_PROBLEM_CHARS = 300
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Problems:
    """Why a text is no instance of a schema, in words that a model can act on."""

    lines: tuple[str, ...]


def read_instance[T: BaseModel](text: str, schema: type[T]) -> T | Problems:
    """Return the first instance in a text: the text itself, what stands in a fence, or an object among other words."""
    found: Problems | None = None
    for candidate in _candidates(text):
        try:
            return schema.model_validate_json(_storable(candidate))
        except ValidationError as error:
            problems = _problems(error)
            # What is JSON at all says more of what is wrong than the words around it.
            if found is None or (_is_syntax(found) and not _is_syntax(problems)):
                found = problems
    return found or Problems(("There is no JSON object in it.",))


def _candidates(text: str) -> Iterator[str]:
    whole = text.strip().removeprefix("\ufeff")
    if whole[:1] in {"{", "["}:
        yield whole
    yield from (match[1].strip() for match in _FENCE.finditer(text) if match[1].strip())
    at = -1
    for _ in range(_MAX_STARTS):
        at = text.find("{", at + 1)
        if at < 0:
            return
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        yield text[at:end]
        at = end - 1


def _storable(candidate: str) -> str:
    """Clean what is written as escapes: half characters, and the one that PostgreSQL cannot store."""
    if "\\u" not in candidate or (cleaned := read_arguments(candidate)) is None:
        return candidate
    return orjson.dumps(cleaned).decode()


def _problems(error: ValidationError) -> Problems:
    lines = []
    for item in error.errors(include_url=False, include_input=False, include_context=False)[:_MAX_PROBLEMS]:
        where = ".".join(str(step) for step in item["loc"])
        line = f"{where}: {item['msg']}" if where else item["msg"]
        lines.append(line[:_MAX_PROBLEM_CHARS])
    return Problems(tuple(lines))


def _is_syntax(problems: Problems) -> bool:
    return problems.lines[:1] != () and problems.lines[0].startswith("Invalid JSON")
