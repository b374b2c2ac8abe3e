"""How a provider is doing, as this process sees it, and whether it is asked at all.

A circuit breaker: after several failures in a row a provider is left alone for a while, then asked once, and that one
call decides. A process counts for itself: nothing is shared and nothing is locked.
"""

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Literal

from parley.core import clock
from parley.llm.errors import ModelError

logger = logging.getLogger(__name__)

BreakerState = Literal["closed", "open", "half_open"]

_LONGEST_PAUSE_S = 300
_PROVIDERS = 4096
_TIMES = 128


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """`failures` in a row, none older than `window_s`, open a breaker for `open_s`. No failures: it never opens."""

    failures: int = 5
    window_s: float = 30
    open_s: float = 30


class ProviderHealth:
    """One provider: its breaker, and what an operator wants to know of it. Not thread-safe."""

    __slots__ = (
        "_clock", "_failures", "_limits", "_open_until", "_probe", "_state", "_times", "calls", "errors", "last_error",
        "last_error_at", "name",
    )  # fmt: skip

    def __init__(
        self, name: str, limits: BreakerLimits | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._limits = limits or BreakerLimits()
        self._clock = now
        self._state: BreakerState = "closed"
        self._failures: deque[float] = deque(maxlen=max(1, self._limits.failures))
        self._open_until = 0.0
        self._probe: Watch | None = None
        self._times: deque[float] = deque(maxlen=_TIMES)
        self.calls = 0
        """Attempts that were begun."""
        self.errors: Counter[str] = Counter()
        """Failed attempts, by code."""
        self.last_error: str | None = None
        self.last_error_at: datetime | None = None

    @property
    def state(self) -> BreakerState:
        """Whether it is asked: always, not now, or only by one call that decides."""
        if self._state == "open" and self._clock() >= self._open_until:
            return "half_open"
        return self._state

    @property
    def first_token_p50_s(self) -> float | None:
        """The median time from asking to the first piece of an answer, of the last hundred or so; None before any."""
        return median(self._times) if self._times else None

    def pause_s(self) -> float | None:
        """Return None when it may be asked now, else for how many seconds it is left alone."""
        match self.state:
            case "closed":
                return None
            case "open":
                return self._open_until - self._clock()
            case "half_open":
                return None if self._probe is None else 1.0

    def watch(self) -> "Watch":
        """Begin an attempt. The watch is told how it goes; its `left` is always called at the end."""
        self.calls += 1
        watch = Watch(self, self._clock())
        if self.state == "half_open":
            self._state = "half_open"
            self._probe = watch
        return watch

    def answered(self, watch: "Watch") -> None:
        """Note the first piece of an answer. That a probe gets one is enough to ask again, on probation."""
        self._times.append(self._clock() - watch.began)
        if self._probe is watch:
            self._close(self._limits.failures - 1)

    def ended_well(self, watch: "Watch") -> None:
        """Note a whole answer."""
        self._failures.clear()
        if self._probe is watch:
            self._close(0)

    def ended_badly(self, watch: "Watch", error: ModelError) -> None:
        """Note a failure. Only one that is the provider's and may pass counts against it."""
        self.errors[error.code] += 1
        self.last_error, self.last_error_at = error.code, clock.now()
        probing = self._probe is watch
        if not error.retryable:
            # It has spoken, be it to refuse.
            if probing:
                self._close(0)
            return
        now = self._clock()
        self._failures.append(now)
        if self._limits.failures <= 0 or (self._state != "closed" and not probing):
            return
        full = len(self._failures) == self._limits.failures and now - self._failures[0] <= self._limits.window_s
        if probing or full:
            self._state, self._probe = "open", None
            self._open_until = now + max(self._limits.open_s, min(error.retry_after_s or 0, _LONGEST_PAUSE_S))
            logger.warning("Provider %s is left alone for %d s", self.name, self._open_until - now)

    def let_go(self, watch: "Watch") -> None:
        """Note that an attempt is over, however. A probe that was given up decides nothing: the next one does."""
        if self._probe is watch:
            self._probe = None

    def _close(self, left: int) -> None:
        logger.info("Provider %s is asked again", self.name)
        self._state, self._probe = "closed", None
        self._failures.clear()
        self._failures.extend([self._clock()] * max(0, left))


class Watch:
    """One attempt at a provider."""

    __slots__ = ("_health", "began")

    def __init__(self, health: ProviderHealth, began: float) -> None:
        self._health = health
        self.began = began

    def first_token(self) -> None:
        """Note that something of an answer has come."""
        self._health.answered(self)

    def succeeded(self) -> None:
        """Note that the answer is whole."""
        self._health.ended_well(self)

    def failed(self, error: ModelError) -> None:
        """Note that the attempt failed."""
        self._health.ended_badly(self, error)

    def left(self) -> None:
        """Note that the attempt is over, however it ended."""
        self._health.let_go(self)


class HealthBoard:
    """The health of every provider that this process has asked."""

    def __init__(self, limits: BreakerLimits | None = None) -> None:
        self._limits = limits or BreakerLimits()
        self._known: OrderedDict[tuple[str, object], ProviderHealth] = OrderedDict()

    def of(self, provider: str, owner: object = None) -> ProviderHealth:
        """Return a provider's health. `owner` is whoever's credentials are used, None for the operator's.

        A key that is out of credit, or an address that only one workspace uses, says nothing about the others' calls.
        """
        key = (provider, owner)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = ProviderHealth(provider, self._limits)
            while len(self._known) > _PROVIDERS:
                self._known.popitem(last=False)
        return found

    def pause_s(self, provider: str, owner: object = None) -> float | None:
        """Return for how many seconds a provider is left alone; None when it may be asked."""
        found = self.find(provider, owner)
        return None if found is None else found.pause_s()

    def find(self, provider: str, owner: object = None) -> ProviderHealth | None:
        """Return the health of a provider with these credentials; None before it was asked."""
        return self._known.get((provider, owner))
