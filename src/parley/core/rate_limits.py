"""Rate limits: how many in how long, counted in this process or in Redis.

Windows slide. Without Redis, and while it is away, each process counts for itself: a limit is then as many times higher
as there are processes, and never unlimited.
"""

import logging
import math
import time
from dataclasses import dataclass
from typing import Final, Protocol

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter as SharedWindow
from limits.errors import StorageError
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from redis.asyncio import ConnectionPool

from parley.core.errors import RateLimited

logger = logging.getLogger(__name__)

_RETRY_REDIS_S = 5.0


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `count` in any `per_s` seconds. `name` tells it from others, also to clients."""

    name: str
    count: int
    per_s: int

    @property
    def policy(self) -> str:
        """The limit as the `RateLimit-Policy` header writes it."""
        return f'"{self.name}";q={self.count};w={self.per_s}'


@dataclass(frozen=True, slots=True)
class Room:
    """What is left of a limit, and in how many seconds it is whole again."""

    limit: Limit
    remaining: int
    reset_s: int

    @property
    def header(self) -> str:
        """What is left as the `RateLimit` header writes it."""
        return f'"{self.limit.name}";r={self.remaining};t={self.reset_s}'


class TooMany(RateLimited):
    """Over a limit. `limit` says which."""

    def __init__(self, limit: Limit, *, retry_after_s: int) -> None:
        super().__init__(details={"limit": limit.name}, retry_after_s=retry_after_s)
        self.limit = limit


class _Counter(Protocol):
    async def hit(self, item: RateLimitItem, *keys: str, cost: int = 1) -> bool: ...
    async def stats(self, item: RateLimitItem, *keys: str) -> tuple[float, int]: ...
    async def clear(self, item: RateLimitItem, *keys: str) -> None: ...


class _InProcess:
    def __init__(self) -> None:
        self._window = MovingWindowRateLimiter(MemoryStorage())

    async def hit(self, item: RateLimitItem, *keys: str, cost: int = 1) -> bool:
        return self._window.hit(item, *keys, cost=cost)

    async def stats(self, item: RateLimitItem, *keys: str) -> tuple[float, int]:
        found = self._window.get_window_stats(item, *keys)
        return found.reset_time, found.remaining

    async def clear(self, item: RateLimitItem, *keys: str) -> None:
        self._window.clear(item, *keys)


class _Shared:
    def __init__(self, url: str) -> None:
        # Our own pool: to be closed, and not to be waited for.
        self._pool: ConnectionPool = ConnectionPool.from_url(url, socket_timeout=1, socket_connect_timeout=1)
        storage = RedisStorage(
            f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="parley:limits",
            connection_pool=self._pool,  # type: ignore[arg-type]  # passed on to the client as it is
        )
        self._window = SharedWindow(storage)

    async def hit(self, item: RateLimitItem, *keys: str, cost: int = 1) -> bool:
        return await self._window.hit(item, *keys, cost=cost)

    async def stats(self, item: RateLimitItem, *keys: str) -> tuple[float, int]:
        found = await self._window.get_window_stats(item, *keys)
        return found.reset_time, found.remaining

    async def clear(self, item: RateLimitItem, *keys: str) -> None:
        await self._window.clear(item, *keys)

    async def close(self) -> None:
        await self._pool.aclose()


_NO_ROOM_NEEDED: Final = 0


class RateLimits:
    """Counts. Switched off (`PARLEY_RATE_LIMITS=off`), it lets everything pass."""

    def __init__(self, *, enabled: bool = True, redis_url: str | None = None) -> None:
        self.enabled = enabled
        self._own = _InProcess()
        self._shared = _Shared(redis_url) if redis_url and enabled else None
        self._shared_again_at = 0.0
        self._items: dict[Limit, RateLimitItem] = {}

    async def hit(self, limit: Limit, *keys: str, cost: int = 1) -> Room | None:
        """Count one more, and return what is left; None when limits are off. Raises `TooMany`."""
        if not self.enabled:
            return None
        item = self._item(limit)
        counter = self._counter()
        try:
            passed = await counter.hit(item, *keys, cost=cost)
            reset_at, remaining = await counter.stats(item, *keys)
        except (StorageError, OSError, TimeoutError) as error:
            self._lost(error)
            passed = await self._own.hit(item, *keys, cost=cost)
            reset_at, remaining = await self._own.stats(item, *keys)
        reset_s = max(1, math.ceil(reset_at - time.time()))
        if not passed:
            raise TooMany(limit, retry_after_s=reset_s)
        return Room(limit, max(0, remaining), reset_s)

    async def peek(self, limit: Limit, *keys: str) -> Room | None:
        """Return what is left, and count nothing; None when limits are off."""
        if not self.enabled:
            return None
        item = self._item(limit)
        try:
            reset_at, remaining = await self._counter().stats(item, *keys)
        except (StorageError, OSError, TimeoutError) as error:
            self._lost(error)
            reset_at, remaining = await self._own.stats(item, *keys)
        return Room(limit, max(0, remaining), max(1, math.ceil(reset_at - time.time())))

    async def require(self, limit: Limit, *keys: str, more_than: int = _NO_ROOM_NEEDED) -> None:
        """Raise `TooMany` unless there is more room than that. Counts nothing."""
        room = await self.peek(limit, *keys)
        if room is not None and room.remaining <= more_than:
            raise TooMany(limit, retry_after_s=room.reset_s)

    async def clear(self, limit: Limit, *keys: str) -> None:
        """Forget what was counted."""
        if not self.enabled:
            return
        item = self._item(limit)
        await self._own.clear(item, *keys)
        if self._shared is not None:
            try:
                await self._counter().clear(item, *keys)
            except (StorageError, OSError, TimeoutError) as error:
                self._lost(error)

    async def close(self) -> None:
        """Close the connection to Redis."""
        if self._shared is not None:
            await self._shared.close()

    def _item(self, limit: Limit) -> RateLimitItem:
        item = self._items.get(limit)
        if item is None:
            item = self._items[limit] = RateLimitItemPerSecond(limit.count, limit.per_s, namespace=limit.name)
        return item

    def _counter(self) -> _Counter:
        if self._shared is None or time.monotonic() < self._shared_again_at:
            return self._own
        return self._shared

    def _lost(self, error: Exception) -> None:
        """Count in this process for a while."""
        self._shared_again_at = time.monotonic() + _RETRY_REDIS_S
        logger.warning("Redis is away: limits are counted in this process", extra={"cause": type(error).__name__})
