"""What the outbox itself has to have done: forgetting jobs that ended long ago."""

from datetime import timedelta
from functools import partial

from parley.core import clock
from parley.core.db import Database
from parley.core.settings import JobSettings
from parley.jobs.cleaning import Cleaner
from parley.jobs.queue import forget_finished


async def clean_jobs(database: Database, limit: int, *, keep_days: int) -> int:
    """Remove at most `limit` jobs that ended longer ago; return how many."""
    async with database.system_unit_of_work() as unit:
        return await forget_finished(unit, clock.now() - timedelta(days=keep_days), limit=limit)


def cleaners(settings: JobSettings) -> list[Cleaner]:
    """Return the cleaner of the outbox."""
    return [Cleaner("jobs", partial(clean_jobs, keep_days=settings.keep_days))]
