"""Makes a small instance of a JSON schema, always the same one: what the demo model answers with."""

import re
from collections.abc import Mapping
from typing import Any, Final

_MAX_DEPTH: Final = 32
_MAX_LENGTH: Final = 1_000
_BY_FORMAT: Final[Mapping[str, str]] = {
    "date-time": "2000-01-01T00:00:00Z",
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "demo@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_TRIED: Final = (
    "demo",
    "Demo",
    "d",
    "D",
    "demo-1",
    "1",
    "0",
    "00",
    "000",
    "0000",
    "2000",
    "AAA",
    "aa",
    "AA",
    "#000000",
    "",
)


def example_of(schema: Mapping[str, Any]) -> Any:
    """Return an instance with as little in it as the schema allows. A pattern may be too hard: then it does not fit."""
    return _Example(schema).make(schema, 0)


class _Example:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def make(self, node: Any, depth: int) -> Any:
        if not isinstance(node, Mapping) or depth > _MAX_DEPTH:
            return None
        if "$ref" in node:
            beside = {key: value for key, value in node.items() if key != "$ref"}
            return self.make({**self._target(node["$ref"]), **beside}, depth + 1)
        if "const" in node:
            return node["const"]
        if values := node.get("enum"):
            return values[0]
        if parts := node.get("allOf"):
            merged = {key: value for part in parts for key, value in self._whole(part).items()}
            return self.make({**merged, **{key: value for key, value in node.items() if key != "allOf"}}, depth + 1)
        if choices := node.get("anyOf") or node.get("oneOf"):
            # Nothing at all is the least, and ends what would hold itself for ever.
            least = next((one for one in choices if isinstance(one, Mapping) and one.get("type") == "null"), choices[0])
            return self.make(least, depth + 1)
        kind = node.get("type", "object" if "properties" in node else None)
        return self._typed(kind[0] if isinstance(kind, list) else kind, node, depth)

    def _typed(self, kind: object, node: Mapping[str, Any], depth: int) -> Any:
        match kind:
            case "object":
                properties = node.get("properties", {})
                return {name: self.make(properties.get(name, {}), depth + 1) for name in node.get("required", ())}
            case "array":
                before = list(node.get("prefixItems", ()))
                count = min(max(node.get("minItems", 0), len(before)), _MAX_LENGTH)
                items = [*before, *[node.get("items", {})] * (count - len(before))]
                return [self.make(item, depth + 1) for item in items]
            case "string":
                return _text(node)
            case "integer":
                return int(_number(node))
            case "number":
                return _number(node)
            case "boolean":
                return False
        return None

    def _whole(self, node: Any) -> Mapping[str, Any]:
        found = self._target(node["$ref"]) if isinstance(node, Mapping) and "$ref" in node else node
        return found if isinstance(found, Mapping) else {}

    def _target(self, pointer: object) -> Mapping[str, Any]:
        found: Any = self._root
        for step in str(pointer).removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~"), {}) if isinstance(found, Mapping) else {}
        return found if isinstance(found, Mapping) else {}


def _text(node: Mapping[str, Any]) -> str:
    least = min(node.get("minLength", 0), _MAX_LENGTH)
    most = node.get("maxLength", _MAX_LENGTH)
    if (pattern := node.get("pattern")) is not None:
        try:
            fitting = [text for text in _TRIED if least <= len(text) <= most and re.search(pattern, text)]
        except re.error:
            fitting = []
        if fitting:
            return fitting[0]
    text = _BY_FORMAT.get(str(node.get("format")), "demo")
    return text.ljust(least, "o")[:most]


def _number(node: Mapping[str, Any]) -> float | int:
    """Return the number nearest to 0 that the bounds allow."""
    low, high = node.get("minimum", -(2**53)), node.get("maximum", 2**53)
    if (over := node.get("exclusiveMinimum")) is not None:
        low = max(low, over + 1 if over + 1 <= high else (over + high) / 2)
    if (under := node.get("exclusiveMaximum")) is not None:
        high = min(high, under - 1 if under - 1 >= low else (low + under) / 2)
    value: float | int = min(max(0, low), high)
    if multiple := node.get("multipleOf"):
        value = -(-value // multiple) * multiple
    return value
