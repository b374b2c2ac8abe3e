import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from parley.usage.structured_text import Problems, read_instance


class Mark(BaseModel):
    points: int
    why: str = ""


@pytest.mark.parametrize(
    "text",
    [
        '{"points": 3}',
        ' \n{"points": 3}\n',
        '\ufeff{"points": 3}',
        '```json\n{"points": 3}\n```',
        'Here it is:\n```\n{"points": 3}\n```\nI hope that it helps.',
        'Sure! {"points": 3} is what I would give.',
        'First {not json} then {"other": 1}, and then {"points": 3}.',
        '```json\n{"points": "x"}\n```\nno, rather\n```json\n{"points": 3}\n```',
        '{"points": "3"}',
    ],
)
def test_an_object_is_found(text: str) -> None:
    assert read_instance(text, Mark) == Mark(points=3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "There is no JSON object in it."),
        ("I cannot do that.", "There is no JSON object in it."),
        ('{"points": 3', "Invalid JSON: EOF while parsing an object"),
        ("{}", "points: Field required"),
        ('{"points": "many"}', "points: Input should be a valid integer"),
        ("[1]", "Input should be an object"),
        ('say {"points": null} or so {', "points: Input should be a valid integer"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    found = read_instance(text, Mark)
    assert isinstance(found, Problems)
    assert problem in found.lines[0]


def test_text_that_cannot_be_stored_is_cleaned() -> None:
    found = read_instance('{"points": 3, "why": "a\\u0000b\\ud83d c\\ud83d\\ude00"}', Mark)
    assert found == Mark(points=3, why="ab\ufffd c😀")


@pytest.mark.parametrize(
    "text", ["{" * 300_000, '{"a":' * 100_000, "[" * 300_000, "```json\n" * 50_000, "{}" * 100_000]
)
def test_hostile_text_ends_soon(text: str) -> None:
    began_at = time.monotonic()
    assert isinstance(read_instance(text, Mark), Problems)
    assert time.monotonic() - began_at < 10


def test_problems_are_few_and_short() -> None:
    class Many(BaseModel):
        model_config = {"extra": "forbid"}

    found = read_instance("{" + ",".join(f'"{"k" * 500}{n}": 1' for n in range(100)) + "}", Many)
    assert isinstance(found, Problems)
    assert len(found.lines) == 20
    assert max(map(len, found.lines)) <= 300


@settings(deadline=None)
@given(st.text(max_size=50), st.integers(-(2**40), 2**40), st.text(max_size=20))
def test_whatever_stands_around_it(before: str, points: int, why: str) -> None:
    text = f"{before.replace('{', '').replace('`', '')}\n{Mark(points=points, why=why).model_dump_json()}"
    found = read_instance(text, Mark)
    assert isinstance(found, Mark)
    assert found.points == points


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_an_instance_or_problems(text: str) -> None:
    assert isinstance(read_instance(text, Mark), Mark | Problems)
