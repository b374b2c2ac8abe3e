"""Bounds many reads in time with one timer."""

import asyncio
from collections.abc import Awaitable, Callable


class ReadDeadline:
    """Gives each read of a stream its own point in time.

    `asyncio.timeout` makes and drops a timer for every read, which is a tenth of the cost of a delta. Here one timer
    lives as long as the stream and, when it fires early, only looks when to fire again. Nothing runs between two
    reads: a consumer that takes its time is never cancelled.
    """

    __slots__ = ("_due_at", "_loop", "_passed", "_task", "_timer", "_timer_at")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._due_at = 0.0
        self._passed = False

    async def read[T](self, read: Callable[[], Awaitable[T]], due_at: float) -> T:
        """Await `read()`. Raises `TimeoutError` when it has not ended at `due_at`, in the time of the loop."""
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._due_at = due_at
        if self._timer is None or due_at < self._timer_at:
            self._arm(due_at)
        self._task = task
        try:
            return await read()
        except asyncio.CancelledError:
            # As asyncio.timeout does it: someone else may have cancelled the task in the same moment.
            if self._passed and task.uncancel() <= cancelling:
                raise TimeoutError from None
            raise
        finally:
            self._task = None

    def close(self) -> None:
        """Drop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at: float) -> None:
        self.close()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._due_at:
            self._arm(self._due_at)
            return
        self._passed = True
        self._task.cancel()
