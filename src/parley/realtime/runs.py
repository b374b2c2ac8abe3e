"""Run records: who generates a reply, and whether they still may.

A process is alive while it holds a session advisory lock; the lock goes with the process, `kill -9` included. A run
belongs to `owner` under a `fence`: claiming it raises the fence, and the former owner's next tick appends nothing.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from parley.core.db import UnitOfWork
from parley.core.scope import Role, Scope
from parley.realtime.events import DELTA, Channel
from parley.tenancy.permissions import permissions_of

LOCK_CLASS = 0x7061726C  # "parl": the class of our processes' advisory locks

TERMINAL = frozenset({"completed", "failed", "cancelled"})

_CLAIM = """
    UPDATE replies r SET status = 'streaming', owner = $3, fence = fence + 1, attempt = attempt + 1,
        lease_until = now() + make_interval(secs => $4)
    WHERE workspace_id = $1 AND id = $2 AND status IN ('queued', 'streaming') AND fence = $5
    RETURNING id, workspace_id, channel, user_id, question_id, options::text AS options, fence, attempt,
              appended, start_seq, cancel_requested, provider_cursor,
              (SELECT m.role FROM memberships m WHERE m.workspace_id = r.workspace_id AND m.user_id = r.user_id) AS role
"""
# A tick takes the head first too; the other way round the two would wait for each other.
_LOCK_HEAD = "SELECT seq FROM channel_heads WHERE workspace_id = $1 AND channel = $2 FOR UPDATE"
_RELEASE = """
    UPDATE replies SET owner = NULL, lease_until = now() WHERE workspace_id = $1 AND id = $2 AND fence = $3
"""
_RESERVE = """
    UPDATE replies SET owner = $2 WHERE id = $1 AND status = 'queued' AND owner IS NULL RETURNING workspace_id
"""
# pg_locks is of the whole server: a process of another database is none of ours.
_ALIVE = """
    SELECT l.objid::bigint AS owner FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.classid = $1::bigint::oid AND l.objsubid = 2 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_OPEN = """
    SELECT r.workspace_id, r.id, r.fence, r.status, r.channel, r.user_id, m.role, r.options::text AS options,
           r.owner IS NULL AS released, r.owner = ANY($2::bigint[]) AS alive
    FROM replies r
    LEFT JOIN memberships m ON m.workspace_id = r.workspace_id AND m.user_id = r.user_id
"""
# A running one whose process is gone or has not renewed its lease, this process included: it may have given the run up
# without being able to say so. And one that waits where nothing runs, whoever was to begin it.
_ORPHANS = f"""
    {_OPEN}
    WHERE (r.status = 'streaming'
           AND (r.owner IS NULL OR r.lease_until < now() OR (r.owner <> $1 AND r.owner <> ALL($2::bigint[]))))
       OR (r.status = 'queued' AND NOT EXISTS (
               SELECT FROM replies s
               WHERE s.workspace_id = r.workspace_id AND s.channel = r.channel AND s.status = 'streaming'))
    ORDER BY r.status DESC, r.id LIMIT 200
"""
_ONE = f"{_OPEN} WHERE r.id = $1 AND r.status = 'queued'"


def new_owner() -> int:
    """Return the number of a process: what its advisory lock is taken on."""
    return secrets.randbelow(2**31 - 1) + 1


async def hold_process_lock(connection: asyncpg.Connection, owner: int) -> None:
    """Say that this process lives, for as long as the connection does."""
    await connection.execute("SELECT pg_advisory_lock($1::int, $2::int)", LOCK_CLASS, owner)


class Run:
    """A reply that this process generates: its place in the log and what is not yet written of it.

    Not thread-safe; the generator emits, the tick writer takes.
    """

    __slots__ = (
        "_last_delta", "appended", "assistant", "attempt", "buffer", "buffered", "cancelled", "channel", "cursor",
        "fence", "finishing", "handed_over", "history", "lost", "on_signal", "options", "provider_cursor",
        "question_id", "renewed", "reply_id", "scope", "start_seq", "visible",
    )  # fmt: skip

    def __init__(
        self,
        *,
        scope: Scope,
        reply_id: UUID,
        question_id: UUID,
        channel: Channel,
        fence: int,
        attempt: int = 1,
        appended: int = 0,
        start_seq: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.scope = scope
        self.reply_id = reply_id
        self.question_id = question_id
        self.channel = channel
        self.fence = fence
        self.attempt = attempt
        self.appended = appended
        self.start_seq = start_seq
        self.options = options or {}
        self.buffer: list[tuple[str, str | dict[str, Any]]] = []
        self.buffered = 0
        self.renewed = 0.0
        self.visible = False
        self.cancelled = False
        self.lost = False
        self.handed_over = False
        self.finishing = False
        self.provider_cursor: str | None = None
        """Where the process before this one had read its provider to, as committed with what it wrote."""
        self.cursor: str | None = None
        """Where this process has read to: goes into the next tick; an empty text takes the old place away."""
        self.on_signal: Callable[[], None] | None = None
        self.history: list[Any] | None = None
        """What was said before, where the sender knows it; the generator looks it up otherwise."""
        self.assistant: Any = None
        """The workspace's own assistant that answers, where the sender knows it; as with `history`."""
        self._last_delta: dict[str, Any] | None = None

    def signal(
        self, *, cancelled: bool = False, lost: bool = False, stopped: bool = False, handed_over: bool = False
    ) -> None:
        """Tell the generator to stop.

        Someone cancelled the reply, it is another process's now or is to be, or we shut down.
        """
        news = (cancelled and not self.cancelled) or (lost and not self.lost) or stopped or handed_over
        self.cancelled |= cancelled
        self.lost |= lost
        self.handed_over |= handed_over
        if news and self.on_signal:
            self.on_signal()

    def emit(self, e: str, d: dict[str, Any]) -> None:
        """Add an event to the next tick."""
        # Encoded here, so that what cannot be encoded fails the reply that made it and not the tick of all of them.
        text = orjson.dumps(d, default=str).decode()
        self._last_delta = None
        self.buffer.append((e, text))

    def emit_delta(self, part: int, off: int, text: str) -> None:
        """Add text to the next tick; all of a part's text between two ticks is one event."""
        self.buffered += len(text)
        last = self._last_delta
        if last is not None and last["part"] == part:
            last["x"] += text
            return
        self._last_delta = {"reply": str(self.reply_id), "part": part, "off": off, "x": text}
        self.buffer.append((DELTA, self._last_delta))

    def take(self) -> tuple[list[tuple[str, str]], str | None]:
        """Return what is to be written, encoded, and the provider's place behind it; start anew."""
        taken = [(e, d if isinstance(d, str) else orjson.dumps(d).decode()) for e, d in self.buffer]
        cursor = self.cursor
        self.buffer, self._last_delta, self.buffered, self.cursor = [], None, 0, None
        return taken, cursor

    def give_back(self, events: Sequence[tuple[str, str]], cursor: str | None) -> None:
        """Take back what was taken and not written: it comes before what was emitted since."""
        self.buffer[:0] = events
        self.buffered += sum(len(d) for _, d in events)
        if self.cursor is None:
            self.cursor = cursor


@dataclass(frozen=True, slots=True)
class Orphan:
    """An open reply that nobody writes. `scope` is that of the user who asked.

    `alive`: its process still holds its lock, and only the lease has run out. `released`: it was given up on purpose.
    """

    reply_id: UUID
    fence: int
    status: str
    channel: Channel
    scope: Scope
    alive: bool = False
    released: bool = False


async def claim(
    unit: UnitOfWork, scope: Scope, reply_id: UUID, *, owner: int, fence: int, lease_s: float
) -> Run | None:
    """Take a reply over, if its fence is still the one that was seen. The former owner is fenced by this."""
    connection = await unit.driver()
    row = await connection.fetchrow(_CLAIM, scope.workspace_id, reply_id, owner, lease_s, fence)
    if row is None:
        return None
    options = orjson.loads(row["options"])
    run = Run(
        # Not the scope that claims: that of the reply before it, which another credential may have asked for.
        scope=_scope_of(scope.workspace_id, row["user_id"], row["role"], options),
        reply_id=row["id"],
        question_id=row["question_id"],
        channel=Channel(row["workspace_id"], row["channel"], row["channel"]),
        fence=row["fence"],
        attempt=row["attempt"],
        appended=row["appended"],
        start_seq=row["start_seq"],
        options=options,
    )
    run.cancelled = row["cancel_requested"]
    run.provider_cursor = row["provider_cursor"]
    return run


async def lock_head(unit: UnitOfWork, channel: Channel) -> None:
    """Take the lock of a channel's head before a claim that will write."""
    connection = await unit.driver()
    await connection.execute(_LOCK_HEAD, *channel.address)


async def release(unit: UnitOfWork, run: Run) -> None:
    """Give a run up: it belongs to no process any more."""
    connection = await unit.driver()
    await connection.execute(_RELEASE, run.scope.workspace_id, run.reply_id, run.fence)


def grants(scope: Scope) -> dict[str, Any]:
    """Return what a run's options say of its asker: the credential, and its rights if they are fewer than the role's.

    Whoever goes on with the reply looks at the credential again: one that was revoked acts no more.
    """
    allowed = permissions_of(scope.role)
    said: dict[str, Any] = {} if scope.permissions >= allowed else {"permissions": sorted(scope.permissions & allowed)}
    if scope.key_id is not None:
        said["by"] = {"key": str(scope.key_id)}
    elif scope.session_id is not None:
        said["by"] = {"session": str(scope.session_id)}
    elif scope.issuer is not None:
        said["by"] = {"issuer": scope.issuer, "subject": scope.subject, "issued_at": scope.issued_at}
    return said


def _scope_of(workspace_id: UUID, user_id: UUID, role: str | None, options: dict[str, Any]) -> Scope:
    # Whoever has left the workspace may do nothing more, and what they asked is still brought to its end.
    permissions = permissions_of(Role(role)) if role else frozenset()
    if (granted := options.get("permissions")) is not None:
        permissions &= frozenset(granted)
    by = options.get("by", {})
    return Scope(
        workspace_id, user_id, Role(role or Role.VIEWER), subject=by.get("subject", str(user_id)),
        permissions=permissions, session_id=_id_in(by, "session"), key_id=_id_in(by, "key"), issuer=by.get("issuer"),
        issued_at=by.get("issued_at"),
    )  # fmt: skip


def _id_in(by: dict[str, str], kind: str) -> UUID | None:
    return UUID(by[kind]) if kind in by else None


async def reserve(unit: UnitOfWork, reply_id: UUID, *, owner: int) -> Orphan | None:
    """Be the first of several processes to see to a reply that was queued for any of them; None when one was before."""
    connection = await unit.driver()
    if await connection.fetchval(_RESERVE, reply_id, owner) is None:
        return None
    row = await connection.fetchrow(_ONE, reply_id, [])
    return None if row is None else _orphan(row)


async def living(unit: UnitOfWork) -> list[int]:
    """Return the owners that hold their lock: one per process of this database."""
    connection = await unit.driver()
    return [row["owner"] for row in await connection.fetch(_ALIVE, LOCK_CLASS)]


async def orphans(unit: UnitOfWork, *, owner: int, alive: Sequence[int] | None = None) -> Sequence[Orphan]:
    """Return open replies that no living process writes, running ones first. `alive`: what `living` returned."""
    connection = await unit.driver()
    if alive is None:
        alive = await living(unit)
    return [_orphan(row) for row in await connection.fetch(_ORPHANS, owner, list(alive))]


def _orphan(row: asyncpg.Record) -> Orphan:
    return Orphan(
        reply_id=row["id"],
        fence=row["fence"],
        status=row["status"],
        channel=Channel(row["workspace_id"], row["channel"], row["channel"]),
        scope=_scope_of(row["workspace_id"], row["user_id"], row["role"], orjson.loads(row["options"])),
        alive=bool(row["alive"]),
        released=row["released"],
    )
