from typing import Any

import pytest

from parley.llm.breaker import BreakerLimits, HealthBoard, ProviderHealth, Watch
from parley.llm.errors import (
    BadOutput,
    ContentFiltered,
    ContextTooLong,
    ModelError,
    ProviderAuthFailed,
    ProviderRateLimited,
    ProviderTimedOut,
    ProviderUnavailable,
    RequestRefused,
)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> ProviderHealth:
    return ProviderHealth("acme", BreakerLimits(failures=3, window_s=30, open_s=30), now=clock)


def fail(health: ProviderHealth, error: ModelError | None = None, times: int = 1) -> None:
    for _ in range(times):
        watch = health.watch()
        watch.failed(error or ProviderUnavailable())
        watch.left()


def succeed(health: ProviderHealth) -> None:
    watch = health.watch()
    watch.first_token()
    watch.succeeded()
    watch.left()


def test_so_many_failures_in_a_row_open_it(health: ProviderHealth, clock: Clock) -> None:
    fail(health, times=2)
    assert (health.state, health.pause_s()) == ("closed", None)
    fail(health)
    assert (health.state, health.pause_s()) == ("open", 30)
    clock.now += 29
    assert health.pause_s() == 1


def test_a_whole_answer_between_them_starts_the_count_anew(health: ProviderHealth) -> None:
    fail(health, times=2)
    succeed(health)
    fail(health, times=2)
    assert health.state == "closed"


def test_an_answer_that_is_cut_again_and_again_counts(health: ProviderHealth) -> None:
    for _ in range(3):
        watch = health.watch()
        watch.first_token()
        watch.failed(ProviderUnavailable())
        watch.left()
    assert health.state == "open"


def test_failures_that_lie_far_apart_do_not_open_it(health: ProviderHealth, clock: Clock) -> None:
    for _ in range(9):
        fail(health)
        clock.now += 16
    assert health.state == "closed"


@pytest.mark.parametrize(
    "error",
    [
        ContextTooLong(), ContentFiltered(), RequestRefused(), ProviderAuthFailed(),
        ProviderRateLimited(retryable=False),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_is_not_the_providers_passing_fault_never_counts(health: ProviderHealth, error: ModelError) -> None:
    fail(health, error, times=20)
    assert health.state == "closed"
    # It is shown all the same.
    assert (health.last_error, health.errors[error.code]) == (error.code, 20)
    assert health.last_error_at is not None


@pytest.mark.parametrize("error", [BadOutput(), ProviderTimedOut(), ProviderRateLimited()], ids=lambda e: e.code)
def test_every_passing_fault_of_the_provider_counts(health: ProviderHealth, error: ModelError) -> None:
    fail(health, error, times=3)
    assert health.state == "open"


def half_open(health: ProviderHealth, clock: Clock) -> Watch:
    """Open it, wait, and begin the call that decides."""
    fail(health, times=3)
    clock.now += 30
    assert (health.state, health.pause_s()) == ("half_open", None)
    return health.watch()


def test_after_the_pause_one_call_decides(health: ProviderHealth, clock: Clock) -> None:
    probe = half_open(health, clock)
    assert health.pause_s() == 1, "the others wait for it"
    probe.failed(ProviderTimedOut())
    probe.left()
    assert (health.state, health.pause_s()) == ("open", 30)
    clock.now += 30
    probe = health.watch()
    probe.first_token()
    assert (health.state, health.pause_s()) == ("closed", None), "a word is enough to let the others go"
    probe.succeeded()
    probe.left()
    fail(health, times=2)
    assert health.state == "closed"


def test_a_probe_that_is_cut_after_its_first_word_opens_it_again(health: ProviderHealth, clock: Clock) -> None:
    probe = half_open(health, clock)
    probe.first_token()
    probe.failed(ProviderUnavailable())
    probe.left()
    assert health.state == "open"


def test_a_probe_that_is_given_up_leaves_the_decision_to_the_next(health: ProviderHealth, clock: Clock) -> None:
    probe = half_open(health, clock)
    probe.left()
    assert (health.state, health.pause_s()) == ("half_open", None)
    succeed(health)
    assert health.state == "closed"


def test_a_refused_key_shows_that_somebody_is_there(health: ProviderHealth, clock: Clock) -> None:
    probe = half_open(health, clock)
    probe.failed(ProviderAuthFailed())
    probe.left()
    assert health.state == "closed"


def test_a_call_from_before_does_not_reopen_it_nor_close_it(health: ProviderHealth, clock: Clock) -> None:
    late, later = health.watch(), health.watch()
    fail(health, times=3)
    clock.now += 10
    late.failed(ProviderUnavailable())
    late.left()
    assert health.pause_s() == 20, "the pause is not longer for it"
    later.first_token()
    later.succeeded()
    later.left()
    assert health.state == "open"


def test_a_provider_that_names_its_pause_is_given_it(health: ProviderHealth) -> None:
    fail(health, ProviderRateLimited(retry_after_s=90), times=3)
    assert health.pause_s() == 90
    stubborn = ProviderHealth("acme", BreakerLimits(failures=1))
    fail(stubborn, ProviderRateLimited(retry_after_s=86_000))
    assert (stubborn.pause_s() or 0) <= 300


def test_without_a_number_it_never_opens() -> None:
    health = ProviderHealth("acme", BreakerLimits(failures=0))
    fail(health, times=50)
    assert health.state == "closed"


def test_the_median_of_the_times_to_the_first_word(health: ProviderHealth, clock: Clock) -> None:
    assert health.first_token_p50_s is None
    for after_s in (0.1, 5.0, 0.3):
        watch = health.watch()
        clock.now += after_s
        watch.first_token()
        watch.left()
    assert health.first_token_p50_s == pytest.approx(0.3)
    assert health.calls == 3


def test_each_owner_of_credentials_has_a_breaker_of_his_own() -> None:
    board = HealthBoard(BreakerLimits(failures=1))
    owner: Any = object()
    fail(board.of("acme", owner))
    assert board.of("acme", owner).state == "open"
    assert board.of("acme").state == "closed"
    assert board.of("acme") is board.of("acme") is board.find("acme")
    assert board.find("nobody") is None


def test_the_board_is_bounded() -> None:
    board = HealthBoard()
    first = board.of("acme", 0)
    for owner in range(1, 5000):
        board.of("acme", owner)
    assert board.of("acme", 0) is not first
