"""What every adapter makes of what its provider's documentation says comes, over a real connection."""

from collections.abc import AsyncIterator, Mapping
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.llm.factory import ADAPTERS, build_model
from parley.llm.flavours import FLAVOURS, flavour_of
from parley.llm.ports import (
    Chunk,
    Finish,
    FinishReason,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
    UsageChunk,
)
from tests.llm.adapters.raw_server import RawServer
from tests.llm.adapters.table import SUBJECTS, Subject, merged, missing, read
from tests.llm.adapters.voices import Event
from tests.llm.calls import asking, collect

TEXTS = ("Grüße, ", "שלום 日本 👩‍👩‍👧", " e\u0301\n", '"\\</a>')
ARGUMENTS = ('{"title":"Milch \\"kaufen\\" 😀","tags":["a","b"],"n":-1.5e3}', '{"all":true}')
CALLS = [
    ("call_1", "add_task", [ARGUMENTS[0][at : at + 5] for at in range(0, len(ARGUMENTS[0]), 5)]),
    ("call_2", "list_tasks", ["{", '"all"', ":true}"]),
]
CALLED = [
    ToolCallChunk("call_1", "add_task", {"title": 'Milch "kaufen" 😀', "tags": ["a", "b"], "n": -1500.0}, ARGUMENTS[0]),
    ToolCallChunk("call_2", "list_tasks", {"all": True}, ARGUMENTS[1]),
]
THOUGHTS = ("first ", "then 日本")


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with RawServer() as server:
        yield server


async def ask(subject: Subject, server: RawServer, http: httpx.AsyncClient, events: list[Event]) -> list[Chunk]:
    server.answer(events)
    chunks = await collect(build_model(subject.entry(server.url), http).stream(asking("x")))
    return merged(chunks, ids=subject.voice().has_ids)


def answer(subject: Subject) -> tuple[list[Event], list[Chunk]]:
    """Return a whole answer with all that there is, and what it has to become."""
    voice = subject.voice()
    events = voice.opening()
    events += voice.reasoning(THOUGHTS)
    for text in TEXTS:
        events += voice.text(text)
    events += voice.calls(CALLS)
    events += voice.ending("tool_calls", usage=voice.usage(given=1000, cached=600, made=50))
    calls = CALLED if voice.has_ids else [ToolCallChunk("", call.name, call.arguments, call.raw) for call in CALLED]
    return events, [
        UsageChunk(input_tokens=1000, cached_tokens=600, output_tokens=50),
        ReasoningChunk("".join(THOUGHTS)),
        TextChunk("".join(TEXTS)),
        *calls,
        Finish(FinishReason.TOOL_CALLS),
    ]


def normal(chunks: list[Chunk]) -> list[Chunk]:
    """Reasoning between marks has a line end at its start and its end."""
    return [ReasoningChunk(chunk.text.strip("\n")) if isinstance(chunk, ReasoningChunk) else chunk for chunk in chunks]


def test_every_adapter_and_every_flavour_is_in_the_table() -> None:
    assert missing(ADAPTERS, FLAVOURS) == set()


def test_one_that_is_not_would_be_found() -> None:
    assert missing([*ADAPTERS, "invented"], [*FLAVOURS, "other"]) == {"invented", "other"}


async def test_plain_text(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> None:
    voice = subject.voice()
    events = [*voice.opening(), *(event for text in TEXTS for event in voice.text(text)), *voice.ending("stop")]
    chunks = await ask(subject, server, http, events)
    assert [chunk for chunk in chunks if not isinstance(chunk, UsageChunk)] == [
        TextChunk("".join(TEXTS)),
        Finish(FinishReason.STOP),
    ]


async def test_reasoning_calls_and_counts(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> None:
    events, expected = answer(subject)
    assert normal(await ask(subject, server, http, events)) == expected


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
async def test_each_reason_to_stop(subject: Subject, server: RawServer, http: httpx.AsyncClient, reason: str) -> None:
    voice = subject.voice()
    events = [*voice.opening(), *voice.text("a")]
    events += voice.calls(CALLS) if reason == "tool_calls" else []
    chunks = await ask(subject, server, http, [*events, *voice.ending(reason)])
    assert chunks[-1] == Finish(FinishReason(reason))


async def test_an_answer_of_nothing_is_an_answer(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> None:
    voice = subject.voice()
    chunks = await ask(subject, server, http, [*voice.opening(), *voice.ending("stop")])
    assert [chunk for chunk in chunks if not isinstance(chunk, UsageChunk)] == [Finish(FinishReason.STOP)]


async def test_two_calls_without_arguments(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> None:
    voice = subject.voice()
    calls = voice.calls([("call_1", "one", ["{}"]), ("call_2", "two", [""])])
    chunks = await ask(subject, server, http, [*voice.opening(), *calls, *voice.ending("tool_calls")])
    found = [(chunk.name, chunk.arguments) for chunk in chunks if isinstance(chunk, ToolCallChunk)]
    assert found == [("one", {}), ("two", {})]


async def test_whole_json_is_given_on_as_text(subject: Subject, server: RawServer, http: httpx.AsyncClient) -> None:
    voice = subject.voice()
    pieces = ['{"a', '": "', "é", '"}']
    events = [*voice.opening(), *(event for piece in pieces for event in voice.text(piece)), *voice.ending("stop")]
    assert TextChunk('{"a": "é"}') in await ask(subject, server, http, events)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_arguments_may_be_cut_anywhere(data: st.DataObject) -> None:
    subject = SUBJECTS[data.draw(st.sampled_from(sorted(SUBJECTS)))]
    voice = subject.voice()
    calls = []
    for call_id, name, pieces in CALLS:
        whole = "".join(pieces)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
        edges = [0, *cuts, len(whole)]
        calls.append((call_id, name, [whole[a:b] for a, b in pairwise(edges)]))
    events = [*voice.opening(), *voice.calls(calls), *voice.ending("tool_calls")]
    chunks = merged(read(subject.parser(), events))
    found = [chunk for chunk in chunks if isinstance(chunk, ToolCallChunk)]
    assert [(call.name, call.arguments, call.raw) for call in found] == [
        (call.name, call.arguments, call.raw) for call in CALLED
    ]
    assert len({call.call_id for call in found}) == 2


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_split_of_the_same_bytes_gives_the_same_chunks(data: st.DataObject) -> None:
    subject = SUBJECTS[data.draw(st.sampled_from(sorted(SUBJECTS)))]
    events, expected = answer(subject)
    stream = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=40)))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    assert normal(merged(read(subject.parser(), pieces), ids=subject.voice().has_ids)) == expected


@pytest.mark.parametrize(
    ("url", "name"),
    {
        "https://api.openai.com/v1": "openai",
        "https://eu.api.openai.com/v1": "openai",
        "https://x.openai.azure.com/openai/v1": "azure",
        "https://notapi.openai.com.evil.example/v1": "generic",
        "https://notopenrouter.ai/api/v1": "generic",
        "https://openrouter.ai/api/v1": "openrouter",
        "https://api.groq.com/openai/v1": "groq",
        "https://api.mistral.ai/v1": "mistral",
        "https://api.deepseek.com/beta": "deepseek",
        "https://api.x.ai/v1": "xai",
        "https://generativelanguage.googleapis.com/v1beta/openai": "gemini",
        "https://europe-west1-aiplatform.googleapis.com/v1/projects/p/locations/l/endpoints/openapi": "gemini",
        "http://127.0.0.1:11434/v1": "generic",
        "": "generic",
    }.items(),
)
def test_a_flavour_is_known_by_its_host(url: str, name: str) -> None:
    assert flavour_of(url).name == name
    assert flavour_of(url, "ollama").name == "ollama"


def test_the_table_of_flavours_can_be_read_by_name() -> None:
    names: Mapping[str, str] = {name: flavour.name for name, flavour in FLAVOURS.items()}
    assert all(name == key for key, name in names.items())


def test_the_documentation_has_every_adapter_and_every_flavour() -> None:
    text = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert [name for name in (*ADAPTERS, *FLAVOURS) if f"`{name}`" not in text] == []
