"""What every adapter asks: images, schemas, choices of tools, stop texts, and what a model wants back."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest

from parley.llm.factory import build_model
from parley.llm.ports import (
    CursorChunk,
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
)
from parley.llm.registry import Capability
from tests.llm.adapters.raw_server import RawServer
from tests.llm.adapters.table import SUBJECTS, Subject
from tests.llm.calls import asking, collect, text_of

PNG = ImagePart("image/png", b"\x89PNG", detail="low")
URL = "data:image/png;base64,iVBORw=="
TOOLS = (ToolSpec("add", "Adds.", {"type": "object", "properties": {}}), ToolSpec("list", "Lists.", {"type": "object"}))
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "tag": {"type": "string", "default": "x"}},
    "required": ["n"],
}
FREE = {"type": "object", "additionalProperties": {"type": "integer"}}
STRICT = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "tag": {"type": "string"}},
    "required": ["n", "tag"],
    "additionalProperties": False,
}

Ask = Callable[..., Any]


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with RawServer() as server:
        yield server


@pytest.fixture
def ask(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> Ask:
    """Return a function that makes a request and returns its body."""

    async def ask(request: ModelRequest, **fields: Any) -> Any:
        voice = subject.voice()
        server.answer([*voice.opening(), *voice.text("a"), *voice.ending("stop")])
        await collect(build_model(subject.entry(server.url, **fields), http).stream(request))
        return server.asked[-1].body

    return ask


def user(*parts: TextPart | ImagePart) -> ModelRequest:
    return ModelRequest((ModelMessage("user", parts),))


async def test_images(subject: Subject, ask: Ask) -> None:
    body = await ask(user(TextPart("What is this?"), PNG))
    detail = {} if subject.flavour in {"ollama", "lmstudio"} else {"detail": "low"}
    expected: dict[str, Any] = {
        "openai": (
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": URL, **detail}},
        ),
        "anthropic": (
            {"type": "text", "text": "What is this?"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}},
        ),
        "openai_responses": (
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": URL, "detail": "low"},
        ),
    }
    messages = body["input"] if subject.kind == "openai_responses" else body["messages"]
    assert messages == [{"role": "user", "content": list(expected[subject.kind])}]


async def test_an_image_without_words(ask: Ask) -> None:
    body = await ask(user(PNG, PNG))
    (message,) = body.get("messages") or body["input"]
    assert len(message["content"]) == 2
    assert orjson.dumps(body).count(b"iVBORw==") == 2


async def test_a_json_schema(subject: Subject, ask: Ask) -> None:
    body = await ask(asking("x", response_schema=JsonSchema("Thing", SCHEMA)))
    match subject.kind:
        case "anthropic":
            schema = body["output_config"]["format"]["schema"]
            # It knows no bounds of numbers.
            assert schema["properties"]["n"] == {"type": "integer", "description": "(minimum: 1)"}
            assert (schema["required"], schema["additionalProperties"]) == (["n", "tag"], False)
        case "openai_responses":
            assert body["text"] == {
                "format": {"type": "json_schema", "name": "Thing", "schema": STRICT, "strict": True}
            }
        case _ if subject.flavour == "deepseek":
            assert body["response_format"] == {"type": "json_object"}
        case _ if subject.flavour in {"openai", "azure", "mistral", "openrouter", "xai"}:
            form = {"name": "Thing", "schema": STRICT, "strict": True}
            assert body["response_format"] == {"type": "json_schema", "json_schema": form}
        case _:
            form = {"name": "Thing", "schema": SCHEMA}
            assert body["response_format"] == {"type": "json_schema", "json_schema": form}


async def test_a_schema_that_has_no_strict_form_is_sent_as_it_is(subject: Subject, ask: Ask) -> None:
    body = await ask(asking("x", response_schema=JsonSchema("Thing", FREE)))
    if subject.flavour != "deepseek":
        assert orjson.dumps(FREE) in orjson.dumps(body)
    assert b'"strict":true' not in orjson.dumps(body)


async def test_a_model_that_knows_no_schemas_is_given_none(ask: Ask) -> None:
    body = await ask(asking("x", response_schema=JsonSchema("Thing", SCHEMA)), capabilities=(Capability.TOOLS,))
    assert not {"response_format", "text", "output_config"} & body.keys()


CHOICES: dict[str | None, dict[str, Any]] = {
    None: {},
    "auto": {"openai": "auto", "openai_responses": "auto", "anthropic": {"type": "auto"}},
    "none": {"openai": "none", "openai_responses": "none", "anthropic": {"type": "none"}},
    "required": {"openai": "required", "openai_responses": "required", "anthropic": {"type": "any"}},
    "list": {
        "openai": {"type": "function", "function": {"name": "list"}},
        "openai_responses": {"type": "function", "name": "list"},
        "anthropic": {"type": "tool", "name": "list"},
    },
}


@pytest.mark.parametrize("choice", CHOICES)
async def test_the_choice_of_tools(subject: Subject, ask: Ask, choice: str | None) -> None:
    body = await ask(asking("x", tools=TOOLS, tool_choice=choice))
    assert body.get("tool_choice") == CHOICES[choice].get(subject.kind)
    # Without tools the fields are refused.
    assert (
        not {"tools", "tool_choice", "parallel_tool_calls"}
        & (await ask(asking("x", tool_choice=choice, parallel_tools=False))).keys()
    )


@pytest.mark.parametrize("parallel", [None, True, False])
async def test_calls_at_once(subject: Subject, ask: Ask, parallel: bool | None) -> None:
    body = await ask(asking("x", tools=TOOLS, parallel_tools=parallel))
    if subject.kind == "anthropic":
        told = None if parallel is None else {"type": "auto", "disable_parallel_tool_use": not parallel}
        assert body.get("tool_choice") == told
    elif subject.flavour in {"ollama", "lmstudio", "gemini", "deepseek", "generic"}:
        assert "parallel_tool_calls" not in body, "it does not know the field"
    else:
        assert body.get("parallel_tool_calls") == parallel


async def test_stop_texts(subject: Subject, ask: Ask, server: RawServer, http: httpx.AsyncClient) -> None:
    body = await ask(asking("x", stop=("END", "\n\n")))
    match subject.kind:
        case "openai":
            assert body["stop"] == ["END", "\n\n"]
        case "anthropic":
            assert body["stop_sequences"] == ["END"], "blank ones are refused"
        case _:
            assert "stop" not in body
            voice = subject.voice()
            events = [*voice.opening(), *(event for text in ("say E", "N", "D more") for event in voice.text(text))]
            server.answer(events, ends=False)
            chunks = await collect(build_model(subject.entry(server.url), http).stream(asking("x", stop=("END",))))
            assert text_of(chunks) == "say "
            assert chunks[-1] == Finish(FinishReason.STOP)
            assert not any(isinstance(chunk, CursorChunk) for chunk in chunks[2:])


async def test_headers_of_the_entry_go_along_and_its_key_comes_last(
    subject: Subject, ask: Ask, server: RawServer
) -> None:
    await ask(asking("x"), headers={"x-title": "Parley"})
    headers = server.asked[-1].headers
    assert headers["x-title"] == "Parley"
    name, value = ("x-api-key", "test-key") if subject.kind == "anthropic" else ("authorization", "Bearer test-key")
    assert headers[name] == value


async def test_usage_is_asked_for_where_the_field_is_known(subject: Subject, ask: Ask) -> None:
    body = await ask(asking("x"))
    asks = subject.kind == "openai" and subject.flavour != "mistral"
    assert body.get("stream_options") == ({"include_usage": True} if asks else None)


async def test_the_bound_of_the_answer(subject: Subject, ask: Ask) -> None:
    body = await ask(asking("x", max_output_tokens=7))
    name = {"openai_responses": "max_output_tokens"}.get(subject.kind, "max_tokens")
    if subject.flavour in {"openai", "azure"}:
        name = "max_completion_tokens"
    assert {key: value for key, value in body.items() if key.startswith("max_")} == {name: 7}


async def test_without_the_background_nothing_is_kept(subject: Subject, ask: Ask) -> None:
    body = await ask(asking("x"))
    kept = {key: body[key] for key in ("background", "store") if key in body}
    if subject.kind != "openai_responses":
        assert kept == {}
    elif subject.fields.get("background", True):
        assert kept == {"background": True, "store": True}
    else:
        assert kept == {"store": False}


async def test_no_places_without_the_background(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> None:
    voice = subject.voice()
    server.answer([*voice.opening(), *voice.text("a"), *voice.text("b"), *voice.ending("stop")])
    chunks = await collect(build_model(subject.entry(server.url), http).stream(asking("x")))
    places = any(isinstance(chunk, CursorChunk) for chunk in chunks)
    assert places == (subject.kind == "openai_responses" and subject.fields.get("background", True))


async def test_leaving_an_answer_that_is_not_in_the_background_only_closes(
    server: RawServer, http: httpx.AsyncClient
) -> None:
    subject = SUBJECTS["responses not in the background"]
    voice = subject.voice()
    server.answer([*voice.opening(), *voice.text("a")], ends=False)
    stream = build_model(subject.entry(server.url), http).stream(asking("x"))
    async for chunk in stream:
        assert chunk == TextChunk("a")
        break
    await stream.aclose()
    assert [asked.path for asked in server.asked] == ["/responses"]


# --- what goes back with a call


def again(call: ToolCallChunk) -> ModelRequest:
    """Return the next step of a loop with a tool."""
    part = ToolCallPart(call.call_id, call.name, call.arguments or {}, call.state)
    return ModelRequest(
        (
            ModelMessage("user", (TextPart("x"),)),
            ModelMessage("assistant", (TextPart("Looking."), part)),
            ModelMessage("tool", (ToolResultPart(call.call_id, call.name, "[]"),)),
        ),
        tools=TOOLS,
    )


def data(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def called(subject: Subject, server: RawServer, http: httpx.AsyncClient, events: list[bytes]) -> ToolCallChunk:
    server.answer(events)
    chunks = await collect(build_model(subject.entry(server.url), http).stream(asking("x", tools=TOOLS)))
    return next(chunk for chunk in chunks if isinstance(chunk, ToolCallChunk))


async def test_signed_reasoning_goes_back_before_all_else(
    server: RawServer,
    http: httpx.AsyncClient,
) -> None:
    subject = SUBJECTS["anthropic"]
    voice = subject.voice()
    redacted = {"type": "redacted_thinking", "data": "opaque"}
    hidden = [
        {"type": "content_block_start", "index": 9, "content_block": redacted},
        {"type": "content_block_stop", "index": 9},
    ]
    events = [*voice.opening(), *voice.reasoning(["why ", "not"]), *map(data, hidden), *voice.text("Looking.")]
    events += [*voice.calls([("c1", "list", ["{}"])]), *voice.ending("tool_calls")]
    call = await called(subject, server, http, events)
    parameters = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    await collect(build_model(subject.entry(server.url, parameters=parameters), http).stream(again(call)))
    assert server.asked[-1].body["thinking"] == parameters["thinking"]
    assert server.asked[-1].body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "why not", "signature": "c2ln"},
        redacted,
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "c1", "name": "list", "input": {}},
    ]
    # Another model can make nothing of it, and thinking is refused where it is missing.
    other = subject.entry(server.url, parameters=parameters, name="another-model")
    await collect(build_model(other, http).stream(again(call)))
    body = server.asked[-1].body
    assert "thinking" not in body
    assert [block["type"] for block in body["messages"][1]["content"]] == ["text", "tool_use"]


async def test_thought_signatures_of_gemini_go_back_with_their_call(server: RawServer, http: httpx.AsyncClient) -> None:
    subject = SUBJECTS["gemini"]
    extra = {"google": {"thought_signature": "c2ln"}}
    call = {"id": "c1", "type": "function", "function": {"name": "list", "arguments": "{}"}, "extra_content": extra}
    found = await called(
        subject,
        server,
        http,
        [
            data({"choices": [{"delta": {"role": "assistant", "tool_calls": [call]}}]}),
            *subject.voice().ending("tool_calls"),
        ],
    )
    await collect(build_model(subject.entry(server.url), http).stream(again(found)))
    assert server.asked[-1].body["messages"][1]["tool_calls"] == [call]


async def test_reasoning_of_deepseek_goes_back_with_its_calls(server: RawServer, http: httpx.AsyncClient) -> None:
    subject = SUBJECTS["deepseek"]
    voice = subject.voice()
    events = [*voice.reasoning(["why ", "not"]), *voice.calls([("c1", "list", ["{}"])]), *voice.ending("tool_calls")]
    call = await called(subject, server, http, events)
    await collect(build_model(subject.entry(server.url), http).stream(again(call)))
    assert server.asked[-1].body["messages"][1]["reasoning_content"] == "why not"
    # Elsewhere the field is refused.
    await collect(build_model(SUBJECTS["mistral"].entry(server.url), http).stream(again(call)))
    assert "reasoning_content" not in server.asked[-1].body["messages"][1]


@pytest.mark.parametrize(
    "value", [b'"\\ud83d"', b'["\\ud83d\\ude00", "\\ude00"]', b"[" * 300 + b'"\\ud83d"' + b"]" * 300]
)
async def test_what_cannot_be_sent_again_does_not_go_back(
    server: RawServer, http: httpx.AsyncClient, value: bytes
) -> None:
    subject = SUBJECTS["gemini"]
    call = b'{"id":"c1","function":{"name":"list","arguments":"{}"},"extra_content":{"google":%b}}' % value
    event = b'data: {"choices":[{"delta":{"tool_calls":[%b]}}]}\n\n' % call
    found = await called(subject, server, http, [event, *subject.voice().ending("tool_calls")])
    assert (found.name, found.state) == ("list", None)


async def test_more_than_can_be_carried_does_not_go_back(server: RawServer, http: httpx.AsyncClient) -> None:
    subject = SUBJECTS["anthropic"]
    voice = subject.voice()
    events = [*voice.opening(), *voice.reasoning(["x" * 100_000] * 12), *voice.calls([("c1", "list", ["{}"])])]
    assert (await called(subject, server, http, [*events, *voice.ending("tool_calls")])).state is None


@pytest.mark.parametrize(
    ("name", "in_message", "in_call"),
    [
        ("gemini", {}, {"extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}}),
        ("deepseek", {"reasoning_content": ""}, {}),
        ("openai", {}, {}),
    ],
)
async def test_where_reasoning_is_lost_the_provider_is_told_so(
    *, server: RawServer, http: httpx.AsyncClient, name: str, in_message: dict[str, Any], in_call: dict[str, Any]
) -> None:
    subject = SUBJECTS[name]
    server.answer(subject.voice().ending("stop"))
    await collect(build_model(subject.entry(server.url), http).stream(again(ToolCallChunk("c1", "list", {}, "{}"))))
    call = {"id": "c1", "type": "function", "function": {"name": "list", "arguments": "{}"}, **in_call}
    expected = {"role": "assistant", "content": "Looking.", "tool_calls": [call], **in_message}
    assert server.asked[-1].body["messages"][1] == expected


async def test_encrypted_reasoning_of_openrouter_goes_back(server: RawServer, http: httpx.AsyncClient) -> None:
    subject = SUBJECTS["openrouter"]
    voice = subject.voice()
    detail = {"type": "reasoning.encrypted", "data": "opaque", "id": "r1", "index": 0}
    shown = {"type": "reasoning.text", "text": "why", "index": 0}
    event = data({"choices": [{"delta": {"content": "", "reasoning": "why", "reasoning_details": [shown, detail]}}]})
    events = [event, *voice.calls([("c1", "list", ["{}"])]), *voice.ending("tool_calls")]
    call = await called(subject, server, http, events)
    await collect(build_model(subject.entry(server.url), http).stream(again(call)))
    assert server.asked[-1].body["messages"][1]["reasoning_details"] == [detail]


async def test_encrypted_reasoning_of_responses_goes_back(server: RawServer, http: httpx.AsyncClient) -> None:
    subject = SUBJECTS["responses not in the background"]
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "opaque"}
    done = {"type": "response.output_item.done", "output_index": 0, "item": {**item, "status": "completed"}}
    voice = subject.voice()
    opening = voice.opening()
    calls = voice.calls([("c1", "list", ["{}"])])
    call = await called(subject, server, http, [*opening, data(done), *calls, *voice.ending("tool_calls")])
    await collect(build_model(subject.entry(server.url), http).stream(again(call)))
    body = server.asked[-1].body
    assert body["include"] == ["reasoning.encrypted_content"]
    assert [entry for entry in body["input"] if entry.get("type") == "reasoning"] == [item]
    assert [entry.get("type") for entry in body["input"]][-3:] == ["reasoning", "function_call", "function_call_output"]


async def test_ids_are_put_into_the_form_that_mistral_takes(server: RawServer, http: httpx.AsyncClient) -> None:
    subject = SUBJECTS["mistral"]
    voice = subject.voice()
    server.answer([*voice.opening(), *voice.ending("stop")])
    await collect(build_model(subject.entry(server.url), http).stream(again(ToolCallChunk("toolu_01A", "f", {}, "{}"))))
    _, calls, result = server.asked[-1].body["messages"]
    made = calls["tool_calls"][0]["id"]
    assert (len(made), made.isalnum(), made) == (9, True, result["tool_call_id"])
    await collect(build_model(subject.entry(server.url), http).stream(again(ToolCallChunk("Abc123xyZ", "f", {}, "{}"))))
    assert server.asked[-1].body["messages"][1]["tool_calls"][0]["id"] == "Abc123xyZ"


async def test_a_refusal_is_text_unless_a_form_was_asked_for(server: RawServer, http: httpx.AsyncClient) -> None:
    for name, event in {
        "openai": data({"choices": [{"delta": {"refusal": "I cannot"}}]}),
        "responses": data({"type": "response.refusal.delta", "delta": "I cannot"}),
    }.items():
        subject = SUBJECTS[name]
        model = build_model(subject.entry(server.url), http)
        server.answer([event, *subject.voice().ending("stop")])
        assert await collect(model.stream(asking("x"))) == [TextChunk("I cannot"), Finish(FinishReason.STOP)]
        server.answer([event, *subject.voice().ending("stop")])
        chunks = await collect(model.stream(asking("x", response_schema=JsonSchema("T", SCHEMA))))
        assert chunks[-1] == Finish(FinishReason.CONTENT_FILTER)
