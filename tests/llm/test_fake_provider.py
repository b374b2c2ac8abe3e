"""The tests and benchmarks rest on this server, so it is tested too."""

import asyncio
import sys
import time
from typing import Any

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider, Plan, script
from benchmarks.fake_requests import Served
from parley.llm.errors import ModelError
from parley.llm.factory import build_model
from parley.llm.ports import (
    ImagePart,
    JsonSchema,
    ModelMessage,
    ModelRequest,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolSpec,
    UsageChunk,
)
from parley.llm.registry import Capability
from tests.llm.calls import KINDS, Kind, asking, collect, entry_for, text_of


def test_the_script_depends_on_its_seed_alone_and_holds_other_scripts() -> None:
    assert script(7, 500, 4) == script(7, 500, 4) != script(8, 500, 4)
    text = "".join(script(7, 500, 4))
    assert all(piece in text for piece in ("😀", "e\u0301", "שלום"))
    assert 3 <= len(text) / 500 <= 6


def test_a_plan_is_read_from_words_among_others() -> None:
    plan = Plan.read('hello deltas=5 rate=2.5 x=y fail=die_at:3 tool=add:{"a":"b=c"} nothing', with_tools=True)
    assert (plan.deltas, plan.rate, plan.fault, plan.tools) == (5, 2.5, ("die_at", 3), [("add", '{"a":"b=c"}')])


@pytest.mark.parametrize("kind", KINDS)
async def test_stamps_let_a_reader_measure_each_delta(
    kind: Kind, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    chunks = build_model(entry_for(kind, provider), http).stream(asking("deltas=20 rate=100 stamp=1"))
    latencies_s = [
        (time.monotonic_ns() - int(chunk.text.rstrip("|"))) / 1e9
        async for chunk in chunks
        if isinstance(chunk, TextChunk)
    ]
    assert len(latencies_s) == 20
    assert 0 <= min(latencies_s) <= max(latencies_s) < 2


async def test_the_rate_and_the_first_pause_are_kept(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    began_at = time.monotonic()
    await collect(build_model(entry_for("openai", provider), http).stream(asking("deltas=21 rate=100 ttft=0.1")))
    assert 0.29 <= time.monotonic() - began_at < 5


async def test_a_call_that_does_not_stream_gets_one_body(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "deltas=9 two"}]}
    openai = (await http.post(f"{provider.url}/v1/chat/completions", json=body)).json()
    anthropic = (await http.post(f"{provider.url}/v1/messages", json=body)).json()
    text = "".join(script(1, 9, 4))
    assert openai["choices"][0]["message"]["content"] == anthropic["content"][0]["text"] == text
    assert (openai["usage"]["prompt_tokens"], openai["usage"]["completion_tokens"]) == (2, 9)


async def test_it_tells_what_became_of_each_call(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = build_model(entry_for("openai", provider), http)
    await collect(model.stream(asking("deltas=9")))
    stopped = model.stream(asking("deltas=900 rate=100"))
    assert isinstance(await anext(stopped), TextChunk)
    await stopped.aclose()
    await provider.ended(provider.requests[-1], 1)
    whole, early = (await http.get(f"{provider.url}/_requests")).json()
    assert (whole["deltas_sent"], whole["completed"], whole["closed_early"]) == (9, True, False)
    assert (early["completed"], early["closed_early"]) == (False, True)
    assert 1 <= early["deltas_sent"] < 900
    assert early["closed_at"] >= early["began_at"]


@pytest.mark.parametrize("kind", KINDS)
async def test_it_tells_which_calls_made_an_answer_and_which_of_those_were_stopped(
    kind: Kind, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    model = build_model(entry_for(kind, provider), http)
    await collect(model.stream(asking("one deltas=9")))
    with pytest.raises(ModelError):
        await collect(model.stream(asking("two fail=500")))
    stopped = model.stream(asking("three deltas=900 rate=100"))
    async for chunk in stopped:
        if isinstance(chunk, TextChunk):
            break
    await stopped.aclose()
    await provider.until(lambda: provider.generations("three")[0].cancelled, 1)
    assert [(record.asked.split()[0], record.cancelled) for record in provider.generations()] == [
        ("one", False),
        ("three", True),
    ]
    shown = (await http.get(f"{provider.url}/_requests")).json()
    assert sum(record["generated"] for record in shown) == 2
    assert sum(record["cancelled"] for record in shown) == 1


async def test_a_response_goes_on_without_a_reader(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    body = {"input": [{"role": "user", "content": "deltas=20 rate=100"}], "stream": True, "background": True}
    async with http.stream("POST", f"{provider.url}/v1/responses", json=body) as response:
        await anext(response.aiter_bytes())
    url = f"{provider.url}/v1/responses/{provider.requests[0].response_id}"
    assert (await http.get(url)).json()["status"] == "in_progress"
    # Reading to the end takes as long as writing does.
    again = await http.get(url, params={"stream": "true", "starting_after": "3"})
    assert again.text.count('"type":"response.output_text.delta"') == 20
    whole = (await http.post(f"{url}/cancel")).json()
    assert (whole["status"], whole["output"][1]["content"][0]["text"]) == ("completed", "".join(script(1, 20, 4)))
    assert not provider.requests[0].cancelled


async def test_a_stopped_response_ends_for_whoever_reads_it(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    body = {"input": [{"role": "user", "content": "deltas=900 rate=100"}], "stream": True, "background": True}
    async with http.stream("POST", f"{provider.url}/v1/responses", json=body) as response:
        parts = response.aiter_bytes()
        await anext(parts)
        url = f"{provider.url}/v1/responses/{provider.requests[0].response_id}"
        assert [(await http.post(f"{url}/cancel")).json()["status"] for _ in range(2)] == ["cancelled"] * 2
        async with asyncio.timeout(2):
            assert b"response.completed" not in b"".join([part async for part in parts])
    assert provider.requests[0].cancelled


@pytest.mark.parametrize("kind", KINDS)
async def test_it_counts_what_it_served(kind: Kind, provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = build_model(entry_for(kind, provider), http)
    image = ImagePart("image/png", b"x")
    request = ModelRequest((ModelMessage("user", (TextPart("one two deltas=9 reasoning=3"), image, image)),))
    usage = [chunk for chunk in await collect(model.stream(request)) if isinstance(chunk, UsageChunk)][-1]
    assert provider.served() == Served(1, usage.input_tokens, usage.cached_tokens, usage.output_tokens, 2)
    assert usage == UsageChunk(4, 1, 9)
    with pytest.raises(ModelError):
        await collect(model.stream(asking("fail=500")))
    assert provider.served().calls == 1
    stopped = model.stream(asking("three deltas=900 rate=100"))
    async for chunk in stopped:
        if isinstance(chunk, TextChunk):
            break
    await stopped.aclose()
    await provider.until(lambda: provider.generations("three")[0].cancelled, 5)
    assert 1 <= provider.served("three").output_tokens < 900
    assert (await http.get(f"{provider.url}/_stats")).json()["calls"] == 2


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}


@pytest.mark.parametrize("kind", KINDS)
async def test_it_answers_in_the_form_that_was_asked_for(
    kind: Kind, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    model = build_model(entry_for(kind, provider, capabilities=(Capability.JSON_SCHEMA,)), http)
    form = JsonSchema("T", SCHEMA)
    # The form that Anthropic is given has no bounds of numbers.
    number = 0 if kind == "anthropic" else 3
    assert text_of(await collect(model.stream(asking("x", response_schema=form)))) == f'{{"n":{number}}}'
    # What the first message says of the answers holds when it is asked again.
    again = ModelRequest(
        (
            ModelMessage("user", (TextPart('answers={"n":|{"n":7}'),)),
            ModelMessage("assistant", (TextPart('{"n":'),)),
            ModelMessage("user", (TextPart("that is no JSON"),)),
        ),
        response_schema=form,
    )
    assert text_of(await collect(model.stream(again))) == '{"n":7}'


@pytest.mark.parametrize("kind", KINDS)
async def test_it_calls_tools_as_the_request_says(kind: Kind, provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = build_model(entry_for(kind, provider), http)
    tools = (ToolSpec("one", "", {"type": "object"}), ToolSpec("two", "", SCHEMA))

    async def called(text: str, **fields: Any) -> list[tuple[str, str]]:
        chunks = await collect(model.stream(asking(text, tools=tools, **fields)))
        return [(chunk.name, chunk.raw) for chunk in chunks if isinstance(chunk, ToolCallChunk)]

    assert await called("tool=one tool=two", parallel_tools=True) == [("one", "{}"), ("two", "{}")]
    if kind != "openai":  # a server that is not known is not told
        assert await called("tool=one tool=two", parallel_tools=False) == [("one", "{}")]
    assert await called("tool=one", tool_choice="none") == []
    assert await called("x", tool_choice="two") == [("two", '{"n":3}')]
    assert await called("x", tool_choice="required") == [("one", "{}")]


async def test_it_runs_as_a_process(http: httpx.AsyncClient) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.fake_provider", "--port", "0", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            line = (await process.stdout.readline()).decode().split()
        assert line[:2] == ["listening", "on"]
        body = {"stream": True, "messages": [{"role": "user", "content": "deltas=3"}]}
        response = await http.post(f"http://{line[2]}/v1/chat/completions", json=body)
        assert response.text.endswith("data: [DONE]\n\n")
    finally:
        process.terminate()
        await process.wait()
