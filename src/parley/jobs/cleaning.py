"""Removing what has had its time. Each module says what of its own that is."""

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from parley.core.db import Database
from parley.jobs.registry import JobRun, Periodic

logger = logging.getLogger(__name__)

KIND = "cleaning"

_EVERY = timedelta(hours=1)
_TIMEOUT_S = 600.0
_AT_ONCE = 1000
# A backlog of more batches than these goes on in the next hour.
_BATCHES = 500

Clean = Callable[[Database, int], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Cleaner:
    """What a module contributes. `clean` removes at most so many rows, in a transaction of its own, and says how many.

    It is called again until that is fewer.
    """

    name: str
    clean: Clean


class CleaningIncomplete(Exception):
    """Some cleaners failed; the others have done their work."""


class Cleaning:
    """Runs every cleaner, batch by batch, once an hour over all processes."""

    def __init__(self, cleaners: Iterable[Cleaner]) -> None:
        self._cleaners = tuple(cleaners)

    @property
    def periodic(self) -> Periodic:
        """The job that does it."""
        return Periodic(KIND, _EVERY, self.handle, timeout_s=_TIMEOUT_S)

    async def handle(self, run: JobRun) -> dict[str, Any]:
        """Clean. A cleaner that fails does not keep the others from their work; raises `CleaningIncomplete` then."""
        removed: dict[str, int] = {}
        failed: list[str] = []
        for cleaner in self._cleaners:
            try:
                removed[cleaner.name] = await self._run(cleaner, run.database)
            except Exception as error:  # noqa: BLE001 - of any kind: the others have to run
                logger.warning("cleaner failed", extra={"cleaner": cleaner.name, "cause": type(error).__name__})
                failed.append(cleaner.name)
        if failed:
            raise CleaningIncomplete(", ".join(failed))
        return removed

    async def _run(self, cleaner: Cleaner, database: Database) -> int:
        total = 0
        for _ in range(_BATCHES):
            count = await cleaner.clean(database, _AT_ONCE)
            total += count
            if count < _AT_ONCE:
                break
        return total
