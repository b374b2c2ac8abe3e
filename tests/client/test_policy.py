"""What a client does at the end of a connection: the table of the protocol, row by row."""

import pytest

from parley.client.policy import Ending, backoff_s, next_attempt_s


def always_most() -> float:
    return 1.0


def attempt(code: int, *, failures: int = 0, refused: bool = False, given: float | None = None) -> float | None:
    return next_attempt_s(Ending(code, "", given), failures=failures, refused=refused, random=always_most)


@pytest.mark.parametrize(
    "code",
    [
        1001,
        1005,
        1006,
        1011,
        1012,
        4000,
        4001,
        4002,
        4003,
        4004,
        4100,
        4199,
        4300,
        4408,
        4429,
        408,
        429,
        500,
        503,
    ],
)
def test_codes_after_which_it_connects_again(code: int) -> None:
    assert attempt(code) == 0.5


@pytest.mark.parametrize(
    "code", [1000, 1002, 1003, 1007, 1009, 4400, 4402, 4403, 4406, 4409, 4499, 4500, 400, 401, 403, 404]
)
def test_codes_after_which_it_stops(code: int) -> None:
    assert attempt(code) is None


@pytest.mark.parametrize(("given", "expected"), [(None, 5.5), (1.0, 5.0), (9.0, 9.0)])
def test_an_overloaded_server_is_left_alone_for_five_seconds(given: float | None, expected: float) -> None:
    assert attempt(1013, given=given) == expected
    assert next_attempt_s(Ending(1013), failures=9, refused=False, random=lambda: 0.0) == 5


@pytest.mark.parametrize("code", [*range(4000, 4200), *range(4400, 4500)])
def test_codes_that_nobody_knows_mean_what_their_range_means(code: int) -> None:
    assert (attempt(code) is not None) == (code < 4200 or code in {4401, 4408, 4429})


def test_an_unauthenticated_client_tries_one_new_credential() -> None:
    assert attempt(4401) == 0.5
    assert attempt(4401, refused=True) is None


@pytest.mark.parametrize("code", [1012, 4429, 503])
def test_what_the_server_asks_for_is_done(code: int) -> None:
    assert attempt(code, failures=5, given=7.5) == 7.5


def test_the_delay_grows_and_has_a_bound() -> None:
    assert [backoff_s(n, always_most) for n in range(8)] == [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert backoff_s(10_000, always_most) == 20
    assert backoff_s(3, lambda: 0.25) == 1
