"""What attachments have to have done: removing what nobody uses, and objects whose attachment is gone."""

from datetime import timedelta
from functools import partial
from typing import Final

from parley.chat.attachments.stores import BucketStore
from parley.core import clock
from parley.core.db import Database
from parley.jobs.cleaning import Cleaner

_UNUSED: Final = timedelta(days=1)
# An upload writes its object's row, the object, and then completes: never slower than this.
_SETTLED: Final = timedelta(hours=1)
_AT_ONCE: Final = 200

_CLEAN = """
    WITH old AS (
        SELECT workspace_id, id FROM attachments WHERE conversation_id IS NULL AND created_at < $1 LIMIT $2
    ), gone AS (
        DELETE FROM attachments a USING old
        WHERE a.workspace_id = old.workspace_id AND a.id = old.id AND a.conversation_id IS NULL RETURNING 1
    )
    SELECT count(*) FROM gone
"""
_STRAY = """
    SELECT o.workspace_id, o.id FROM stored_objects o
    WHERE o.created_at < $1 AND NOT EXISTS (
        SELECT 1 FROM attachments a WHERE a.workspace_id = o.workspace_id AND a.id = o.id)
    LIMIT $2
"""
_FORGET = "DELETE FROM stored_objects WHERE workspace_id = $1 AND id = $2"


async def clean_unused(database: Database, limit: int) -> int:
    """Remove uploads that no message has after a day, at most so many; return how many."""
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        removed: int = await connection.fetchval(_CLEAN, clock.now() - _UNUSED, min(limit, _AT_ONCE))
    # Fewer than were asked for means done: what is left goes on in the next call.
    return limit if removed == min(limit, _AT_ONCE) else removed


async def clean_objects(database: Database, limit: int, *, store: BucketStore | None) -> int:
    """Remove objects whose attachment is gone, however it went; return how many.

    The object goes first: a row without one is harmless, an object without its row would never be found.
    """
    if store is None:
        return 0
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        rows = await connection.fetch(_STRAY, clock.now() - _SETTLED, min(limit, _AT_ONCE))
    for row in rows:
        await store.remove(row["workspace_id"], row["id"])
        async with database.system_unit_of_work() as unit:
            connection = await unit.driver()
            await connection.execute(_FORGET, row["workspace_id"], row["id"])
    return limit if len(rows) == min(limit, _AT_ONCE) else len(rows)


def cleaners(store: BucketStore | None) -> list[Cleaner]:
    """Return the cleaners of attachments."""
    return [Cleaner("attachments", clean_unused), Cleaner("stored_objects", partial(clean_objects, store=store))]
