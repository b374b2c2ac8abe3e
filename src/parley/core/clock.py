"""The time. Code asks here and never the standard library, so that tests can move it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

_source: Callable[[], float] = time.time


def timestamp() -> float:
    """Return seconds since 1970."""
    return _source()


def now() -> datetime:
    """Return the current time, aware, in UTC."""
    return datetime.fromtimestamp(_source(), tz=UTC)


def milliseconds() -> int:
    """Return whole milliseconds since 1970: the `ts` of a frame."""
    return int(_source() * 1000)


def _shifted(source: Callable[[], float], seconds: float) -> float:
    return source() + seconds


@contextmanager
def shifted(seconds: float) -> Iterator[None]:
    """Move the clock by `seconds` for the length of the block. Meant for tests."""
    global _source
    before = _source
    _source = partial(_shifted, before, seconds)
    try:
        yield
    finally:
        _source = before
