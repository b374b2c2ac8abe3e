import time

import orjson
import pytest

from parley.llm.adapters.demo import MAX_REPEATS, DemoModel
from parley.llm.ports import (
    Finish,
    FinishReason,
    ImagePart,
    JsonSchema,
    ModelMessage,
    ModelRequest,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    UsageChunk,
)
from parley.llm.registry import Capability, ModelEntry
from tests.llm.calls import asking, collect, text_of

TOOLS = tuple(ToolSpec(name, "", {"type": "object"}) for name in ("add_task", "list_tasks", "complete_task"))


@pytest.fixture
def model() -> DemoModel:
    return DemoModel(
        ModelEntry(
            id="demo",
            provider="demo",
            kind="demo",
            name="demo",
            max_output_tokens=MAX_REPEATS,
            parameters={"delay_ms": "0"},
            capabilities=tuple(Capability),
        )
    )


async def test_it_says_that_no_provider_is_configured(model: DemoModel) -> None:
    chunks = await collect(model.stream(asking("hello  there")))
    assert text_of(chunks) == "I am Parley's demo model: no provider is configured. You said: hello there"
    assert sum(isinstance(chunk, TextChunk) for chunk in chunks) == 13
    assert chunks[-2:] == [UsageChunk(input_tokens=2, output_tokens=13), Finish(FinishReason.STOP)]
    assert await collect(model.stream(asking("hello  there"))) == chunks


async def test_a_long_message_is_not_said_again_in_full(model: DemoModel) -> None:
    text = text_of(await collect(model.stream(asking("word " * 6000))))
    assert text.endswith("…")
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("add task buy milk", "add_task", {"title": "buy milk"}),
        ("Add a task: buy milk ", "add_task", {"title": "buy milk"}),
        ("list tasks", "list_tasks", {}),
        ("List my tasks!", "list_tasks", {}),
        ("complete task buy milk", "complete_task", {"task": "buy milk"}),
    ],
)
async def test_it_calls_the_tool_that_the_user_asks_for(
    model: DemoModel, text: str, name: str, arguments: dict[str, str]
) -> None:
    chunks = await collect(model.stream(asking(text, tools=TOOLS)))
    call = chunks[0]
    assert isinstance(call, ToolCallChunk)
    assert (call.name, call.arguments, orjson.loads(call.raw)) == (name, arguments, arguments)
    assert chunks[-1] == Finish(FinishReason.TOOL_CALLS)
    # Without that tool on offer it only talks.
    assert "no provider" in text_of(await collect(model.stream(asking(text))))


@pytest.mark.parametrize("text", ["please add task", "add taskforce", "what tasks?"])
async def test_other_words_call_no_tool(model: DemoModel, text: str) -> None:
    assert not any(isinstance(chunk, ToolCallChunk) for chunk in await collect(model.stream(asking(text, tools=TOOLS))))


@pytest.mark.parametrize(
    ("name", "arguments", "content", "failed", "sentence"),
    [
        (
            "add_task",
            {"title": "buy milk"},
            '{"id": "1", "title": "Buy milk"}',
            False,
            'Done: added the task "Buy milk".',
        ),
        ("add_task", {"title": "buy milk"}, '{"task": {"title": "x"}}', False, 'Done: added the task "x".'),
        ("add_task", {"title": "buy milk"}, "ok", False, 'Done: added the task "buy milk".'),
        (
            "add_task",
            {"title": ""},
            '{"error": "invalid", "message": "no title"}',
            False,
            "That did not work: no title",
        ),
        ("add_task", {"title": ""}, "no title", True, "That did not work: no title"),
        ("complete_task", {"task": "milk"}, '{"title": "Buy milk"}', False, 'Done: completed the task "Buy milk".'),
        ("list_tasks", {}, '{"tasks": []}', False, "You have no tasks."),
        ("list_tasks", {}, '[{"title": "a"}]', False, "You have 1 task: a."),
        (
            "list_tasks",
            {},
            '{"tasks": [{"title": "a"}, {"title": "b", "completed": true}], "total": 2}',
            False,
            "You have 2 tasks: a; b (done).",
        ),
        ("other", {}, "42", False, "The tool other answered: 42"),
    ],
)
async def test_it_tells_what_a_tool_did(
    *, model: DemoModel, name: str, arguments: dict[str, str], content: str, failed: bool, sentence: str
) -> None:
    request = ModelRequest(
        (
            ModelMessage("user", (TextPart("add task buy milk"),)),
            ModelMessage("assistant", (ToolCallPart("c1", name, arguments),)),
            ModelMessage("tool", (ToolResultPart("c1", name, content, failed=failed),)),
        ),
        tools=TOOLS,
    )
    chunks = await collect(model.stream(request))
    assert text_of(chunks) == sentence
    assert chunks[-1] == Finish(FinishReason.STOP)


async def test_call_ids_differ_within_a_conversation(model: DemoModel) -> None:
    first = ModelMessage("user", (TextPart("list tasks"),))
    made = ModelMessage("assistant", (ToolCallPart("demo_1", "list_tasks", {}),))
    told = ModelMessage("tool", (ToolResultPart("demo_1", "list_tasks", "[]"),))
    chunks = await collect(model.stream(ModelRequest((first, made, told, first), tools=TOOLS)))
    assert isinstance(chunks[0], ToolCallChunk)
    assert chunks[0].call_id == "demo_2"


async def test_repeat_streams_numbered_words(model: DemoModel) -> None:
    chunks = await collect(model.stream(asking("repeat 3 tick")))
    assert [chunk.text for chunk in chunks if isinstance(chunk, TextChunk)] == ["tick1", " tick2", " tick3"]
    many = await collect(model.stream(asking("repeat 999999 x", max_output_tokens=10_000)))
    assert sum(isinstance(chunk, TextChunk) for chunk in many) == MAX_REPEATS


async def test_the_bound_ends_an_answer(model: DemoModel) -> None:
    chunks = await collect(model.stream(asking("repeat 30 tick", max_output_tokens=5)))
    assert text_of(chunks) == "tick1 tick2 tick3 tick4 tick5"
    assert chunks[-1] == Finish(FinishReason.LENGTH)


@pytest.mark.parametrize("text", ["repeat 30 tick", "hello  there", "", "repeat 1 x"])
async def test_given_any_beginning_of_its_answer_it_says_exactly_the_rest(model: DemoModel, text: str) -> None:
    whole = text_of(await collect(model.stream(asking(text, max_output_tokens=20))))
    for at in range(1, len(whole) + 1):
        chunks = await collect(model.stream(asking(text, max_output_tokens=20, prefill=whole[:at])))
        assert whole[:at] + text_of(chunks) == whole
        assert all(chunk.text for chunk in chunks if isinstance(chunk, TextChunk))
        assert chunks[-1] == Finish(FinishReason.LENGTH if "30" in text else FinishReason.STOP)
        assert chunks[-2] == UsageChunk(len(text.split()), 0, sum(isinstance(chunk, TextChunk) for chunk in chunks))


@pytest.mark.parametrize("prefill", ["Something else", "tick1x", "tick1 tick2 tick3 and on"])
async def test_given_another_beginning_it_begins_anew(model: DemoModel, prefill: str) -> None:
    assert text_of(await collect(model.stream(asking("repeat 3 tick", prefill=prefill)))) == "tick1 tick2 tick3"


async def test_who_has_begun_to_talk_calls_no_tool(model: DemoModel) -> None:
    chunks = await collect(model.stream(asking("list tasks", tools=TOOLS, prefill="I am Parley's demo")))
    assert text_of(chunks).startswith(" model: no provider")


async def test_the_pause_between_words(model: DemoModel) -> None:
    began_at = time.monotonic()
    await collect(model.stream(asking("repeat 6 x", parameters={"delay_ms": 10})))
    assert 0.05 <= time.monotonic() - began_at < 5


async def test_it_says_that_it_cannot_look_at_images(model: DemoModel) -> None:
    one, two = ImagePart("image/png", b"12345"), ImagePart("image/jpeg", b"1")
    request = ModelRequest((ModelMessage("user", (TextPart("look"), one)),))
    assert text_of(await collect(model.stream(request))).endswith(
        "You said: look I cannot look at this image: image/png of 5 bytes."
    )
    request = ModelRequest((ModelMessage("user", (one, two)),))
    assert text_of(await collect(model.stream(request))).endswith(
        "I cannot look at these images: image/png of 5 bytes, image/jpeg of 1 bytes."
    )


async def test_asked_for_json_it_makes_the_least_that_fits(model: DemoModel) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 2}}, "required": ["n"]}
    request = asking("add task x", tools=TOOLS[1:], response_schema=JsonSchema("T", schema))
    chunks = await collect(model.stream(request))
    assert (text_of(chunks), chunks[-1]) == ('{"n":2}', Finish(FinishReason.STOP))
    assert await collect(model.stream(request)) == chunks


async def test_it_calls_what_it_has_to_and_nothing_that_it_must_not(model: DemoModel) -> None:
    schema = {"type": "object", "properties": {"at": {"type": "string", "format": "date"}}, "required": ["at"]}
    tools = (*TOOLS, ToolSpec("plan", "", schema))
    named, *_ = await collect(model.stream(asking("hello", tools=tools, tool_choice="plan")))
    assert named == ToolCallChunk("demo_1", "plan", {"at": "2000-01-01"}, '{"at":"2000-01-01"}')
    first, *_ = await collect(model.stream(asking("hello", tools=tools, tool_choice="required")))
    assert isinstance(first, ToolCallChunk)
    assert first.name == "add_task"
    chunks = await collect(model.stream(asking("list tasks", tools=tools, tool_choice="none")))
    assert chunks[-1] == Finish(FinishReason.STOP)


async def test_it_ends_at_a_stop_text(model: DemoModel) -> None:
    chunks = await collect(model.stream(asking("hello", stop=(" no provider",))))
    assert text_of(chunks) == "I am Parley's demo model:"
    assert chunks[-1] == Finish(FinishReason.STOP)
