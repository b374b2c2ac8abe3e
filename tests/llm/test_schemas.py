from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

from parley.llm.examples import example_of
from parley.llm.ports import JsonSchema
from parley.llm.registry import Capability, ModelEntry
from parley.llm.schemas import ANTHROPIC, OPENAI, Restrictions, strict_schema, takes_schema


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Node(BaseModel):
    value: int = Field(default=1, ge=1, le=10)
    children: list["Node"] = []
    parent: "Node | None" = None


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str = Field(min_length=1, max_length=20, pattern=r"^[a-z]\w+\b$")


class Everything(BaseModel):
    """All that Pydantic writes into a schema."""

    colour: Colour
    mixed: Literal[1, "a", None]
    amount: Decimal
    at: datetime
    id: UUID
    pair: tuple[int, str]
    numbers: Annotated[list[float], Field(min_length=1, max_length=3)]
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    maybe: str | None = None
    described: Cat = Field(default=Cat(), description="A cat that is described.")
    code: str = Field(default="abc", pattern="^[a-c]+$")


def closed(node: Any, restrictions: Restrictions, *, root: bool = True) -> None:
    """Check that a schema is in the strict form."""
    if "$ref" in node:
        assert node.keys() == {"$ref"}
        assert restrictions.recursion
        return
    known = {"description", "type", "enum", "anyOf", "properties", "required", "additionalProperties", "items"}
    assert node.keys() <= known | restrictions.keywords | ({"$defs"} if root else set())
    if node.get("type") == "object":
        assert node["additionalProperties"] is False
        assert set(node["required"]) == node["properties"].keys()
    assert node.keys() & {"type", "anyOf"}
    inner = [*node.get("properties", {}).values(), *node.get("anyOf", []), *node.get("$defs", {}).values()]
    for one in [*inner, *([node["items"]] if "items" in node else [])]:
        closed(one, restrictions, root=False)


def check(model: type[BaseModel], instance: BaseModel) -> None:
    for restrictions in (OPENAI, ANTHROPIC):
        schema = strict_schema(model.model_json_schema(), restrictions)
        if schema is None:
            assert restrictions is ANTHROPIC, "only recursion is missing there"
            continue
        closed(schema, restrictions)
        jsonschema_rs.validate(schema, instance.model_dump(mode="json"))


EVERYTHING = Everything(
    colour=Colour.RED, mixed=None, amount=Decimal("1.5"), at=datetime.fromisoformat("2026-01-01T00:00:00Z"),
    id=UUID(int=0), pair=(1, "a"), numbers=[0.5], pet=Dog(name="rex"),
)  # fmt: skip


def test_all_that_pydantic_writes() -> None:
    check(Everything, EVERYTHING)
    check(Node, Node(value=2, children=[Node(), Node(parent=Node())]))
    written = str(strict_schema(Everything.model_json_schema()))
    assert "A cat that is described." in written
    assert "^[a-c]+$" in written
    dog = strict_schema(Dog.model_json_schema())
    assert dog is not None
    # The grammar knows no words, so the pattern is only told.
    told = r"(minLength: 1, maxLength: 20, pattern: ^[a-z]\w+\b$)"
    assert dog["properties"]["name"] == {"type": "string", "description": told}


def leaves() -> st.SearchStrategy[tuple[Any, Any]]:
    """Types, each with a value."""
    return st.one_of(
        st.tuples(st.just(int), st.integers(-(2**53), 2**53)),
        st.tuples(st.just(str), st.text(st.characters(codec="utf-8"), max_size=5)),
        st.tuples(st.just(bool), st.booleans()),
        st.tuples(st.just(float), st.floats(allow_nan=False, allow_infinity=False)),
        st.tuples(st.just(Colour), st.sampled_from(Colour)),
        st.tuples(st.just(Literal[1, "a"]), st.sampled_from([1, "a"])),
        st.tuples(st.just(Annotated[int, Field(ge=0, lt=10, multiple_of=2)]), st.sampled_from([0, 2, 8])),
        st.tuples(st.just(Annotated[str, Field(min_length=2, max_length=3)]), st.sampled_from(["ab", "abc"])),
    )


def wider(inner: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
    def many(pair: tuple[Any, Any]) -> st.SearchStrategy[tuple[Any, Any]]:
        kind: Any = pair[0]
        value = pair[1]
        return st.sampled_from(
            [
                (list.__class_getitem__(kind), [value, value]),
                (kind | None, value),
                (kind | None, None),
                (tuple.__class_getitem__((kind, int)), (value, 1)),
                (Annotated[kind, Field(description="d")], value),
            ]
        )

    def model(fields: dict[str, tuple[Any, Any]]) -> tuple[Any, Any]:
        made = create_model("Made", **{name: (kind, ...) for name, (kind, _) in fields.items()})  # type: ignore[call-overload]  # its fields are not known
        return made, made(**{name: value for name, (_, value) in fields.items()})

    return inner.flatmap(many) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(model)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(st.recursive(leaves(), wider, max_leaves=6))
def test_a_whole_instance_is_one_of_the_strict_form_too(pair: tuple[Any, Any]) -> None:
    kind, value = pair
    made = create_model("Root", field=(kind, ...))
    check(made, made(field=value))


@given(st.recursive(leaves(), wider, max_leaves=6))
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
def test_the_example_of_a_schema_fits_it(pair: tuple[Any, Any]) -> None:
    kind, _ = pair
    made = create_model("Root", field=(kind, ...), other=(kind, None))
    schema = made.model_json_schema()
    first = example_of(schema)
    made.model_validate(first)
    assert first == example_of(schema)


def test_examples_of_all_that_pydantic_writes() -> None:
    schema = Everything.model_json_schema()
    found = example_of(schema)
    assert found["pet"] == {}, "what has a default is left out, and here that is all of it"
    assert {**found, "pet": None} == {
        "colour": "red", "mixed": 1, "amount": 0, "at": "2000-01-01T00:00:00Z",
        "id": "00000000-0000-4000-8000-000000000000", "pair": [0, "demo"], "numbers": [0], "pet": None,
    }  # fmt: skip
    Node.model_validate(example_of(Node.model_json_schema()))
    strict = strict_schema(Node.model_json_schema())
    assert strict is not None
    jsonschema_rs.validate(strict, example_of(strict))


@pytest.mark.parametrize(
    ("schema", "example"),
    [
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 4}, 3),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0.25),
        ({"type": "integer", "maximum": -2}, -2),
        ({"type": "integer", "minimum": 4, "multipleOf": 3}, 6),
        ({"type": "string", "minLength": 6}, "demooo"),
        ({"type": "string", "maxLength": 2}, "de"),
        ({"type": "string", "pattern": "^[0-9]{4}$"}, "0000"),
        ({"type": "string", "pattern": "(("}, "demo"),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [False, False]),
        ({"type": ["null", "string"]}, None),
        ({"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"const": 5}}}]}, {"a": 5}),
        ({"type": "object", "required": ["a"]}, {"a": None}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, None),
        ({"$ref": "#/nowhere"}, None),
        ({}, None),
    ],
)
def test_examples(schema: dict[str, Any], example: Any) -> None:
    assert example_of(schema) == example


class Free(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


@pytest.mark.parametrize(
    "schema",
    [
        TypeAdapter(dict[str, int]).json_schema(),
        TypeAdapter(list[int]).json_schema(),
        Free.model_json_schema(),
        {"type": "object"},
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": {"type": "array"}}},
        {"type": "object", "properties": {"a": {"type": "invented"}}},
        {"type": "object", "properties": {"a": {"enum": [{}]}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.com/"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"a": 5}},
        {"type": "object", "properties": {"a": {"anyOf": 5}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": 5}}},
        {"type": "object", "properties": {}, "patternProperties": {"^a": {"type": "string"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"anyOf": [{"type": "object", "properties": {}}]},
        {"allOf": [{"type": "object", "properties": {}}, {"type": "object", "properties": {}}]},
    ],
)
def test_what_has_no_strict_form(schema: dict[str, Any]) -> None:
    assert strict_schema(schema) is None


def test_what_holds_itself_has_none_without_recursion() -> None:
    assert strict_schema(Node.model_json_schema(), ANTHROPIC) is None


def test_a_schema_that_would_grow_without_end_has_none() -> None:
    levels: dict[str, Any] = {"d0": {"type": "string"}}
    for level in range(1, 40):
        pair = {name: {"$ref": f"#/$defs/d{level - 1}"} for name in "ab"}
        levels[f"d{level}"] = {"type": "object", "properties": pair}
    assert strict_schema({"$ref": "#/$defs/d39", "$defs": levels}) is None


def test_the_schema_is_left_as_it_was() -> None:
    schema = Everything.model_json_schema()
    strict_schema(schema)
    assert schema == Everything.model_json_schema()


@pytest.mark.parametrize(
    ("kind", "capable", "flavour", "schema", "takes"),
    [
        ("openai", True, None, Node, True),
        ("openai", False, None, Node, False),
        ("openai", True, "deepseek", Node, False),
        ("anthropic", True, None, Everything, True),
        ("anthropic", True, None, Node, False),
        ("openai_responses", True, None, Node, True),
        ("demo", True, None, Node, True),
        ("demo", False, None, Node, False),
    ],
)
def test_which_model_takes_which_schema(
    kind: Any, capable: bool, flavour: str | None, schema: type[BaseModel], takes: bool
) -> None:
    capabilities = (Capability.JSON_SCHEMA,) if capable else ()
    entry = ModelEntry(id="m", provider="p", kind=kind, name="n", flavour=flavour, capabilities=capabilities)
    assert takes_schema(entry, JsonSchema("S", schema.model_json_schema())) is takes
