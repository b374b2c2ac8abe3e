"""What OpenAI's clients send, and what our models are then asked."""

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from parley.core.errors import BadRequest
from parley.dialect.errors import RequestInvalid
from parley.dialect.requests import MAX_DEPTH, PASSED_ON, UNKNOWN_TO, read, to_model
from parley.dialect.schemas import MAX_MESSAGES, ChatCompletionCreate
from parley.llm.flavours import FLAVOURS
from parley.llm.ports import (
    ImagePart,
    JsonSchema,
    ModelMessage,
    ModelRequest,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)
from parley.llm.registry import Capability, ModelEntry, ModelRegistry
from tests.dialect.conftest import REGISTRY

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    path: Path = tmp_path_factory.mktemp("registry") / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url="http://127.0.0.1:9"))
    return ModelRegistry.load(path, {})


@pytest.fixture(scope="module")
def gpt(registry: ModelRegistry) -> ModelEntry:
    return registry.resolve("gpt")


def asked(entry: ModelEntry, *fallbacks: ModelEntry, **body: Any) -> ModelRequest:
    data = {"model": entry.id, "messages": HELLO, **body}
    return to_model(read(orjson.dumps(data)), entry, fallbacks)


def refusal(entry: ModelEntry, **body: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as caught:
        asked(entry, **body)
    return caught.value


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_whole_conversation_with_tools(gpt: ModelEntry) -> None:
    request = asked(
        gpt,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Oslo and Rome?", "name": "ada"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
                    },
                    {
                        "id": "b",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
                    },
                ],
            },
            {"role": "tool", "tool_call_id": "b", "content": "warm"},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "cold"}]},
            {"role": "assistant", "content": "Cold and warm."},
            {"role": "user", "content": [{"type": "text", "text": "Thanks"}, {"type": "text", "text": "a lot"}]},
        ],
        tools=[WEATHER],
    )

    assert request.messages == (
        ModelMessage("system", (TextPart("Be brief."),)),
        ModelMessage("user", (TextPart("Oslo and Rome?"),)),
        ModelMessage(
            "assistant",
            (ToolCallPart("a", "get_weather", {"city": "Oslo"}), ToolCallPart("b", "get_weather", {"city": "Rome"})),
        ),
        # One round of tools, each with the name of what was called.
        ModelMessage("tool", (ToolResultPart("b", "get_weather", "warm"), ToolResultPart("a", "get_weather", "cold"))),
        ModelMessage("assistant", (TextPart("Cold and warm."),)),
        ModelMessage("user", (TextPart("Thanks"), TextPart("a lot"))),
    )
    assert request.tools == (ToolSpec("get_weather", "The weather of a city.", WEATHER["function"]["parameters"]),)  # type: ignore[index]  # a dict of dicts


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("", {}), ('{"a": [1]}', {"a": [1]}), ("not JSON", {"unreadable": "not JSON"}), ("[1]", {"unreadable": "[1]"})],
)
def test_arguments_that_a_model_wrote_are_never_a_reason_to_refuse(
    gpt: ModelEntry, text: str, arguments: dict[str, Any]
) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": text}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ]

    assert asked(gpt, messages=messages).messages[1].parts == (ToolCallPart("a", "f", arguments),)


def test_an_image_is_what_its_bytes_are(gpt: ModelEntry) -> None:
    url = "data:image/jpeg;base64," + base64.b64encode(PNG).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "text", "text": "What is it?"},
    ]

    (message,) = asked(gpt, messages=[{"role": "user", "content": content}]).messages

    assert message.parts == (ImagePart("image/png", PNG, "low"), TextPart("What is it?"))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://example.com/cat.png", "must be a data: URL"),
        ("file:///etc/passwd", "must be a data: URL"),
        ("data:image/png," + "x", "base64"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("data:image/png;base64," + base64.b64encode(b"<svg onload=alert(1)>").decode(), "PNG, JPEG"),
    ],
)
def test_images_that_are_refused(gpt: ModelEntry, url: str, why: str) -> None:
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]

    refused = refusal(gpt, messages=[{"role": "user", "content": content}])

    assert refused.param == "messages[0].content[1].image_url.url"
    assert why in refused.detail


# -- what bounds and shapes the answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "most"),
    [
        ({}, 1000),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_tokens": 9, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 10**9}, 1000),
        ({"max_tokens": None, "max_completion_tokens": None}, 1000),
    ],
)
def test_there_is_always_a_bound_and_never_above_the_models(gpt: ModelEntry, bounds: dict[str, Any], most: int) -> None:
    assert asked(gpt, **bounds).max_output_tokens == most


def test_what_is_handed_on_and_what_is_not(gpt: ModelEntry) -> None:
    request = asked(
        gpt,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        logit_bias={"50256": -100},
        reasoning_effort="low",
        verbosity="low",
        stop=["END", "\n"],
        user="ada@example.com",
        metadata={"project": "secret"},
        store=True,
        service_tier="flex",
        something_new={"a": 1},
        delay_ms=10**9,
        api_key="sk-other",
        base_url="http://169.254.169.254",
    )

    assert request.temperature == 0.5
    assert request.stop == ("END", "\n")
    assert request.parameters == {
        "top_p": 0.9, "seed": 7, "frequency_penalty": 0.1, "presence_penalty": -0.1, "logit_bias": {"50256": -100},
        "reasoning_effort": "low", "verbosity": "low",
    }  # fmt: skip


def test_a_parameter_that_a_fallback_does_not_know_is_handed_to_nobody(registry: ModelRegistry) -> None:
    safe, other = registry.resolve("safe"), registry.resolve("other")

    assert asked(safe, other, seed=7, top_p=0.5).parameters == {"top_p": 0.5}
    assert asked(other, seed=7, top_p=0.5).parameters == {"top_p": 0.5}


def test_what_the_operator_has_settled_stays(gpt: ModelEntry) -> None:
    settled = replace(gpt, parameters={"top_p": None, "seed": 1})

    assert asked(settled, seed=7, top_p=0.5, verbosity="low").parameters == {"verbosity": "low"}


def test_a_server_that_refuses_unknown_fields_is_sent_none(gpt: ModelEntry) -> None:
    mistral = replace(gpt, base_url="https://api.mistral.ai/v1")

    assert asked(mistral, seed=7, top_p=0.5, verbosity="low").parameters == {"top_p": 0.5}


def test_every_parameter_that_is_handed_on_can_be_sent() -> None:
    assert set().union(*PASSED_ON.values(), *UNKNOWN_TO.values()) <= set(ChatCompletionCreate.model_fields)
    assert set(UNKNOWN_TO) <= set(FLAVOURS)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, None), ("auto", "auto"), ("none", "none"), ("required", "required"),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
    ],
)  # fmt: skip
def test_tool_choice(gpt: ModelEntry, choice: Any, found: str | None) -> None:
    request = asked(gpt, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)

    assert (request.tool_choice, request.parallel_tools) == (found, False)


def test_a_choice_of_no_tools_needs_none(gpt: ModelEntry) -> None:
    assert asked(gpt, tool_choice="auto", parallel_tool_calls=True).tool_choice is None
    assert refusal(gpt, tool_choice="required").param == "tool_choice"
    named = {"type": "function", "function": {"name": "other"}}
    assert refusal(gpt, tools=[WEATHER], tool_choice=named).param == "tool_choice"


def test_a_tool_without_parameters_takes_none(gpt: ModelEntry) -> None:
    (tool,) = asked(gpt, tools=[{"type": "function", "function": {"name": "now"}}]).tools

    assert tool == ToolSpec("now", "", {"type": "object", "properties": {}})


def test_response_formats(gpt: ModelEntry) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}

    assert asked(gpt, response_format=form).response_schema == JsonSchema("answer", schema, strict=True)
    assert asked(gpt, response_format={"type": "text"}).response_schema is None


def test_a_json_object_is_asked_for_in_the_servers_own_word_or_as_a_schema(
    registry: ModelRegistry, gpt: ModelEntry
) -> None:
    form = {"type": "json_object"}
    for entry in (gpt, registry.resolve("goes-on")):  # one of them has no JSON schemas
        request = asked(entry, response_format=form)
        assert (request.response_schema, request.parameters) == (None, {"response_format": form})

    other = replace(registry.resolve("other"), capabilities=(Capability.JSON_SCHEMA,))
    for request in (asked(gpt, other, response_format=form), asked(other, response_format=form)):
        assert request.response_schema == JsonSchema("object", {"type": "object"}, strict=False)
        assert request.parameters == {}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()},
                            }
                        ],
                    }
                ]
            },
            "messages[0].content",
        ),
    ],
)
def test_what_a_model_cannot_do_is_said(registry: ModelRegistry, body: dict[str, Any], param: str) -> None:
    refused = refusal(registry.resolve("plain"), **body)

    assert (refused.param, refused.value_code) == (param, "unsupported_parameter")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"audio": {}}, "audio"),
    ],
)
def test_what_cannot_be_honoured_is_refused(gpt: ModelEntry, body: dict[str, Any], param: str) -> None:
    refused = refusal(gpt, **body)

    assert (refused.param, refused.value_code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "body", [{"n": 1}, {"logprobs": False}, {"modalities": ["text"]}, {"audio": None}, {"n": None}]
)
def test_what_asks_for_nothing_special_is_taken(gpt: ModelEntry, body: dict[str, Any]) -> None:
    assert asked(gpt, **body).messages == (ModelMessage("user", (TextPart("Hello"),)),)


_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "messages"),
        ({"messages": HELLO * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [{"role": "wizard", "content": "?"}]}, "messages[0]"),
        ({"messages": [{"content": "?"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "?"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{**_CALL, "id": 5}]}]}, "messages[0].tool_calls[0].id"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"top_p": 2}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_what_does_not_hold_is_named_as_openai_names_it(gpt: ModelEntry, body: dict[str, Any], param: str) -> None:
    assert refusal(gpt, **body).param == param


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(RequestInvalid) as caught:
        read(b'{"model": "gpt"}')

    assert (caught.value.param, caught.value.value_code) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b'{"model": "gpt", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff",
    ],
)
def test_what_is_no_json_object_is_no_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read(body)


@pytest.mark.parametrize("make", [lambda inner: {"a": inner}, lambda inner: [inner]], ids=["objects", "lists"])
def test_depth_is_bounded(gpt: ModelEntry, make: Callable[[Any], Any]) -> None:
    def nested(levels: int) -> Any:
        value: Any = {}
        for _ in range(levels):
            value = make(value)
        return value

    assert asked(gpt, something_new=nested(MAX_DEPTH - 2)).messages
    with pytest.raises(BadRequest, match="levels deep"):
        asked(gpt, something_new=nested(MAX_DEPTH - 1))
    # What is too deep for the parser is refused there.
    with pytest.raises(BadRequest):
        read(b'{"a":' * 5000 + b"1" + b"}" * 5000)


def test_a_model_of_the_test_can_do_what_the_tests_ask_of_it(gpt: ModelEntry) -> None:
    assert {Capability.TOOLS, Capability.JSON_SCHEMA, Capability.IMAGES} <= set(gpt.capabilities)
