"""The log in PostgreSQL: appending inside a transaction, reading back, heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from uuid import UUID

import orjson

from parley.core.db import Database, UnitOfWork
from parley.core.scope import Scope
from parley.realtime.events import Channel, LoggedEvent, NewEvent, timestamp_ms

_APPEND = "SELECT ord, seq, epoch, at FROM realtime_append($1, $2, $3, $4, $5)"
_APPEND_FOR = "SELECT ord, seq, epoch, at FROM realtime_append_for($6, $1, $2, $3, $4, $5)"
# A page is bounded by bytes too, but for its first event.
_READ = """
    SELECT seq, e, d, at FROM (
        SELECT seq, e, d::text AS d, at,
               sum(octet_length(d::text)) OVER (ORDER BY seq) - octet_length(d::text) AS before
        FROM channel_events WHERE workspace_id = $1 AND channel = $2 AND seq > $3 ORDER BY seq LIMIT $4
    ) page WHERE before < $5 ORDER BY seq
"""
_SIZE = """
    SELECT coalesce(sum(octet_length(d::text)), 0) FROM channel_events
    WHERE workspace_id = $1 AND channel = $2 AND seq > $3
"""
_PAGE_BYTES = 256 * 1024
_HEAD = "SELECT seq, floor, epoch FROM channel_heads WHERE workspace_id = $1 AND channel = $2"
_MAKE_HEAD = """
    INSERT INTO channel_heads (workspace_id, channel, owner_id, seq) VALUES ($1, $2, $3, 0)
    ON CONFLICT (workspace_id, channel) DO NOTHING
"""


_FORGET = tuple(
    f"DELETE FROM {table} WHERE workspace_id = $1 AND channel = $2"  # noqa: S608 - the names stand here
    for table in ("channel_heads", "channel_events", "replies")
)


@dataclass(frozen=True, slots=True)
class Head:
    """Where a channel stands: events `floor + 1 .. seq` can be read."""

    seq: int
    floor: int
    epoch: str


class Publisher(Protocol):
    """Whoever hands committed events on."""

    def publish(self, address: tuple[UUID, str], events: Sequence[LoggedEvent]) -> None:
        """Take events of a channel whose transaction has committed."""
        ...


async def append(
    unit: UnitOfWork, publisher: Publisher, events: Sequence[NewEvent], *, as_user: UUID | None = None
) -> list[int]:
    """Append events in the unit's transaction; they are published right after its commit, never before.

    All of a transaction's events go through one call, which locks the heads in one order. `as_user`: whose inbox is
    among the channels, where it is not that of the unit's user. Returns their `seq`s.
    """
    connection = await unit.driver()
    data = [orjson.dumps(event.d, default=str).decode() for event in events]
    rows = await connection.fetch(
        _APPEND if as_user is None else _APPEND_FOR,
        events[0].channel.workspace_id,
        [event.channel.key for event in events],
        [event.channel.owner_id for event in events],
        [event.e for event in events],
        data,
        *(() if as_user is None else (as_user,)),
    )
    for event, text, row in zip(events, data, rows, strict=True):
        logged = LoggedEvent(row["seq"], event.e, text, timestamp_ms(row["at"]))
        unit.after_commit(partial(publisher.publish, event.channel.address, [logged]))
    return [row["seq"] for row in rows]


async def head_of(unit: UnitOfWork, channel: Channel) -> Head:
    """Return the channel's head, made if the channel never had an event."""
    connection = await unit.driver()
    row = await connection.fetchrow(_HEAD, *channel.address)
    if row is None:
        await connection.execute(_MAKE_HEAD, *channel.address, channel.owner_id)
        row = await connection.fetchrow(_HEAD, *channel.address)
    return Head(row["seq"], row["floor"], row["epoch"])


async def read_range(
    unit: UnitOfWork, channel: Channel, *, after: int, limit: int, max_bytes: int = _PAGE_BYTES
) -> list[LoggedEvent]:
    """Return the events after a position, oldest first."""
    connection = await unit.driver()
    rows = await connection.fetch(_READ, *channel.address, after, limit, max_bytes)
    return [LoggedEvent(row["seq"], row["e"], row["d"], timestamp_ms(row["at"])) for row in rows]


async def forget_channel(unit: UnitOfWork, channel: Channel) -> None:
    """Remove a channel's events, its head and its run records: what is deleted is gone from the log too."""
    connection = await unit.driver()
    for statement in _FORGET:
        await connection.execute(statement, *channel.address)


class LogReader:
    """Reads a channel's log as a scope, for a cursor that the ring no longer covers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(
        self, scope: Scope, channel: Channel, *, after: int, limit: int, max_bytes: int = _PAGE_BYTES
    ) -> list[LoggedEvent]:
        """Return the events after a position, oldest first: a page bounded in number and in bytes."""
        async with self._database.unit_of_work(scope) as unit:
            return await read_range(unit, channel, after=after, limit=limit, max_bytes=max_bytes)

    async def size(self, scope: Scope, channel: Channel, *, after: int) -> int:
        """Return how many bytes of data the events after a position hold."""
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            return int(await connection.fetchval(_SIZE, *channel.address, after))
