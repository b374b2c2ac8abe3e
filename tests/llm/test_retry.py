import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.llm import retry
from parley.llm.breaker import BreakerLimits, ProviderHealth
from parley.llm.errors import ContentFiltered, ContextTooLong, ModelError, ProviderUnavailable
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


@pytest.fixture
def able(provider: FakeProvider, http: httpx.AsyncClient) -> Candidate:
    """A model that goes on from a given beginning."""
    entry = entry_for("openai", provider, id="able", retries=1, prefill="prefix")
    return Candidate(entry, build_model(entry, http))


@pytest.fixture
def other(provider: FakeProvider, http: httpx.AsyncClient) -> Candidate:
    """A model that can only begin anew."""
    entry = entry_for("anthropic", provider, id="other", retries=1)
    return Candidate(entry, build_model(entry, http))


def begun(items: list[object]) -> list[AttemptStarted]:
    return [item for item in items if isinstance(item, AttemptStarted)]


async def run_resetting(*candidates: Candidate, text: str, **fields: Any) -> tuple[list[object], ModelError | None]:
    items: list[object] = []
    try:
        async for item in stream_with_retries(candidates, asking(text, **fields), resets=True, backoff_base_s=0.001):
            items.append(item)  # noqa: PERF401  the items before a failure count
    except ModelError as error:
        return items, error
    return items, None


CUTS = ["die_at:3", "end_at:3", "error_event_at:3", "garbage:3", "stall_at:3"]


@pytest.fixture
def hasty(provider: FakeProvider, http: httpx.AsyncClient) -> Candidate:
    """A model that is not waited for."""
    entry = entry_for("openai", provider, id="hasty", retries=1, timeouts={"idle": 0.2})
    return Candidate(entry, build_model(entry, http))


@pytest.mark.parametrize("fault", CUTS)
async def test_a_model_that_can_goes_on_from_an_answer_that_was_cut(
    hasty: Candidate, able: Candidate, provider: FakeProvider, fault: str
) -> None:
    items, error = await run(hasty, able, text=f"deltas=9 fail={fault} fail_first=1")
    assert error is None
    assert text_of(items) == "".join(script(1, 9, 4))
    second = begun(items)[1]
    assert (second.strategy, second.after_text, second.continues) == ("fallback", True, True)
    assert second.failed in {"provider_unavailable", "provider_timeout", "bad_output"}
    assert len(provider.requests) == 2
    given = provider.requests[1].body["messages"][-1]
    assert (given["role"], given["content"]) == ("assistant", "".join(script(1, 9, 4)[:3]))


@pytest.mark.parametrize("fault", CUTS)
async def test_another_model_begins_anew_for_a_reader_that_takes_text_back(
    hasty: Candidate, other: Candidate, fault: str
) -> None:
    items, error = await run_resetting(hasty, other, text=f"deltas=9 fail={fault} fail_first=1")
    assert error is None
    first, second = begun(items)
    assert (first.strategy, first.after_text, first.failed) == ("first", False, None)
    assert (second.strategy, second.after_text, second.continues) == ("fallback", True, False)
    assert text_of(items[: items.index(second)]) == "".join(script(1, 9, 4)[:3])
    assert text_of(items[items.index(second) :]) == "".join(script(1, 9, 4))


async def test_reasoning_alone_is_no_beginning(hasty: Candidate, able: Candidate) -> None:
    text = "reasoning=3 deltas=4 fail=die_at:2 fail_first=1"
    _, error = await run(hasty, able, text=text)
    assert error is not None
    items, error = await run_resetting(hasty, able, text=text + " again")
    assert error is None
    assert [one.continues for one in begun(items)] == [False, False]
    assert text_of(items) == "".join(script(1, 4, 4))


async def test_the_one_that_continues_may_be_cut_too(
    hasty: Candidate, able: Candidate, other: Candidate, http: httpx.AsyncClient, provider: FakeProvider
) -> None:
    entry = entry_for("openai", provider, id="able-too", retries=0, prefill="plain")
    second = Candidate(entry, build_model(entry, http))
    items, error = await run(hasty, other, able, second, text="deltas=9 fail=die_at:3 fail_first=2")
    assert error is None
    assert [one.model_id for one in begun(items)] == ["hasty", "able", "able-too"], "one that cannot is passed over"
    assert text_of(items) == "".join(script(1, 9, 4))


async def test_a_beginning_that_was_given_comes_before_what_was_said(
    able: Candidate, hasty: Candidate, provider: FakeProvider, http: httpx.AsyncClient
) -> None:
    entry = entry_for("openai", provider, id="able-too", retries=0, prefill="plain")
    second = Candidate(entry, build_model(entry, http))
    whole = "".join(script(1, 9, 4))
    text = "deltas=9 fail=die_at:3 fail_first=1"
    items, error = await run_resetting(able, hasty, second, text=text, prefill=whole[:4])
    assert error is None
    # One that would begin anew says what the beginning has said already: it is not asked.
    assert [one.model_id for one in begun(items)] == ["able", "able-too"]
    assert whole[:4] + text_of(items) == whole


@pytest.mark.parametrize("fault", ["429", "500", "401", "stall_at:0"])
async def test_without_a_successor_the_error_is_that_of_what_was_seen(
    hasty: Candidate, nowhere: Candidate, fault: str, http: httpx.AsyncClient, provider: FakeProvider
) -> None:
    """The fallback fails before its first word, with another error: nobody was shown anything of it."""
    text = "deltas=9 fail=garbage:3 fail_first=1"
    items, error = await run_resetting(hasty, nowhere, text=text)
    assert error is not None
    assert error.code == "bad_output"
    assert [one.model_id for one in begun(items)] == ["hasty", "nowhere"]
    assert text_of(items) == "".join(script(1, 9, 4)[:3])


async def test_a_filter_that_cuts_an_answer_is_not_evaded(
    candidate: Candidate, able: Candidate, provider: FakeProvider
) -> None:
    class Filtered:
        async def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
            yield TextChunk("some")
            raise ContentFiltered

    items, error = await run_resetting(Candidate(candidate.entry, Filtered()), able, text="deltas=9")
    assert error is not None
    assert error.code == "content_filtered"
    assert not provider.requests
    assert text_of(items) == "some"


async def test_what_cannot_pass_does_not_fall_back_after_text(
    candidate: Candidate, able: Candidate, provider: FakeProvider
) -> None:
    class Refusing:
        async def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
            yield TextChunk("some")
            raise ContextTooLong

    _, error = await run_resetting(Candidate(candidate.entry, Refusing()), able, text="deltas=9")
    assert error is not None
    assert error.code == "context_too_long"
    assert not provider.requests


async def test_no_retry_begins_after_the_time_for_retries(candidate: Candidate, provider: FakeProvider) -> None:
    with pytest.raises(ModelError):
        async for _ in stream_with_retries([candidate], asking("fail=500"), backoff_base_s=0.001, retry_within_s=-1):
            pass
    assert len(provider.requests) == 1


async def test_the_time_for_retries_does_not_keep_a_fallback_away(candidate: Candidate, other: Candidate) -> None:
    items: list[object] = [
        item
        async for item in stream_with_retries(
            [candidate, other], asking("deltas=4 fail=500 fail_first=1"), retry_within_s=-1
        )
    ]
    assert attempts(items) == [("openai", 1), ("other", 2)]
    assert text_of(items) == "".join(script(1, 4, 4))


async def test_a_provider_that_failed_repeatedly_is_passed_over(
    candidate: Candidate, other: Candidate, provider: FakeProvider
) -> None:
    health = ProviderHealth("openai", BreakerLimits(failures=2))
    broken = replace(candidate, health=health)
    _, error = await run(broken, text="fail=500")
    assert error is not None
    assert len(provider.requests) == 2, "the breaker opens between two attempts of one call"
    items, error = await run(broken, other, text="deltas=4")
    assert error is None
    assert attempts(items) == [("other", 1)]
    assert begun(items)[0].strategy == "first"
    _, error = await run(broken, text="deltas=4")
    assert error is not None
    assert (error.code, error.retryable) == ("provider_unavailable", True)
    assert error.retry_after_s is not None
    assert 25 <= error.retry_after_s <= 30
    assert len(provider.requests) == 3


async def test_of_two_calls_at_once_one_decides_after_a_pause(candidate: Candidate, provider: FakeProvider) -> None:
    health = ProviderHealth("openai", BreakerLimits(failures=1, open_s=0))
    health.watch().failed(ProviderUnavailable())
    one = stream_with_retries([replace(candidate, health=health)], asking("deltas=3 ttft=0.2"))
    two = stream_with_retries([replace(candidate, health=health)], asking("deltas=3"))
    assert isinstance(await anext(one), AttemptStarted)
    with pytest.raises(ProviderUnavailable, match="left alone"):
        await anext(two)
    await one.aclose()
    # It was given up before it knew: the next call decides.
    items = [item async for item in stream_with_retries([replace(candidate, health=health)], asking("deltas=3"))]
    assert text_of(items) == "".join(script(1, 3, 4))
    assert health.state == "closed"
    assert len(provider.requests) == 1
