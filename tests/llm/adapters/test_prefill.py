from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_provider import FakeProvider, script
from parley.llm import flavours
from parley.llm.adapters.prefill import without_echo
from parley.llm.factory import build_model
from parley.llm.ports import Chunk, Finish, FinishReason, ReasoningChunk, TextChunk, UsageChunk
from parley.llm.registry import PrefillStyle
from tests.llm.calls import Kind, asking, collect, entry_for, reasoning_of, text_of

TEXT = "".join(script(5, 12, 4))


@pytest.mark.parametrize(
    ("style", "last", "parameters"),
    [
        ("plain", {"role": "assistant", "content": "Well, "}, {}),
        ("prefix", {"role": "assistant", "content": "Well, ", "prefix": True}, {}),
        (
            "continue_final_message",
            {"role": "assistant", "content": "Well, "},
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
    ],
)
async def test_each_style_has_its_shape(
    *,
    provider: FakeProvider,
    http: httpx.AsyncClient,
    style: PrefillStyle,
    last: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    model = build_model(entry_for("openai", provider, prefill=style), http)
    await collect(model.stream(asking("deltas=1", prefill="Well, ")))
    await collect(model.stream(asking("deltas=1")))
    with_it, without = (record.body for record in provider.requests)
    assert with_it["messages"] == [*without["messages"], last]
    assert {name: value for name, value in with_it.items() if name not in without} == parameters


async def test_anthropic_is_not_sent_white_space_at_the_end(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = build_model(entry_for("anthropic", provider, prefill="plain"), http)
    await collect(model.stream(asking("deltas=1", prefill="Well, \n")))
    await collect(model.stream(asking("deltas=1", prefill=" \n")))
    some, blank = (record.body["messages"] for record in provider.requests)
    assert some[1:] == [{"role": "assistant", "content": [{"type": "text", "text": "Well,"}]}]
    assert blank[1:] == []


@pytest.mark.parametrize(
    ("kind", "style"),
    [("openai", "plain"), ("openai", "prefix"), ("openai", "continue_final_message"), ("anthropic", "plain")],
)
async def test_an_answer_goes_on_from_any_beginning(
    provider: FakeProvider, http: httpx.AsyncClient, kind: Kind, style: PrefillStyle
) -> None:
    # Seed 5 has white space in many places, and characters of several code points.
    model = build_model(entry_for(kind, provider, prefill=style), http)
    for at in range(1, len(TEXT)):
        chunks = await collect(model.stream(asking("deltas=12 seed=5", prefill=TEXT[:at])))
        assert TEXT[:at] + text_of(chunks) == TEXT
        assert chunks[-1] == Finish(FinishReason.STOP)


@pytest.mark.parametrize("echoing", ["by its host", "by its parameter"])
async def test_what_a_provider_repeats_is_dropped(
    provider: FakeProvider, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, echoing: str
) -> None:
    entry = entry_for("openai", provider, prefill="prefix")
    if echoing == "by its host":
        monkeypatch.setitem(flavours.FLAVOURS, "mistral", replace(flavours.FLAVOURS["mistral"], hosts=("127.0.0.1",)))
    else:
        entry = replace(entry, parameters={"echo": True})
    model = build_model(entry, http)
    for at in range(1, len(TEXT) + 1):
        chunks = await collect(model.stream(asking("deltas=12 seed=5 echo=1", prefill=TEXT[:at])))
        assert TEXT[:at] + text_of(chunks) == TEXT
    # Elsewhere an answer may well say the same once more.
    monkeypatch.undo()
    model = build_model(replace(entry, parameters={}), http)
    chunks = await collect(model.stream(asking("deltas=12 seed=5 echo=1", prefill=TEXT[:3])))
    assert text_of(chunks) == TEXT


def test_mistral_is_known_to_repeat() -> None:
    assert flavours.flavour_of("https://api.mistral.ai/v1").echoes_prefill
    assert not flavours.flavour_of("https://api.deepseek.com/beta").echoes_prefill


async def chunks_of(*chunks: Chunk) -> AsyncGenerator[Chunk]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    ("answer", "expected", "rest"),
    [
        ("Well, yes", ("Well,", " "), "yes"),
        ("Well,yes", ("Well,", " "), "yes"),
        ("well, yes", ("Well,", " "), "well, yes"),
        (" yes", ("Well,", " "), " yes"),
        ("We", ("Well,", " "), "We"),
        ("Well,", ("Well,", " "), ""),
        ("\n\nyes", ("\n\n",), "yes"),
        ("\n yes", ("\n\n",), "\n yes"),
        ("\n\n\nyes", ("\n\n",), "\nyes"),
        ("yes", ("", ""), "yes"),
        ("yes", (), "yes"),
    ],
)
async def test_an_echo_is_dropped_however_it_is_cut(answer: str, expected: tuple[str, ...], rest: str) -> None:
    for size in range(1, len(answer) + 1):
        pieces = [TextChunk(answer[at : at + size]) for at in range(0, len(answer), size)]
        chunks = await collect(without_echo(chunks_of(*pieces, UsageChunk(1), Finish(FinishReason.STOP)), *expected))
        assert text_of(chunks) == rest
        assert all(chunk.text for chunk in chunks if isinstance(chunk, TextChunk))
        assert chunks[-2:] == [UsageChunk(1), Finish(FinishReason.STOP)]


@given(st.text("ab ", max_size=6), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=6))
async def test_no_more_is_dropped_than_was_expected(expected: str, pieces: list[str]) -> None:
    whole = "".join(pieces)
    chunks = without_echo(chunks_of(*map(TextChunk, pieces), Finish(FinishReason.STOP)), expected)
    found = text_of(await collect(chunks))
    assert found == (whole.removeprefix(expected) if expected else whole)


async def test_reasoning_before_an_echo_is_kept() -> None:
    chunks = await collect(
        without_echo(
            chunks_of(ReasoningChunk("why"), TextChunk("We"), ReasoningChunk("?"), TextChunk("ll, yes")), "Well, "
        )
    )
    assert (text_of(chunks), reasoning_of(chunks)) == ("yes", "why?")


async def test_closing_closes_what_is_read(provider: FakeProvider, http: httpx.AsyncClient) -> None:
    model = build_model(entry_for("anthropic", provider, prefill="plain"), http)
    chunks = model.stream(asking("deltas=900 rate=100", prefill="Well, "))
    async for chunk in chunks:
        if isinstance(chunk, TextChunk):
            break
    await chunks.aclose()
    await provider.ended(provider.requests[0], 1)
    assert provider.generations()[0].cancelled
