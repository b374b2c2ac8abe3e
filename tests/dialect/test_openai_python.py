"""OpenAI's own client for Python, as it is: only its address and its key are ours."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from benchmarks.fake_provider import FakeProvider, script
from tests.dialect.conftest import Ledger, Person
from tests.dialect.test_access import set_budget

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TEMPERATURES = {"Oslo": 3, "Rome": 21}


@pytest.fixture
async def client(alice: Person) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{alice.url}/v1", api_key=alice.key, max_retries=0, timeout=60) as made:
        yield made


def asked(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def with_key(client: AsyncOpenAI, key: str) -> AsyncOpenAI:
    return client.with_options(api_key=key)


# -- a conversation ----------------------------------------------------------------------------------------------------


async def test_it_lists_models(client: AsyncOpenAI) -> None:
    found = [model async for model in client.models.list()]

    assert {"default", "fast", "gpt", "demo"} <= {model.id for model in found}
    assert {model.object for model in found} == {"model"}
    assert await client.models.retrieve("goes-on") in found


async def test_a_whole_answer(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="gpt", messages=asked("seed=3 deltas=12"))

    assert answer.choices[0].message.content == "".join(script(3, 12, 4))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 12, 14)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer._request_id


async def test_a_streamed_answer(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="gpt", messages=asked("seed=3 deltas=12"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "".join(script(3, 12, 4))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_its_stream_helper_gathers_the_same(client: AsyncOpenAI) -> None:
    plan = 'seed=3 deltas=4 tool=get_weather:{"city":"Oslo"}'
    async with client.chat.completions.stream(model="gpt", messages=asked(plan), tools=[WEATHER]) as stream:
        kinds = {event.type async for event in stream}
        whole = await stream.get_final_completion()

    assert {"chunk", "content.delta", "tool_calls.function.arguments.done"} <= kinds
    message = whole.choices[0].message
    assert message.content == "".join(script(3, 4, 4))
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"city":"Oslo"}'
    assert whole.choices[0].finish_reason == "tool_calls"


def _run_tools(message: Any) -> list[ChatCompletionMessageParam]:
    """Do what a caller's own code does with tool calls."""
    results: list[ChatCompletionMessageParam] = []
    for call in message.tool_calls:
        city = orjson.loads(call.function.arguments)["city"]
        content = orjson.dumps({"celsius": TEMPERATURES[city]}).decode()
        results.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return results


async def test_a_conversation_with_parallel_tools(client: AsyncOpenAI, provider: FakeProvider, ledger: Ledger) -> None:
    plan = 'seed=5 deltas=3 tool=get_weather:{"city":"Oslo"} tool=get_weather:{"city":"Rome"}'
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Be brief."}, *asked(plan)]
    rounds = 0
    while True:
        rounds += 1
        answer = await client.chat.completions.create(
            model="gpt", messages=messages, tools=[WEATHER], parallel_tool_calls=True, tool_choice="auto"
        )
        message = answer.choices[0].message
        messages.append(message.to_dict())  # type: ignore[arg-type]  # as its own documentation does it
        if answer.choices[0].finish_reason != "tool_calls":
            break
        messages += _run_tools(message)

    assert rounds == 2
    assert message.content == "".join(script(5, 3, 4))
    # What the provider was told in the second round is the whole of it.
    second = provider.requests[1].body["messages"]
    assert [item["role"] for item in second] == ["system", "user", "assistant", "tool", "tool"]
    assert [call["function"]["arguments"] for call in second[2]["tool_calls"]] == ['{"city":"Oslo"}', '{"city":"Rome"}']
    assert [(item["tool_call_id"], item["content"]) for item in second[3:]] == [
        ("call_0", '{"celsius":3}'),
        ("call_1", '{"celsius":21}'),
    ]
    assert [row["status"] for row in await ledger()] == ["completed", "completed"]


async def test_the_demo_model_holds_a_conversation_with_tools(client: AsyncOpenAI) -> None:
    """Without any provider: what a new user tries first."""
    tool: ChatCompletionToolParam = {
        "type": "function",
        "function": {
            "name": "add_task",
            "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
        },
    }
    messages = asked("add task buy milk")
    first = await client.chat.completions.create(model="demo", messages=messages, tools=[tool])
    (call,) = first.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert orjson.loads(call.function.arguments) == {"title": "buy milk"}
    messages.append(first.choices[0].message.to_dict())  # type: ignore[arg-type]  # as above
    messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"title": "buy milk"}'})

    second = await client.chat.completions.create(model="demo", messages=messages, tools=[tool])

    assert second.choices[0].message.content == 'Done: added the task "buy milk".'


class Described(BaseModel):
    """What the model is to give."""

    name: str
    age: int


async def test_it_parses_an_answer_that_fits_a_schema(client: AsyncOpenAI, provider: FakeProvider) -> None:
    answer = await client.chat.completions.parse(
        model="gpt", messages=asked('say={"name":"Ada","age":36}'), response_format=Described
    )

    assert answer.choices[0].message.parsed == Described(name="Ada", age=36)
    form = provider.requests[0].body["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["name"] == "Described"
    assert set(form["json_schema"]["schema"]["properties"]) == {"name", "age"}


async def test_the_client_that_blocks(alice: Person) -> None:
    def talk() -> tuple[list[str], str]:
        with OpenAI(base_url=f"{alice.url}/v1", api_key=alice.key, timeout=60) as client:
            stream = client.chat.completions.create(model="gpt", messages=asked("seed=3 deltas=12"), stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return [model.id for model in client.models.list()], text

    # The server runs in this thread.
    models, text = await asyncio.to_thread(talk)
    assert "gpt" in models
    assert text == "".join(script(3, 12, 4))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_key_that_is_not_ours(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await with_key(client, "sk-nothing").chat.completions.create(model="gpt", messages=asked("?"))

    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id


async def test_a_key_without_the_scope(client: AsyncOpenAI, alice: Person) -> None:
    key = (await alice.make_key(scopes=["tasks:read"]))["key"]

    with pytest.raises(openai.PermissionDeniedError) as caught:
        await with_key(client, key).models.list()

    assert caught.value.code == "missing_scope"


async def test_a_model_that_is_not_there(client: AsyncOpenAI) -> None:
    for asking in (
        client.chat.completions.create(model="gpt-99", messages=asked("?")),
        client.models.retrieve("gpt-99"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await asking

        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_request_that_does_not_hold(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        wrong: Any = [{"role": "user", "content": 5}]
        await client.chat.completions.create(model="gpt", messages=wrong)

    assert caught.value.param == "messages[0].content"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="gpt", messages=asked("?"), n=2)


async def test_a_budget_that_is_used_up_is_not_asked_again(
    client: AsyncOpenAI, alice: Person, admin: asyncpg.Connection, provider: FakeProvider
) -> None:
    await set_budget(admin, alice, "api_key", "0.000001")
    await client.chat.completions.create(model="gpt", messages=asked("deltas=2"))
    began = asyncio.get_running_loop().time()

    with pytest.raises(openai.RateLimitError) as caught:
        await client.with_options(max_retries=5).chat.completions.create(model="gpt", messages=asked("deltas=2"))

    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    # It would have waited for the end of the month, or slept between tries.
    assert asyncio.get_running_loop().time() - began < 5
    assert len(provider.requests) == 1


async def test_it_asks_again_what_may_succeed(client: AsyncOpenAI, provider: FakeProvider) -> None:
    answer = await client.with_options(max_retries=2).chat.completions.create(
        model="gpt", messages=asked("deltas=3 fail=503 fail_first=1")
    )

    assert answer.choices[0].message.content == "".join(script(1, 3, 4))
    assert len(provider.requests) == 2


async def test_a_provider_that_fails(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="gpt", messages=asked("fail=503"))

    assert caught.value.code == "provider_unavailable"


async def test_a_stream_that_breaks_raises_after_what_came(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="gpt", messages=asked("seed=3 deltas=9 fail=die_at:3"), stream=True
    )
    text = ""
    with pytest.raises(openai.APIError) as caught:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""

    assert text == "".join(script(3, 9, 4)[:3])
    assert caught.value.code == "provider_unavailable"


async def test_a_stream_that_is_left_stops_the_provider(
    client: AsyncOpenAI, provider: FakeProvider, ledger: Ledger
) -> None:
    stream = await client.chat.completions.create(model="gpt", messages=asked("rate=50 deltas=5000"), stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()

    (call,) = provider.requests
    await provider.ended(call, within_s=30)
    assert call.closed_early
    (row,) = await ledger(rows=1)
    assert (row["status"], row["purpose"]) == ("stopped", "dialect")
