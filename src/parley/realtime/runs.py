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
              appended, start_seq, cancel_requested,
              (SELECT m.role FROM memberships m WHERE m.workspace_id = r.workspace_id AND m.user_id = r.user_id) AS role
"""
_RELEASE = "UPDATE replies SET owner = NULL WHERE workspace_id = $1 AND id = $2 AND fence = $3"
_ORPHANS = """
    SELECT r.workspace_id, r.id, r.fence, r.status, r.channel, r.user_id, m.role, r.options::text AS options
    FROM replies r
    LEFT JOIN memberships m ON m.workspace_id = r.workspace_id AND m.user_id = r.user_id
    WHERE r.status IN ('queued', 'streaming') AND r.owner IS DISTINCT FROM $1
      AND NOT EXISTS (SELECT 1 FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = $2::bigint::oid
                      AND l.objid = r.owner::oid AND l.objsubid = 2 AND l.granted)
    ORDER BY r.status DESC, r.id LIMIT 200
"""


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
        "_last_delta", "appended", "attempt", "buffer", "buffered", "cancelled", "channel", "fence",
        "finishing", "history", "lost", "on_signal", "options", "question_id", "renewed", "reply_id", "scope",
        "start_seq", "visible",
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
        self.finishing = False
        self.on_signal: Callable[[], None] | None = None
        self.history: list[Any] | None = None
        """What was said before, where the sender knows it; the generator looks it up otherwise."""
        self._last_delta: dict[str, Any] | None = None

    def signal(self, *, cancelled: bool = False, lost: bool = False, stopped: bool = False) -> None:
        """Tell the generator to stop: someone cancelled the reply, it is another process's now, or we shut down."""
        news = (cancelled and not self.cancelled) or (lost and not self.lost) or stopped
        self.cancelled |= cancelled
        self.lost |= lost
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

    def take(self) -> list[tuple[str, str]]:
        """Return what is to be written, encoded, and start anew."""
        taken = [(e, d if isinstance(d, str) else orjson.dumps(d).decode()) for e, d in self.buffer]
        self.buffer, self._last_delta, self.buffered = [], None, 0
        return taken


@dataclass(frozen=True, slots=True)
class Orphan:
    """An open reply whose process is gone. `scope` is that of the user who asked."""

    reply_id: UUID
    fence: int
    status: str
    channel: Channel
    scope: Scope


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
        scope=_scope_of(scope.workspace_id, scope.user_id, row["role"], options),
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
    return run


async def release(unit: UnitOfWork, run: Run) -> None:
    """Give a run up: it belongs to no process any more."""
    connection = await unit.driver()
    await connection.execute(_RELEASE, run.scope.workspace_id, run.reply_id, run.fence)


def grants(scope: Scope) -> dict[str, Any]:
    """Return what a run's options say of its asker's rights: nothing, unless the credential has fewer than the role."""
    allowed = permissions_of(scope.role)
    return {} if scope.permissions >= allowed else {"permissions": sorted(scope.permissions & allowed)}


def _scope_of(workspace_id: UUID, user_id: UUID, role: str | None, options: dict[str, Any]) -> Scope:
    # Whoever has left the workspace may do nothing more, and what they asked is still brought to its end.
    permissions = permissions_of(Role(role)) if role else frozenset()
    if (granted := options.get("permissions")) is not None:
        permissions &= frozenset(granted)
    return Scope(workspace_id, user_id, Role(role or Role.VIEWER), subject=str(user_id), permissions=permissions)


async def orphans(unit: UnitOfWork, *, owner: int) -> Sequence[Orphan]:
    """Return open replies whose owner holds no lock any more, running ones first."""
    connection = await unit.driver()
    return [
        Orphan(
            reply_id=row["id"],
            fence=row["fence"],
            status=row["status"],
            channel=Channel(row["workspace_id"], row["channel"], row["channel"]),
            scope=_scope_of(row["workspace_id"], row["user_id"], row["role"], orjson.loads(row["options"])),
        )
        for row in await connection.fetch(_ORPHANS, owner, LOCK_CLASS)
    ]
