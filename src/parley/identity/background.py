"""What identity has to have done in the background: removing what has had its time."""

from datetime import timedelta
from functools import partial

from parley.core import clock
from parley.core.db import Database
from parley.jobs.cleaning import Cleaner

# Table → its key, what of it has had its time, and how long ago that must be.
_SPENT: dict[str, tuple[str, str, timedelta]] = {
    "one_time_tokens": ("id", "expires_at", timedelta(0)),
    # The file goes with its link; the row counts for a day.
    "exports": ("id", "expires_at", timedelta(days=1)),
    # Longer than their sender repeats a delivery.
    "webhook_events": ("source, event_id", "received_at", timedelta(days=7)),
    # An ended session is in the list of sessions for a while.
    "sessions": (
        "id",
        "least(coalesce(revoked_at, 'infinity'), idle_expires_at, absolute_expires_at)",
        timedelta(days=30),
    ),
}


async def clean_table(database: Database, limit: int, *, table: str) -> int:
    """Remove at most `limit` rows of a table that have had their time; return how many."""
    key, moment, kept = _SPENT[table]
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        status: str = await connection.execute(
            f"DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} WHERE {moment} < $1 LIMIT $2)",  # noqa: S608 - the names stand above
            clock.now() - kept,
            limit,
        )
    return int(status.rpartition(" ")[2])


def cleaners() -> list[Cleaner]:
    """Return what removes identity's rows that have had their time."""
    return [Cleaner(table, partial(clean_table, table=table)) for table in _SPENT]
