"""What the fake provider reads from a request besides its plan: the form of the answer, the tools, the images.

A request with a JSON schema is answered with an instance of it, one that has to call a tool with such arguments;
`answers=A|B` in any user message says what comes the first time that it is asked, and what later.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from benchmarks.fake_dialects import Dialect, count_words, messages_of
from benchmarks.fake_plan import Plan
from parley.llm.examples import example_of

if TYPE_CHECKING:
    from benchmarks.fake_provider import Record

_IMAGES = {"image_url", "image", "input_image"}


@dataclass(frozen=True, slots=True)
class Served:
    """What a provider has to be paid for: calls that wrote an answer, whole or in part."""

    calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    images: int = 0

    @classmethod
    def of(cls, records: Iterable["Record"]) -> "Served":
        """Add calls up."""
        paid = [record for record in records if record.generated]
        return cls(
            calls=len(paid),
            input_tokens=sum(record.input_tokens for record in paid),
            cached_tokens=sum(record.cached_tokens for record in paid),
            output_tokens=sum(record.output_tokens for record in paid),
            images=sum(record.images for record in paid),
        )


def plan_of(dialect: Dialect, body: dict[str, Any]) -> tuple[str, Plan]:
    """Return the last user message of a request, and how it is to be answered."""
    messages = messages_of(body)
    asked = dialect.last_user_text(messages)
    plan = Plan.read(asked, with_tools=not dialect.ends_with_tool_result(messages))
    plan.given = dialect.given(messages)
    if answers := _answers(dialect, messages):
        plan.say = answers[min(sum(message.get("role") == "assistant" for message in messages), len(answers) - 1)]
    elif (schema := _schema(body)) is not None and not plan.say:
        plan.say = orjson.dumps(example_of(schema)).decode()
    _choose_tools(body, plan, told=dialect.ends_with_tool_result(messages))
    return asked, plan


def count_input(record: "Record") -> None:
    """Count what a call that writes an answer has to read."""
    if record.generated:
        record.input_tokens, record.cached_tokens = count_words(record.body), 1
        record.images = _images_in(record.body)


def _images_in(body: dict[str, Any]) -> int:
    contents = [message.get("content") for message in messages_of(body)]
    return sum(block.get("type") in _IMAGES for blocks in contents if isinstance(blocks, list) for block in blocks)


def _answers(dialect: Dialect, messages: list[dict[str, Any]]) -> list[str]:
    """Return what any of the user messages says of the answers: one for each time that it is asked again."""
    for message in messages:
        said = dialect.last_user_text([message])
        for word in said.split():
            if word.startswith("answers="):
                return word.removeprefix("answers=").split("|")
    return []


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the schema that the answer must have, as each dialect writes it."""
    forms = (
        (body.get("response_format") or {}).get("json_schema"),
        (body.get("text") or {}).get("format"),
        (body.get("output_config") or {}).get("format"),
    )
    return next((form["schema"] for form in forms if form and "schema" in form), None)


def _choose_tools(body: dict[str, Any], plan: Plan, *, told: bool) -> None:
    """Call what the request says has to be called, and no more at once than it allows."""
    choice = body.get("tool_choice") or {}
    kind = choice if isinstance(choice, str) else choice.get("type", "")
    offered = [tool.get("function") or tool for tool in body.get("tools") or ()]
    if kind == "none":
        plan.tools = []
    elif kind in {"required", "any", "tool", "function"} and offered and not plan.tools and not told:
        named = choice.get("name") or (choice.get("function") or {}).get("name") if isinstance(choice, dict) else None
        tool = next((tool for tool in offered if tool["name"] == named), offered[0])
        parameters = tool.get("parameters") or tool.get("input_schema") or {}
        plan.tools = [(tool["name"], orjson.dumps(example_of(parameters) or {}).decode())]
    one_at_a_time = isinstance(choice, dict) and choice.get("disable_parallel_tool_use")
    if body.get("parallel_tool_calls") is False or one_at_a_time:
        del plan.tools[1:]
