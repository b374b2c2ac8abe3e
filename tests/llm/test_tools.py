"""Tools made of typed functions, and the bounds of what goes in and comes out."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import orjson
import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parley.core.schemas import RequestModel
from parley.llm.errors import ToolInvalid
from parley.llm.tool_values import (
    ARGUMENT_CHARACTERS,
    ARGUMENT_DEPTH,
    ARGUMENT_VALUES,
    RESULT_CHARACTERS,
    bounded_result,
    fingerprint,
    refusal_of,
)
from parley.llm.tools import NOT_FOR_MODELS, Tool, ToolArguments, ToolContext, checked, tool


class Line(RequestModel):
    """A line of an order."""

    article: str
    count: Annotated[int, Field(ge=1)] = 1


async def place_order(
    context: ToolContext,
    *,
    lines: Annotated[list[Line], Field(description="What is wanted", max_length=3)],
    note: Annotated[str | None, Field(description="For the shop")] = None,
) -> dict[str, Any]:
    """Order something."""
    return {"lines": [line.model_dump() for line in lines], "note": note, "context": context is not None}


def a_tool(**fields: Any) -> Tool:
    """Return a tool that differs from a good one in some fields."""
    good = tool(permission="shop:write", side_effects=True)(place_order)
    return Tool(**{**{name: getattr(good, name) for name in good.__dataclass_fields__}, **fields})


async def test_a_typed_function_is_a_tool() -> None:
    made = tool(permission="shop:write", side_effects=True)(place_order)
    assert (made.name, made.description, made.permission) == ("place_order", "Order something.", "shop:write")
    assert (made.side_effects, made.idempotent) == (True, False)
    schema = made.spec.parameters
    assert (schema["type"], schema["required"], schema["additionalProperties"]) == ("object", ["lines"], False)
    assert schema["properties"]["note"]["description"] == "For the shop"
    assert schema["properties"]["lines"]["maxItems"] == 3
    assert schema["$defs"]["Line"]["properties"]["count"]["minimum"] == 1
    context = ToolContext(None, None, None)  # type: ignore[arg-type]  # nothing of it is used
    arguments = made.arguments.model_validate({"lines": [{"article": "tea", "count": 2}]})
    assert await made.run(context, arguments) == {
        "lines": [{"article": "tea", "count": 2}], "note": None, "context": True,
    }  # fmt: skip
    for wrong in ({}, {"lines": [{"article": "tea", "count": 0}]}, {"lines": [], "more": 1}, {"lines": [{"x": 1}]}):
        with pytest.raises(ValidationError):
            made.arguments.model_validate(wrong)
    assert checked([made]) == {"place_order": made}


def test_a_function_that_says_too_little_is_none() -> None:
    async def without_context(*, title: str) -> dict[str, Any]:
        return {"title": title}

    async def untyped(context: ToolContext, *, title) -> dict[str, Any]:  # type: ignore[no-untyped-def]  # the point
        return {"title": title, "context": context}

    async def by_position(context: ToolContext, title: str) -> dict[str, Any]:
        return {"title": title, "context": context}

    for function in (without_context, untyped, by_position):
        with pytest.raises(ToolInvalid, match=function.__name__):
            tool(permission="x", side_effects=False)(function)


class Loose(BaseModel):
    """Takes anything besides."""

    title: str


class Node(ToolArguments):
    """Contains itself."""

    children: "list[Node]" = Field(default_factory=list)


class Named(ToolArguments):
    """Takes something that no model chooses, further in."""

    class Inner(RequestModel):
        """Further in."""

        workspace_id: str

    inner: list[Inner]


class Verbose(ToolArguments):
    """Has more to say than a request holds."""

    model_config = ConfigDict(extra="forbid")
    title: Annotated[str, Field(description="word " * 2_000)]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"name": "Add-Task"}, "is named like"),
        ({"name": "a" * 65}, "is named like"),
        ({"name": ""}, "is named like"),
        ({"description": ""}, "description"),
        ({"description": "x" * 1_025}, "description"),
        ({"arguments": Loose}, "refuse fields"),
        ({"arguments": Node}, "contain themselves"),
        ({"arguments": Named}, "must not choose workspace_id"),
        ({"arguments": Verbose}, "longer than"),
    ],
)
def test_what_no_model_could_work_with_stops_the_start(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ToolInvalid, match=fault):
        checked([a_tool(**fields)])


def test_two_tools_of_one_name_stop_the_start() -> None:
    with pytest.raises(ToolInvalid, match="two tools"):
        checked([a_tool(), a_tool()])


@pytest.mark.parametrize("name", sorted(NOT_FOR_MODELS))
def test_whose_data_it_is_about_is_no_argument(name: str) -> None:
    schema = {name: (str, ...)}
    from pydantic import create_model

    model = create_model("Arguments", __base__=ToolArguments, **schema)  # type: ignore[call-overload]  # names as data
    with pytest.raises(ToolInvalid, match=f"must not choose {name}"):
        checked([a_tool(arguments=model)])


# -- arguments ---------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    """Return an object so many levels deep."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"title": "Buy milk", "tags": ["a", "b"], "n": None}, None),
        ({}, None),
        (nested(ARGUMENT_DEPTH), None),
        (nested(ARGUMENT_DEPTH + 1), "deeply"),
        (nested(100_000), "deeply"),
        ({"x": [1] * (ARGUMENT_VALUES * 3)}, "too many"),
        ({str(n): n for n in range(ARGUMENT_VALUES * 3)}, "too many"),
        ({"x": "y" * ARGUMENT_CHARACTERS}, "too long"),
        ({"y" * (ARGUMENT_CHARACTERS + 1): 1}, "too long"),
        ({"x": "a\0b"}, "NUL"),
        ({"x": {"\ud800": 1}}, "surrogates"),
        (None, "not a JSON object"),
    ],
)
def test_arguments_are_bounded_before_anyone_stores_them(arguments: dict[str, Any] | None, word: str | None) -> None:
    refusal = refusal_of(arguments, "")
    if word is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert word in refusal
        assert len(refusal) < 200


def test_what_was_sent_is_bounded_too() -> None:
    assert "too long" in (refusal_of({}, "{" + " " * ARGUMENT_CHARACTERS + "}") or "")


def test_the_fingerprint_is_of_what_they_say_and_not_of_how() -> None:
    one = orjson.loads('{"a": [1, {"c": "ü", "b": null}], "z": 1.5}')
    other = orjson.loads('{"z":1.5,"a":[1,{"b":null,"c":"\\u00fc"}]}')
    assert fingerprint(one) == fingerprint(other)
    assert len({fingerprint(one), fingerprint({**one, "z": 2}), fingerprint({}), fingerprint({"a": one["a"]})}) == 4


# -- results -----------------------------------------------------------------------------------------------------------


class Counted(Sequence[int]):
    """Counts how much of it was looked at."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        self.seen += 1
        return index

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self.length))


def test_a_result_comes_out_as_json() -> None:
    from datetime import UTC, datetime
    from decimal import Decimal
    from uuid import UUID

    given = {
        "a": [1, 2.5, None, True, "ü\n\""], 3: (UUID(int=1), Decimal("1.10")), "at": datetime(2026, 1, 1, tzinfo=UTC),
        "inf": float("inf"), "big": 2**70, "nul": "a\0b", "half": "\ud800",
    }  # fmt: skip
    told = bounded_result(given)  # type: ignore[arg-type]  # keys that are no text too
    assert told == {
        "a": [1, 2.5, None, True, "ü\n\""], "3": [str(UUID(int=1)), "1.10"], "at": "2026-01-01 00:00:00+00:00",
        "inf": None, "big": str(2**70), "nul": "a\ufffdb", "half": "\ufffd",
    }  # fmt: skip


@pytest.mark.parametrize("length", [100_000_000, RESULT_CHARACTERS])
def test_a_result_is_bounded_while_it_is_written(length: int) -> None:
    rows = Counted(length)
    told = bounded_result({"rows": rows})
    assert "longer than" in told["error"]
    assert told["beginning"].startswith('{"rows":[0,1,2')
    assert len(orjson.dumps(told)) < RESULT_CHARACTERS
    assert rows.seen <= RESULT_CHARACTERS


def test_one_long_text_is_bounded_too() -> None:
    told = bounded_result({"text": "x" * 50_000_000})
    assert len(orjson.dumps(told)) < RESULT_CHARACTERS
    assert bounded_result({"text": "x" * (RESULT_CHARACTERS - 100)})["text"]


def test_a_result_without_an_end_is_an_error() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(ValueError, match="nested"):
        bounded_result(endless)
