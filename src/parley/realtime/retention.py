"""Removing from the log what has had its time, and raising the floor past it.

Every list of work is an index that a removed event leaves, so that a run costs what it removes and not what is kept.
"""

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from parley.core.db import Database
from parley.core.settings import RealtimeSettings

logger = logging.getLogger(__name__)

KIND = "retention"
EVERY = timedelta(minutes=1)
TIMEOUT_S = 120.0

# What one transaction removes at most: a channel's writers wait for it.
_BATCH = 2000
_PAGE = 2000
# A backlog goes on in the next minute.
_RUN_S = 50.0
# Far less than the second after which PostgreSQL looks for deadlocks: who trims is the one to give way.
_LOCK_MS = 300
_THOUSAND = 1000

# Looked up one by one, whatever the planner thinks of it: there may be a million channels.
_HEAD = """
    CROSS JOIN LATERAL (
        SELECT c.workspace_id, c.channel, c.epoch, c.floor, c.seq FROM channel_heads c
        WHERE c.workspace_id = d.workspace_id AND c.channel = d.channel LIMIT 1
    ) h
"""
# An open reply is folded from its events, and its turn is read back from the question on, which stands right before the
# reply: both stay.
_OPEN = """
    LEFT JOIN LATERAL (
        SELECT min(r.start_seq) - 2 AS seq FROM replies r
        WHERE r.workspace_id = h.workspace_id AND r.channel = h.channel AND r.status IN ('queued', 'streaming')
    ) o ON true
"""
# The pages go by the whole key: what cannot be removed yet must not stand in the way of the rest.
_PLACE = "(e.at, e.workspace_id, e.channel, e.seq)"
_AFTER = "($2::timestamptz, $3::uuid, $4::text, $5::bigint)"
# The deltas before the end of a reply are of this reply, or of one that ended before it began: one runs at a time. Only
# a reply that was cancelled while it waited may end amid the deltas of another.
_ENDED = f"""
    SELECT d.at, d.workspace_id, d.channel, d.seq, h.epoch, h.floor,
           CASE WHEN coalesce(r.attempt, 1) > 0 OR NOT EXISTS (
               SELECT FROM channel_events l
               JOIN replies a ON a.workspace_id = l.workspace_id AND a.id = (l.d->>'reply')::uuid
               WHERE l.workspace_id = d.workspace_id AND l.channel = d.channel AND l.seq > d.seq
                 AND l.e IN ('reply.completed', 'reply.failed', 'reply.cancelled')
                 AND l.at > now() - $1::interval AND a.attempt > 0 AND a.start_seq < d.seq
           ) THEN least(d.seq, o.seq) ELSE 0 END AS target
    FROM (
        SELECT e.at, e.workspace_id, e.channel, e.seq, (e.d->>'reply')::uuid AS reply FROM channel_events e
        WHERE e.e IN ('reply.completed', 'reply.failed', 'reply.cancelled') AND e.at <= now() - $1::interval
          AND {_PLACE} > {_AFTER}
        ORDER BY e.at, e.workspace_id, e.channel, e.seq LIMIT $6
    ) d
    {_HEAD}
    LEFT JOIN replies r ON r.workspace_id = d.workspace_id AND r.id = d.reply
    {_OPEN}
    ORDER BY d.at, d.workspace_id, d.channel, d.seq
"""  # noqa: S608 - the pieces stand above
_OLD = f"""
    SELECT d.at, d.workspace_id, d.channel, d.seq, h.epoch, h.floor, least(d.seq, o.seq) AS target
    FROM (
        SELECT e.at, e.workspace_id, e.channel, e.seq FROM channel_events e
        WHERE e.e <> 'reply.delta' AND e.at <= now() - $1::interval AND {_PLACE} > {_AFTER}
        ORDER BY e.at, e.workspace_id, e.channel, e.seq LIMIT $6
    ) d
    {_HEAD}
    {_OPEN}
    ORDER BY d.at, d.workspace_id, d.channel, d.seq
"""  # noqa: S608 - as above
# Of so many events in a row at least so many thousandths are marked.
_LONG = f"""
    SELECT h.workspace_id, h.channel, h.epoch, h.floor, least(h.seq - $1, o.seq) AS target
    FROM (
        SELECT workspace_id, channel FROM channel_events WHERE seq % 1000 = 0
        GROUP BY workspace_id, channel HAVING count(*) >= $2
    ) d
    {_HEAD}
    {_OPEN}
    WHERE h.seq - h.floor > $1
"""  # noqa: S608 - as above
# The floor and the events in one statement, under the lock of the head: no reader sees one without the other. The epoch
# tells that the channel is still the one that was looked at. A reply opened since then starts above the target.
_TRIM = """
    WITH moved AS (
        UPDATE channel_heads SET floor = least($4, floor + $5)
        WHERE workspace_id = $1 AND channel = $2 AND epoch = $3 AND floor < $4 AND seq >= $4
        RETURNING floor
    ), gone AS (
        DELETE FROM channel_events e USING moved
        WHERE e.workspace_id = $1 AND e.channel = $2 AND e.seq <= moved.floor
        RETURNING 1
    )
    SELECT (SELECT floor FROM moved) AS floor, (SELECT count(*) FROM gone) AS events
"""
_GIVE_WAY = f"SELECT set_config('lock_timeout', '{_LOCK_MS}ms', true)"

_Place = tuple[datetime, UUID, str, int]
_BEGINNING: _Place = (datetime.fromisoformat("1970-01-01T00:00:00+00:00"), UUID(int=0), "", 0)


class RetentionIncomplete(Exception):
    """Some channels could not be trimmed; the others were."""


@dataclass(frozen=True, slots=True)
class Target:
    """Up to where a channel is to be trimmed. The channel is the one that has this epoch."""

    workspace_id: UUID
    channel: str
    epoch: str
    seq: int


@dataclass(slots=True)
class Trimmed:
    """What a run did."""

    channels: int = 0
    events: int = 0
    busy: int = 0
    failed: int = 0


class Retention:
    """Trims the log of all channels. Any number of processes may do it at once.

    Deltas go `delta_minutes` after the end of their reply, and with them what lies before them; everything goes after
    `keep_hours`; a channel keeps `keep_events` at most. What an open reply is folded from stays. Times are the
    database's, which wrote them.
    """

    def __init__(self, database: Database, settings: RealtimeSettings, *, batch: int = _BATCH) -> None:
        self._database = database
        self._deltas = timedelta(minutes=settings.delta_minutes)
        self._all = timedelta(hours=settings.keep_hours)
        self._events = settings.keep_events
        self._batch = batch

    async def handle(self, _run: object) -> dict[str, Any]:
        """Do the periodic job. Raises `RetentionIncomplete` when a channel could not be trimmed."""
        done = await self.run()
        if done.failed:
            raise RetentionIncomplete(f"{done.failed} channels")
        return {"channels": done.channels, "events": done.events, "busy": done.busy}

    async def run(self) -> Trimmed:
        """Trim everything that is due, within the time of one run. Returns what was done."""
        done = Trimmed()
        until = time.monotonic() + _RUN_S
        async for target in self._due():
            if time.monotonic() > until:
                break
            try:
                removed = await self.trim(target, until=until)
            except asyncpg.LockNotAvailableError:
                # Somebody is at work in this channel for long: the next minute will do.
                done.busy += 1
                continue
            except asyncpg.PostgresError as error:
                logger.warning("channel not trimmed", extra={"channel": target.channel, "cause": type(error).__name__})
                done.failed += 1
                continue
            done.channels += bool(removed)
            done.events += removed
        return done

    async def trim(self, target: Target, *, until: float | None = None) -> int:
        """Raise a channel's floor to the target, batch by batch; return how many events went.

        Stops at `until` (monotonic, seconds). Nothing happens to a channel that is another one by now.
        """
        total = 0
        while until is None or time.monotonic() < until:
            async with self._database.system_unit_of_work() as unit:
                connection = await unit.driver()
                await connection.execute(_GIVE_WAY)
                row = await connection.fetchrow(
                    _TRIM, target.workspace_id, target.channel, target.epoch, target.seq, self._batch
                )
            if row["floor"] is None:
                break
            total += row["events"]
            if row["floor"] >= target.seq:
                break
        return total

    async def _due(self) -> AsyncIterator[Target]:
        for statement, age in ((_ENDED, self._deltas), (_OLD, self._all)):
            place: _Place | None = _BEGINNING
            while place is not None:
                targets, place = await self._page(statement, age, place)
                for target in targets:
                    yield target
        for target in await self._long():
            yield target

    async def _page(self, statement: str, age: timedelta, place: _Place) -> tuple[list[Target], _Place | None]:
        """Return the targets of a page of old events, one per channel, and the place after it."""
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            rows = await connection.fetch(statement, age, *place, _PAGE)
        found: dict[tuple[UUID, str], Target] = {}
        for row in rows:
            address = (row["workspace_id"], row["channel"])
            if row["target"] > max(row["floor"], found[address].seq if address in found else 0):
                found[address] = Target(*address, row["epoch"], row["target"])
        last = rows[-1] if len(rows) == _PAGE else None
        return list(found.values()), last and (last["at"], last["workspace_id"], last["channel"], last["seq"])

    async def _long(self) -> list[Target]:
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            rows = await connection.fetch(_LONG, self._events, self._events // _THOUSAND)
        return [
            Target(row["workspace_id"], row["channel"], row["epoch"], row["target"])
            for row in rows
            if row["target"] > row["floor"]
        ]
