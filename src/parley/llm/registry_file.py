"""Reads a YAML file of settings so that every mistake can be told with its line."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parley.llm.errors import RegistryInvalid

Location = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A parsed file: its data with variables filled in, and where each value stands."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[Location, int]
    variables: Mapping[Location, tuple[str, ...]]
    """The names of the environment variables that a value was made from."""

    def invalid(self, location: Location, message: str) -> RegistryInvalid:
        """Make the error for a value, with the line of the nearest thing around it that has one."""
        while location not in self.lines and location:
            location = location[:-1]
        return RegistryInvalid(self.path, self.lines.get(location, 1), message)


def read_settings(path: Path, environ: Mapping[str, str]) -> SettingsFile:
    """Read a YAML mapping and fill in ``${NAME}`` and ``${NAME:-default}``. Raises `RegistryInvalid`.

    As in a shell, a default stands in for a variable that is unset or empty; without a default the value is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RegistryInvalid(path, 1, f"the file cannot be read ({reason}); create it or fix the path") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "the file cannot be parsed"
        raise RegistryInvalid(
            path, mark.line + 1 if mark else 1, f"not valid YAML: {problem}; fix this line"
        ) from error
    except yaml.YAMLError as error:
        raise RegistryInvalid(path, 1, "not valid YAML: the file holds a character that YAML forbids") from error
    if not isinstance(root, yaml.MappingNode):
        raise RegistryInvalid(path, 1, "the file must hold the keys providers, models and aliases")

    lines: dict[Location, int] = {}
    variables: dict[Location, tuple[str, ...]] = {}
    try:
        for location, line in _walk(path, root, ()):
            lines.setdefault(location, line)
    except RecursionError as error:
        raise RegistryInvalid(
            path, 1, "the file contains itself; remove the alias that refers to what it is in"
        ) from error
    try:
        data = yaml.SafeLoader("").construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "a value cannot be read"
        raise RegistryInvalid(path, mark.line + 1 if mark else 1, f"{problem}; fix this line") from error
    except ValueError as error:  # for example the date 2026-13-45
        raise RegistryInvalid(path, 1, f"a value cannot be read: {error}; put it in quotes") from error

    settings = SettingsFile(path=path, data=data, lines=lines, variables=variables)
    settings.data.update(_fill(settings, variables, data, (), environ))
    return settings


def _walk(path: Path, node: yaml.Node, location: Location) -> Iterator[tuple[Location, int]]:
    """Yield the place of every value, and refuse keys that stand twice: YAML would take the last in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RegistryInvalid(path, line, "a key must be a plain word")
            if key.value in seen:
                raise RegistryInvalid(path, line, f'the key "{key.value}" stands here a second time; remove one')
            seen.add(key.value)
            yield (*location, key.value), line
            yield from _walk(path, value, (*location, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*location, index), item.start_mark.line + 1
            yield from _walk(path, item, (*location, index))


def _fill(
    settings: SettingsFile,
    variables: dict[Location, tuple[str, ...]],
    value: Any,
    location: Location,
    environ: Mapping[str, str],
) -> Any:
    if isinstance(value, dict):
        return {key: _fill(settings, variables, item, (*location, key), environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(settings, variables, item, (*location, index), environ) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    if "${" in _VARIABLE.sub("", value):
        raise settings.invalid(location, 'a variable is written "${NAME}" or "${NAME:-default}"')
    variables[location] = tuple(match[1] for match in _VARIABLE.finditer(value))
    return _VARIABLE.sub(lambda match: environ.get(match[1]) or match[2] or "", value)
