"""What was looked up about credentials, remembered for a while: shared by every kind of them."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from parley.core import clock

BOUND = 10_000


class Recent[K, V](OrderedDict[K, V]):
    """A bounded memory: the entry that was stored longest ago goes first."""

    def remember(self, key: K, value: V) -> None:
        """Store an entry."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > BOUND:
            self.popitem(last=False)


class Standings[K, V]:
    """Look-ups, each made once for all who wait for it, and remembered as long as `cache_s()` says.

    What was forgotten while it was being looked up is not remembered: what was read may be older than the revocation.
    """

    def __init__(self, cache_s: Callable[[], float]) -> None:
        self._cache_s = cache_s
        # With when the look-up began, in seconds since 1970.
        self._known: Recent[K, tuple[V, float]] = Recent()
        self._loading: dict[K, asyncio.Task[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()

    def find(self, key: K) -> V | None:
        """Return what is remembered, or None."""
        entry = self._known.get(key)
        if entry is None or not 0 <= clock.timestamp() - entry[1] < self._cache_s():
            return None
        return entry[0]

    async def load(self, key: K, look_up: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """Look something up; whoever comes meanwhile waits for the same look-up."""
        task = self._loading.get(key)
        if task is None:
            began = clock.timestamp()
            task = asyncio.create_task(look_up())
            self._loading[key] = task
            self._tasks.add(task)
            task.add_done_callback(lambda done: self._loaded(key, done, began))
        # Shielded: one caller's disconnect must not fail the others.
        return await asyncio.shield(task)

    def replace(self, key: K, old: V, new: V) -> None:
        """Remember something else in place of what is remembered, if it still is."""
        entry = self._known.get(key)
        if entry is not None and entry[0] is old:
            self._known[key] = (new, entry[1])

    def forget(self, key: K) -> None:
        """Look it up again at its next use."""
        self._known.pop(key, None)
        self._loading.pop(key, None)

    def forget_where(self, concerns: Callable[[V], bool]) -> None:
        """Look up again what is concerned, and whatever is being looked up: what that is about is not known yet."""
        self._loading.clear()
        for key in [key for key, (value, _) in self._known.items() if concerns(value)]:
            del self._known[key]

    def forget_all(self) -> None:
        """Look everything up again."""
        self._known.clear()
        self._loading.clear()

    async def close(self) -> None:
        """Wait for the look-ups under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __len__(self) -> int:
        return len(self._known)

    def _loaded(self, key: K, task: asyncio.Task[V], began: float) -> None:
        self._tasks.discard(task)
        current = self._loading.get(key) is task
        if current:
            del self._loading[key]
        if not task.cancelled() and task.exception() is None and current:
            self._known.remember(key, (task.result(), began))
