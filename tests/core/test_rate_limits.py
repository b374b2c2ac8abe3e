"""Rate limits: in this process, and shared through a real Valkey that comes and goes."""

import asyncio
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from parley.core import rate_limits as module
from parley.core.rate_limits import Limit, RateLimits, TooMany
from tests.valkey import Valkey, run_valkey

THREE = Limit("three", 3, 60)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with run_valkey(tmp_path) as made:
        yield made


async def passes(limits: RateLimits, count: int, *keys: str, limit: Limit = THREE) -> int:
    """Return how many of so many hits pass."""
    passed = 0
    for _ in range(count):
        try:
            await limits.hit(limit, *keys)
        except TooMany:
            continue
        passed += 1
    return passed


async def test_a_limit_counts_per_key_and_says_when_to_come_back() -> None:
    limits = RateLimits()
    left = [room.remaining for _ in range(3) if (room := await limits.hit(THREE, "ada")) is not None]
    assert left == [2, 1, 0]
    with pytest.raises(TooMany) as caught:
        await limits.hit(THREE, "ada")
    assert caught.value.details == {"limit": "three"}
    assert caught.value.retry_after_s is not None
    assert 55 <= caught.value.retry_after_s <= 60
    assert await passes(limits, 5, "bob") == 3
    assert await passes(limits, 5, "ada", "elsewhere") == 3
    assert await passes(limits, 5, "ada", limit=Limit("other", 2, 60)) == 2


async def test_headers_say_what_the_limit_is_and_what_is_left() -> None:
    assert THREE.policy == '"three";q=3;w=60'
    room = await RateLimits().hit(THREE, "ada")
    assert room is not None
    assert room.header == f'"three";r=2;t={room.reset_s}'
    assert 55 <= room.reset_s <= 60


async def test_the_window_slides() -> None:
    limits = RateLimits()
    short = Limit("short", 2, 1)
    assert await passes(limits, 3, "ada", limit=short) == 2
    deadline = time.monotonic() + 5
    while not await passes(limits, 1, "ada", limit=short):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_looking_counts_nothing_and_clearing_forgets() -> None:
    limits = RateLimits()
    await limits.hit(THREE, "ada")
    for _ in range(5):
        room = await limits.peek(THREE, "ada")
        assert room is not None
        assert room.remaining == 2
        await limits.require(THREE, "ada", more_than=1)
        with pytest.raises(TooMany):
            await limits.require(THREE, "ada", more_than=2)
    await limits.hit(THREE, "ada", cost=2)
    with pytest.raises(TooMany):
        await limits.require(THREE, "ada")
    await limits.clear(THREE, "ada")
    assert await passes(limits, 5, "ada") == 3


async def test_switched_off_everything_passes() -> None:
    limits = RateLimits(enabled=False, redis_url="redis://127.0.0.1:1/0")
    assert await passes(limits, 50, "ada") == 50
    assert await limits.peek(THREE, "ada") is None
    await limits.require(THREE, "ada", more_than=100)
    await limits.clear(THREE, "ada")
    await limits.close()


async def test_what_comes_at_once_never_passes_the_limit(valkey: Valkey) -> None:
    for limits in (RateLimits(), RateLimits(redis_url=valkey.url)):
        passed = await asyncio.gather(*(passes(limits, 1, "ada") for _ in range(50)))
        assert sum(passed) == 3
        await limits.close()


async def test_processes_share_one_limit(valkey: Valkey) -> None:
    one, two = RateLimits(redis_url=valkey.url), RateLimits(redis_url=valkey.url)
    assert await passes(one, 2, "ada") == 2
    assert await passes(two, 5, "ada") == 1
    room = await one.peek(THREE, "ada")
    assert room is not None
    assert room.remaining == 0
    await two.clear(THREE, "ada")
    assert await passes(one, 5, "ada") == 3
    # In processes that do not share, each has its own: what the test would see without Valkey.
    assert await passes(RateLimits(), 5, "ada") + await passes(RateLimits(), 5, "ada") == 6
    await one.close()
    await two.close()


async def test_without_valkey_this_process_counts_says_so_and_goes_back(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    # In the module alone: the event loop keeps the real one.
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    one, two = RateLimits(redis_url=valkey.url), RateLimits(redis_url=valkey.url)
    assert await passes(one, 5, "ada") == 3
    valkey.kill()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        # Never unlimited: each for itself now.
        assert await passes(one, 5, "ada") == 3
        assert await passes(two, 5, "ada") == 3
        assert (await two.peek(THREE, "ada")) is not None
        await two.clear(THREE, "bob")
    assert len(caplog.records) == 2
    assert "Redis is away" in caplog.text
    assert valkey.url not in caplog.text
    valkey.start()
    # It is not asked again at every request.
    assert await passes(two, 1, "ada") == 0
    now[0] += 6
    assert await passes(one, 2, "ada") == 2
    assert await passes(two, 5, "ada") == 1
    await one.close()
    await two.close()


async def test_a_valkey_that_does_not_answer_costs_a_second_and_no_more(valkey: Valkey) -> None:
    limits = RateLimits(redis_url=valkey.url)
    assert await passes(limits, 1, "ada") == 1
    assert valkey.process is not None
    valkey.process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(4):
        assert await passes(limits, 9, "ada") == 3
    valkey.process.send_signal(signal.SIGCONT)
    await limits.close()


async def test_the_window_begins_with_the_first_hit() -> None:
    """One that follows the clock lets twice the limit pass at its edge."""
    limits = RateLimits()
    await limits.hit(THREE, "ada")
    room = await limits.peek(THREE, "ada")
    assert room is not None
    assert math.isclose(room.reset_s, 60, abs_tol=1)
