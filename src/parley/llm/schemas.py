"""Puts a JSON schema into the restricted form in which providers guarantee it.

https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
https://docs.anthropic.com/en/docs/build-with-claude/structured-outputs

What the form cannot say is told in the description, which only allows more: every complete instance of the schema is
still one of the stricter form, and what comes back has to be validated against the original.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from parley.llm.flavours import flavour_of
from parley.llm.ports import JsonSchema, ModelRequest
from parley.llm.registry import Capability, ModelEntry

_MAX_NODES: Final = 5_000
_TYPES: Final[Mapping[type, str]] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}
_FORMATS: Final = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
_TOLD: Final = (
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minItems", "maxItems", "uniqueItems",
)  # fmt: skip
# Their grammars know no look-around, no back-references and no word boundaries.
_TOO_CLEVER: Final = re.compile(r"\(\?|\\[bB1-9]")


@dataclass(frozen=True, slots=True)
class Restrictions:
    """What a provider's strict form can say."""

    keywords: frozenset[str]
    recursion: bool


OPENAI: Final = Restrictions(
    keywords=frozenset(
        {
            "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
            "minItems", "maxItems", "pattern", "format",
        }
    ),
    recursion=True,
)  # fmt: skip
ANTHROPIC: Final = Restrictions(keywords=frozenset({"format"}), recursion=False)


def takes_schema(entry: ModelEntry, wanted: JsonSchema) -> bool:
    """Return whether a model is given this schema by its provider, so that it need not be told of it in words."""
    if Capability.JSON_SCHEMA not in entry.capabilities:
        return False
    if entry.kind == "anthropic":
        return strict_schema(wanted.schema, ANTHROPIC) is not None
    return entry.kind != "openai" or flavour_of(entry.base_url, entry.flavour).schema != "object"


def schema_for(entry: ModelEntry, request: ModelRequest) -> JsonSchema | None:
    """Return the schema that a request gives a model: none for a model that is not said to know such a thing."""
    return request.response_schema if Capability.JSON_SCHEMA in entry.capabilities else None


class _Unsayable(Exception):
    """The strict form has nothing that allows all that the schema allows."""


def strict_schema(schema: Mapping[str, Any], restrictions: Restrictions = OPENAI) -> dict[str, Any] | None:
    """Return the schema in a provider's strict form, None when it has no such form.

    Objects are closed and all their properties required: an instance has to be complete, as Pydantic dumps it. There
    is no strict form of free keys, of values of any type, of a root that is no object.
    """
    try:
        return _Strict(schema, restrictions).root()
    except (_Unsayable, RecursionError, TypeError, AttributeError):
        # The last two are of what is no schema at all: it may come from a caller.
        return None


class _Strict:
    def __init__(self, schema: Mapping[str, Any], restrictions: Restrictions) -> None:
        self._schema = schema
        self._restrictions = restrictions
        self._definitions: dict[str, Any] = {}
        self._open: list[str] = []
        self._nodes = 0

    def root(self) -> dict[str, Any]:
        node = self._schema
        seen = 0
        while "$ref" in node:
            node = self._target(node["$ref"])
            seen += 1
            if seen > len(self._schema):
                raise _Unsayable
        found = self._node(node)
        if found.get("type") != "object":
            raise _Unsayable
        return found | ({"$defs": self._definitions} if self._definitions else {})

    def _node(self, node: Any) -> dict[str, Any]:
        self._nodes += 1
        if not isinstance(node, Mapping) or self._nodes > _MAX_NODES:
            raise _Unsayable
        if "$ref" in node:
            return self._reference(node)
        if "allOf" in node:
            return self._node(_merged(node))
        described = _described(node)
        if choices := node.get("anyOf") or node.get("oneOf"):
            if "properties" in node:
                raise _Unsayable
            return described | {"anyOf": [self._node(choice) for choice in choices]}
        if "const" in node:
            node = {**node, "enum": [node["const"]]}
        if "enum" in node:
            return described | _enumeration(node["enum"])
        kind = node.get("type")
        if isinstance(kind, list):
            return described | {"anyOf": [self._node({**node, "type": one}) for one in kind]}
        return described | self._typed(kind, node)

    def _typed(self, kind: object, node: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"type": kind}
        if kind == "object":
            properties = node.get("properties")
            free = node.get("additionalProperties", False) is not False or "patternProperties" in node
            if free or not isinstance(properties, Mapping):
                raise _Unsayable
            found["properties"] = {name: self._node(one) for name, one in properties.items()}
            found["required"] = list(properties)
            found["additionalProperties"] = False
        elif kind == "array":
            items = node.get("items")
            if before := node.get("prefixItems"):
                # Which type stands where cannot be said, only which may.
                each = [*before, *([items] if isinstance(items, Mapping) else [])]
                found["items"] = {"anyOf": [self._node(one) for one in each]}
            else:
                found["items"] = self._node(items)
        elif kind not in _TYPES.values():
            raise _Unsayable
        kept = {key for key in self._restrictions.keywords & node.keys() if _sayable(key, node[key])}
        # What cannot be guaranteed can still be told: an answer that has to be asked for again is paid for twice.
        if told := [f"{key}: {node[key]}" for key in _TOLD if key in node and key not in kept]:
            words = [node["description"]] if isinstance(node.get("description"), str) else []
            found["description"] = " ".join([*words, f"({', '.join(told)})"])
        return found | {key: node[key] for key in node if key in kept}

    def _reference(self, node: Mapping[str, Any]) -> dict[str, Any]:
        pointer = node["$ref"]
        name = str(pointer).rpartition("/")[2]
        if name in self._open:
            if not self._restrictions.recursion or not name:
                raise _Unsayable
            self._definitions.setdefault(name, None)
            return {"$ref": f"#/$defs/{name}"}
        if self._definitions.get(name) is not None:
            return {"$ref": f"#/$defs/{name}"}
        target = self._target(pointer)
        self._open.append(name)
        found = self._node(target)
        self._open.pop()
        if name in self._definitions:
            # It holds itself, so it has to have a name; nothing may stand beside a reference.
            self._definitions[name] = found
            return {"$ref": f"#/$defs/{name}"}
        return found | _described(node)

    def _target(self, pointer: object) -> Mapping[str, Any]:
        if not isinstance(pointer, str) or not (match := re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", pointer)):
            raise _Unsayable
        found = self._schema.get(match[1], {}).get(match[2])
        if not isinstance(found, Mapping):
            raise _Unsayable
        return found


def _described(node: Mapping[str, Any]) -> dict[str, Any]:
    # Titles repeat the names, and every word of a schema is paid for.
    return {"description": node["description"]} if isinstance(node.get("description"), str) else {}


def _sayable(key: str, value: Any) -> bool:
    if key == "format":
        return value in _FORMATS
    return key != "pattern" or not _TOO_CLEVER.search(value)


def _merged(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node whose `allOf` has one part, as generators write what stands beside a reference."""
    if len(node["allOf"]) != 1 or not isinstance(node["allOf"][0], Mapping):
        raise _Unsayable
    return {**node["allOf"][0], **{key: value for key, value in node.items() if key != "allOf"}}


def _enumeration(values: Iterable[Any]) -> dict[str, Any]:
    by_type: dict[str, list[Any]] = {}
    for value in values:
        if type(value) not in _TYPES:
            raise _Unsayable
        by_type.setdefault(_TYPES[type(value)], []).append(value)
    choices = [{"type": kind, "enum": those} for kind, those in by_type.items()]
    return choices[0] if len(choices) == 1 else {"anyOf": choices}
