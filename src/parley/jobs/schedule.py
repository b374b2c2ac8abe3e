"""Work that comes back: one job per period, whichever process is first."""

from collections.abc import Iterable

from parley.core import clock
from parley.core.db import Database
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobType, Periodic

_ATTEMPTS = 3


class Schedule:
    """The periodic jobs. Periods are counted from 1970, so every process means the same ones."""

    def __init__(self, database: Database, periodic: Iterable[Periodic]) -> None:
        self._database = database
        self._periodic = tuple(periodic)
        # What this process has seen to: it need not ask again before the next period.
        self._seen: dict[str, int] = {}

    @property
    def types(self) -> list[JobType]:
        """The kinds of the periodic jobs, for the registry. Nobody's inbox shows them."""
        return [
            JobType(one.kind, one.handle, timeout_s=one.timeout_s, max_attempts=_ATTEMPTS, shown=False)
            for one in self._periodic
        ]

    async def enqueue_due(self) -> None:
        """Add the job of each period that has begun; its dedupe key says that it is there already."""
        now = clock.timestamp()
        due = {one.kind: int(now // one.every.total_seconds()) for one in self._periodic}
        due = {kind: period for kind, period in due.items() if self._seen.get(kind) != period}
        if not due:
            return
        async with self._database.system_unit_of_work() as unit:
            for kind, period in due.items():
                await enqueue(unit, kind, {}, dedupe_key=str(period), max_attempts=_ATTEMPTS)
        self._seen |= due
