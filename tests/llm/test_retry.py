import asyncio
import time
from collections.abc import AsyncGenerator

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.llm import retry
from parley.llm.errors import ModelError
from parley.llm.factory import build_model
from parley.llm.ports import Chunk, Finish, ModelRequest, TextChunk
from parley.llm.retry import AttemptStarted, Candidate, stream_with_retries
from tests.llm.calls import asking, entry_for, text_of


@pytest.fixture
def candidate(provider: FakeProvider, http: httpx.AsyncClient) -> Candidate:
    entry = entry_for("openai", provider, retries=2)
    return Candidate(entry, build_model(entry, http))


@pytest.fixture
def nowhere(provider: FakeProvider, http: httpx.AsyncClient) -> Candidate:
    """A model whose provider answers every call with 404."""
    entry = entry_for("openai", provider, id="nowhere", base_url=f"{provider.url}/nowhere", retries=2)
    return Candidate(entry, build_model(entry, http))


async def run(*candidates: Candidate, text: str) -> tuple[list[object], ModelError | None]:
    items: list[object] = []
    try:
        async for item in stream_with_retries(candidates, asking(text), backoff_base_s=0.001):
            items.append(item)  # noqa: PERF401  the items before a failure count
    except ModelError as error:
        return items, error
    return items, None


def attempts(items: list[object]) -> list[tuple[str, int]]:
    return [(item.model_id, item.attempt) for item in items if isinstance(item, AttemptStarted)]


@pytest.mark.parametrize("fault", ["500", "429", "nothing", "garbage", "die_at:0", "error_event_at:0"])
async def test_a_failure_before_anything_visible_is_tried_again(candidate: Candidate, fault: str) -> None:
    items, error = await run(candidate, text=f"deltas=5 fail={fault} fail_first=2")
    assert error is None
    assert attempts(items) == [("openai", 1), ("openai", 2), ("openai", 3)]
    assert text_of(items) == "".join(script(1, 5, 4))
    assert isinstance(items[-1], Finish)


async def test_the_number_of_retries_is_bounded(candidate: Candidate, provider: FakeProvider) -> None:
    items, error = await run(candidate, text="fail=500")
    assert error is not None
    assert error.code == "provider_unavailable"
    assert len(attempts(items)) == len(provider.requests) == 3


@pytest.mark.parametrize("fault", ["401", "400", "400ctx", "404", "429quota"])
async def test_what_is_not_retryable_is_not_retried(candidate: Candidate, provider: FakeProvider, fault: str) -> None:
    _, error = await run(candidate, text=f"fail={fault}")
    assert error is not None
    assert len(provider.requests) == 1


async def test_nothing_is_tried_again_after_visible_text(
    candidate: Candidate, nowhere: Candidate, provider: FakeProvider
) -> None:
    items, error = await run(candidate, nowhere, text="deltas=9 fail=die_at:3 fail_first=1")
    assert error is not None
    assert error.code == "provider_unavailable"
    assert sum(isinstance(item, TextChunk) for item in items) == 3
    assert len(provider.requests) == 1


async def test_nothing_is_tried_again_after_reasoning(candidate: Candidate, provider: FakeProvider) -> None:
    _, error = await run(candidate, text="reasoning=3 fail=die_at:2 fail_first=1")
    assert error is not None
    assert len(provider.requests) == 1


async def test_a_fallback_answers_when_the_model_cannot(nowhere: Candidate, candidate: Candidate) -> None:
    items, error = await run(nowhere, candidate, text="deltas=5")
    assert error is None
    assert attempts(items) == [("nowhere", 1), ("openai", 2)]
    assert text_of(items) == "".join(script(1, 5, 4))


async def test_when_all_fail_the_first_models_error_is_raised(nowhere: Candidate, candidate: Candidate) -> None:
    items, error = await run(candidate, nowhere, text="fail=429 retry_after=0")
    assert error is not None
    assert error.code == "provider_rate_limited"
    assert [model for model, _ in attempts(items)] == ["openai"] * 3 + ["nowhere"]


async def test_a_content_filter_is_not_evaded(candidate: Candidate, nowhere: Candidate) -> None:
    items, error = await run(candidate, nowhere, text="fail=400filter")
    assert error is not None
    assert error.code == "content_filtered"
    assert len(attempts(items)) == 1


async def test_retry_after_is_waited_for(candidate: Candidate) -> None:
    began_at = time.monotonic()
    items, error = await run(candidate, text="deltas=1 fail=429 retry_after=1 fail_first=1")
    assert error is None
    assert len(attempts(items)) == 2
    assert time.monotonic() - began_at >= 1


async def test_a_provider_that_wants_a_long_pause_is_not_asked_again(
    candidate: Candidate, provider: FakeProvider
) -> None:
    _, error = await run(candidate, text="fail=429 retry_after=60")
    assert error is not None
    assert error.retry_after_s == 60
    assert len(provider.requests) == 1


def test_the_pause_grows_to_its_cap_with_full_jitter() -> None:
    error = ModelError(retryable=True)
    for count, most_s in ((0, 0.5), (1, 1), (4, 8), (9, 8)):
        pauses = [retry._delay_s(error, count, 0.5) for _ in range(200)]
        assert all(pause is not None and 0 <= pause <= most_s for pause in pauses)
        assert max(pause or 0 for pause in pauses) > most_s / 2
        assert min(pause or 0 for pause in pauses) < most_s / 2


class _Endless:
    """A model that takes a turn of the loop to let go."""

    def __init__(self) -> None:
        self.let_go = False

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        try:
            while True:
                yield TextChunk("x")
        finally:
            await asyncio.sleep(0)
            self.let_go = True


async def test_closing_waits_until_the_model_has_let_go(candidate: Candidate) -> None:
    model = _Endless()
    items = stream_with_retries([Candidate(candidate.entry, model)], asking("x"))
    assert isinstance(await anext(items), AttemptStarted)
    assert isinstance(await anext(items), TextChunk)
    await items.aclose()
    assert model.let_go
