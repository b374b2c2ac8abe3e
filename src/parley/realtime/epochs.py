"""New epochs for all channels: after a restore no position that a client holds means what it meant."""

from uuid import UUID

from parley.core.db import Database

# In the order in which everybody locks heads.
_NEXT = """
    WITH next AS (
        SELECT workspace_id, channel FROM channel_heads
        WHERE (workspace_id, channel) > ($1::uuid, $2::text)
        ORDER BY workspace_id, channel LIMIT $3 FOR UPDATE
    ), changed AS (
        UPDATE channel_heads h SET epoch = substr(md5(gen_random_uuid()::text), 1, 8)
        FROM next n WHERE h.workspace_id = n.workspace_id AND h.channel = n.channel
        RETURNING h.workspace_id, h.channel
    )
    SELECT workspace_id, channel, (SELECT count(*) FROM changed) AS count
    FROM next ORDER BY workspace_id DESC, channel DESC LIMIT 1
"""
_BATCH = 2000


async def new_epochs(database: Database, *, batch: int = _BATCH) -> int:
    """Give every channel a new epoch; return how many there are.

    Each client then gets a state instead of a replay: those that are connected within a second, the others when they
    come back. A transaction per batch: cut off halfway, it is simply done again.
    """
    place: tuple[UUID, str] = (UUID(int=0), "")
    total = 0
    while True:
        async with database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_NEXT, *place, batch)
        if row is None:
            return total
        total += row["count"]
        place = (row["workspace_id"], row["channel"])
