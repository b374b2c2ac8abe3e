import asyncio
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_provider import FakeProvider, script
from parley.core import clock
from parley.llm.errors import ModelError, ModelNotUsable, ReattachRefused, UnknownModel
from parley.llm.ports import CursorChunk, TextChunk, UsageChunk
from parley.llm.registry import ModelEntry, ModelRegistry, Price
from parley.llm.retry import AttemptStarted
from parley.usage.service import ModelCall, UsageService, cost_of
from tests.llm.calls import asking, text_of

REGISTRY = """\
providers:
  openai: {kind: openai, base_url: "${URL}/v1"}
  responses: {kind: openai_responses, base_url: "${URL}/v1"}
  anthropic: {kind: anthropic, base_url: "${URL}"}
  gone: {kind: openai, base_url: "${URL}/gone"}
  keyless: {kind: openai, base_url: "${URL}/v1", api_key: "${KEY:-}"}
  demo: {kind: demo}
models:
  openai: {provider: openai, name: fake, price: {input: 3, cached_input: 0.3, output: 15}, retries: 0}
  anthropic: {provider: anthropic, name: fake, price: {input: 3, cached_input: 0.3, output: 15}, retries: 0}
  responses: {provider: responses, name: fake, price: {input: 3, cached_input: 0.3, output: 15}, retries: 0}
  thinker: {provider: openai, name: fake, price: {output: 15}, retries: 0, capabilities: [reasoning]}
  gone: {provider: gone, name: fake, retries: 0, fallbacks: [keyless, openai]}
  begun: {provider: gone, name: fake, retries: 0, fallbacks: [openai], prefill: plain}
  begun_keyless: {provider: keyless, name: fake, prefill: plain}
  keyless: {provider: keyless, name: fake}
  demo: {provider: demo, name: demo, parameters: {delay_ms: 0}, prefill: plain}
aliases:
  default: [keyless, demo]
  other: [responses]
"""


@pytest.fixture
def service(tmp_path: Path, provider: FakeProvider, http: httpx.AsyncClient) -> UsageService:
    path = tmp_path / "registry.yaml"
    path.write_text(REGISTRY, encoding="utf-8")
    return UsageService(ModelRegistry.load(path, {"URL": provider.url}), http)


def price_entry(**price: str) -> ModelEntry:
    return ModelEntry(id="m", provider="p", kind="demo", name="n", price=Price.model_validate(price))


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (UsageChunk(), "0.00000000"),
        (UsageChunk(input_tokens=1_000_000), "3.00000000"),
        (UsageChunk(input_tokens=1_000_000, cached_tokens=400_000), "1.92000000"),
        (UsageChunk(output_tokens=7), "0.00010500"),
        (UsageChunk(input_tokens=1, cached_tokens=1), "0.00000030"),
        (UsageChunk(input_tokens=10, cached_tokens=99), "0.00000300"),
    ],
)
def test_cost(usage: UsageChunk, cost: str) -> None:
    assert cost_of(price_entry(input="3", cached_input="0.3", output="15"), usage) == Decimal(cost)


def test_cost_is_rounded_to_eight_decimals() -> None:
    cost = cost_of(price_entry(input="0.025"), UsageChunk(input_tokens=1))
    assert str(cost) == "3E-8"  # 0.000000025, the half goes up


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_cached_tokens_never_make_a_call_dearer(input_tokens: int, cached: int, output: int) -> None:
    entry = price_entry(input="3", cached_input="0.3", output="15")
    cached = min(cached, input_tokens)
    assert (
        0
        <= cost_of(entry, UsageChunk(input_tokens, cached, output))
        <= cost_of(entry, UsageChunk(input_tokens, 0, output))
    )


@pytest.mark.parametrize("model", ["openai", "anthropic"])
async def test_a_whole_call_is_counted_as_the_provider_counts(service: UsageService, model: str) -> None:
    async with service.stream(asking("deltas=100 seed=3 some words"), model) as call:
        items = [item async for item in call]
    assert items[0] == AttemptStarted(model, 1)
    assert text_of(items) == "".join(script(3, 100, 4))
    tally = call.tally
    assert (tally.model_id, tally.input_tokens, tally.cached_tokens, tally.output_tokens) == (model, 4, 1, 100)
    assert tally.cost == Decimal("0.0015093")
    assert not tally.estimated


async def stop_after(call: ModelCall, deltas: int) -> str:
    text = ""
    async for item in call:
        if isinstance(item, TextChunk):
            text += item.text
            deltas -= 1
            if not deltas:
                break
    await call.aclose()
    return text


@pytest.mark.parametrize("model", ["openai", "anthropic"])
async def test_a_call_that_is_stopped_early_is_estimated(
    service: UsageService, provider: FakeProvider, model: str
) -> None:
    call = service.stream(asking("deltas=1000 rate=200 " + "x" * 400), model)
    text = await stop_after(call, 10)
    await provider.ended(provider.requests[-1], 0.5)
    assert provider.requests[-1].closed_early
    assert call.tally.estimated
    assert call.tally.output_tokens == -(-len(text) // 4)
    # Anthropic has sent its input count by then, OpenAI has not.
    assert call.tally.input_tokens == (3 if model == "anthropic" else 106)
    assert call.tally.cost > 0


@pytest.mark.parametrize(("fault", "counted"), [("500", 0), ("die_at:0", 0), ("die_at:5", 1)])
async def test_a_refused_call_costs_nothing_a_broken_one_what_was_shown(
    service: UsageService, fault: str, counted: int
) -> None:
    call = service.stream(asking(f"deltas=10 fail={fault}"), "openai")
    with pytest.raises(ModelError):
        _ = [item async for item in call]
    assert (call.tally.output_tokens > 0, call.tally.input_tokens > 0) == (bool(counted), bool(counted))
    assert (call.tally.cost > 0) == bool(counted)


async def test_a_call_that_was_never_read_costs_nothing(service: UsageService, provider: FakeProvider) -> None:
    call = service.stream(asking("deltas=1"), "openai")
    await call.aclose()
    assert call.tally.cost == 0
    assert not call.tally.estimated
    assert not provider.requests


async def test_a_cancelled_call_is_counted(service: UsageService, provider: FakeProvider) -> None:
    call = service.stream(asking("deltas=1000 rate=100"), "openai")
    shown = asyncio.Event()

    async def read() -> None:
        async for item in call:
            if isinstance(item, TextChunk):
                shown.set()

    task = asyncio.create_task(read())
    await shown.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.ended(provider.requests[-1], 0.5)
    assert call.tally.estimated
    assert call.tally.output_tokens > 0


async def test_a_call_that_is_stopped_before_its_first_word_is_charged_its_input(
    service: UsageService, provider: FakeProvider
) -> None:
    call = service.stream(asking("fail=stall_at:0 " + "x" * 400), "openai")
    assert await anext(aiter(call)) == AttemptStarted("openai", 1)
    reading = asyncio.create_task(anext(aiter(call)))
    await provider.until(lambda: provider.requests, 2)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await call.aclose()
    assert call.tally.estimated
    assert (call.tally.input_tokens, call.tally.output_tokens) == (104, 0)


@pytest.mark.parametrize(("seconds", "tokens"), [(20, 2000), (3600, 4096)])
@pytest.mark.parametrize("deltas", [0, 5])
async def test_what_a_model_thinks_for_itself_before_it_is_stopped_is_charged(
    service: UsageService, provider: FakeProvider, seconds: int, tokens: int, deltas: int
) -> None:
    call = service.stream(asking(f"fail=stall_at:{deltas}"), "thinker")
    shown = asyncio.Event()

    async def read() -> None:
        async for item in call:
            if isinstance(item, TextChunk):
                shown.set()

    reading = asyncio.create_task(read())
    await provider.until(lambda: provider.requests, 5)
    if deltas:
        await asyncio.wait_for(shown.wait(), 5)
    with clock.shifted(seconds):
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await call.aclose()
    # What a test takes is thought too.
    assert tokens <= call.tally.output_tokens <= min(tokens + 1000, 4096)
    assert call.tally.estimated
    assert call.records[0].status == "stopped"


async def test_a_model_that_shows_what_it_thinks_is_charged_what_it_showed(
    service: UsageService, provider: FakeProvider
) -> None:
    call = service.stream(asking("deltas=1000 rate=200 reasoning=3"), "thinker")
    await stop_after(call, 3)
    await provider.ended(provider.requests[-1], 0.5)
    with clock.shifted(3600):
        assert call.tally.output_tokens < 1000


async def test_the_model_that_answers_is_the_one_that_is_charged(service: UsageService) -> None:
    async with service.stream(asking("deltas=5"), "gone") as call:
        assert call.entry.id == "gone"
        items = [item async for item in call]
    # keyless stands before openai among the fallbacks but cannot be used.
    assert [item for item in items if isinstance(item, AttemptStarted)] == [
        AttemptStarted("gone", 1),
        AttemptStarted("openai", 2),
    ]
    assert call.entry.id == call.tally.model_id == "openai"
    assert call.tally.cost > 0


async def test_the_default_is_the_first_usable_model(service: UsageService) -> None:
    async with service.stream(asking("hello")) as call:
        items = [item async for item in call]
    assert "no provider is configured" in text_of(items)
    assert call.tally.model_id == "demo"
    assert call.tally.cost == 0


def test_a_wrong_model_is_told_before_anything_is_sent(service: UsageService) -> None:
    with pytest.raises(UnknownModel):
        service.stream(asking("x"), "nobody")
    with pytest.raises(ModelNotUsable, match="KEY is not set"):
        service.stream(asking("x"), "keyless")


async def leave(call: ModelCall, deltas: int) -> tuple[str, str]:
    """Read a little, then close the call. Returns the last cursor and the text up to it."""
    text = cursor = ""
    async with call:
        async for item in call:
            if isinstance(item, TextChunk):
                text += item.text
                deltas -= 1
            elif isinstance(item, CursorChunk):
                cursor = item.cursor
                if not deltas:
                    break
    return cursor, text


async def test_a_closed_call_is_stopped_at_the_provider(service: UsageService, provider: FakeProvider) -> None:
    await leave(service.stream(asking("deltas=900 rate=100"), "responses"), 2)
    assert [record.cancelled for record in provider.generations()] == [True]


async def test_a_detached_call_goes_on_and_is_read_on(service: UsageService, provider: FakeProvider) -> None:
    request = asking("deltas=40 seed=3 rate=100")
    call = service.stream(request, "responses")
    call.detach()
    cursor, said = await leave(call, 5)
    async with service.reattach(request, "responses", cursor, said=said) as again:
        assert again.entry.id == "responses"
        items = [item async for item in again]
    assert said + text_of(items) == "".join(script(3, 40, 4))
    assert not any(isinstance(item, AttemptStarted) for item in items)
    tally = again.tally
    # The provider counts the answer as a whole.
    assert (tally.input_tokens, tally.output_tokens, tally.estimated) == (3, 40, False)
    assert len(provider.generations()) == 1
    # Having been detached is the affair of that one call.
    await leave(service.stream(request, "responses"), 5)
    assert [record.cancelled for record in provider.generations()] == [False, True]


async def test_a_reader_that_is_cancelled_after_detaching_leaves_the_answer(
    service: UsageService, provider: FakeProvider
) -> None:
    call = service.stream(asking("deltas=900 rate=100"), "responses")
    shown = asyncio.Event()

    async def read() -> None:
        async with call:
            async for item in call:
                if isinstance(item, TextChunk):
                    shown.set()

    task = asyncio.create_task(read())
    await shown.wait()
    call.detach()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.ended(provider.requests[0], 1)
    assert [record.cancelled for record in provider.generations()] == [False]


async def test_a_call_that_was_read_on_and_stopped_is_estimated_as_a_whole(
    service: UsageService, provider: FakeProvider
) -> None:
    request = asking("deltas=900 rate=100")
    call = service.stream(request, "responses")
    call.detach()
    cursor, said = await leave(call, 20)
    again = service.reattach(request, "responses", cursor, said=said)
    text = await stop_after(again, 3)
    assert again.tally.estimated
    assert again.tally.output_tokens == -(-len(said + text) // 4)
    assert again.tally.input_tokens > 0
    assert provider.generations()[0].cancelled


@pytest.mark.parametrize("model", ["nobody", "keyless", "openai", "demo", "other", "default"])
def test_a_model_that_cannot_be_read_on_is_refused_before_anything_is_sent(service: UsageService, model: str) -> None:
    with pytest.raises(ReattachRefused):
        service.reattach(asking("x"), model, "resp_1:1:1", said="x")


async def test_an_answer_that_is_gone_is_refused_once(service: UsageService, provider: FakeProvider) -> None:
    call = service.reattach(asking("x"), "responses", "resp_1:1:1", said="x")
    with pytest.raises(ReattachRefused):
        _ = [item async for item in call]
    assert [record.method for record in provider.requests] == ["GET", "GET"]
    assert not provider.generations()


@pytest.mark.parametrize(
    ("model", "can"),
    [
        ("demo", True),
        ("begun", True),
        ("begun_keyless", False),
        ("openai", False),
        ("nobody", False),
        ("default", False),
    ],
)
def test_who_can_be_given_a_beginning(service: UsageService, model: str, *, can: bool) -> None:
    assert service.can_prefill(model) is can


async def test_a_beginning_is_given_to_the_named_model_alone(service: UsageService, provider: FakeProvider) -> None:
    async with service.stream(asking("repeat 3 x", prefill="x1 x"), "demo") as call:
        assert text_of([item async for item in call]) == "2 x3"
    call = service.stream(asking("deltas=3", prefill="x"), "begun")
    with pytest.raises(ModelError):
        _ = [item async for item in call]
    assert not provider.generations()
    with pytest.raises(ModelNotUsable, match="cannot go on"):
        service.stream(asking("deltas=3", prefill="x"), "openai")
