"""Access that has ended or changed, told to every process: REST and open connections follow within two seconds.

A revocation is announced in its own transaction by NOTIFY, so it is told exactly when it holds. Each process listens
on a connection of its own, which it tries every second: while it does not listen it may have missed something, so
nothing is remembered for longer than a second then, and when it listens again everything is looked at anew.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args
from uuid import UUID

import asyncpg

from parley.core.db import Database, UnitOfWork
from parley.core.scope import Scope

logger = logging.getLogger(__name__)

CHANNEL = "parley_revoked"
UNHEARD_CACHE_S = 0.8
"""How long anything may be remembered while nobody would hear that it ended."""

_PING_S = 0.5
_PING_TIMEOUT_S = 0.5
_BACK_OFF_S = (0.1, 0.2, 0.4, 0.8, 1.5)

Kind = Literal["session", "switch", "user", "key", "membership", "workspace"]


@dataclass(frozen=True, slots=True)
class Revocation:
    """What is to be looked at again.

    Most kinds have one id. `membership` has the workspace and, as `second`, the user; `switch` the session and the
    workspace that it is in now.
    """

    kind: Kind
    id: UUID
    second: UUID | None = None

    def concerns(self, scope: Scope) -> bool:
        """Whether a scope rests on what was revoked."""
        match self.kind:
            case "session":
                return scope.session_id == self.id
            case "switch":
                return scope.session_id == self.id and scope.workspace_id != self.second
            case "key":
                return scope.key_id == self.id
            case "user":
                return scope.user_id == self.id
            case "workspace":
                return scope.workspace_id == self.id
            case "membership":
                return scope.workspace_id == self.id and scope.user_id == self.second

    def to_text(self) -> str:
        """Return what is sent."""
        return f"{self.kind}:{self.id}:{self.second or ''}"

    @classmethod
    def from_text(cls, text: str) -> "Revocation | None":
        """Read what was sent; None for what this version does not know."""
        kind, _, rest = text.partition(":")
        id_, _, second = rest.partition(":")
        if kind not in get_args(Kind):
            return None
        try:
            return cls(cast("Kind", kind), UUID(id_), UUID(second) if second else None)
        except ValueError:
            return None


Listener = Callable[[Revocation], None]


class Revocations:
    """Announces revocations in the transaction that makes them, and hands those of every process to listeners."""

    def __init__(self, database: Database | None = None) -> None:
        self._database = database
        self._listeners: list[Listener] = []
        self._resets: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self.is_listening = False

    def subscribe(self, listener: Listener, *, reset: Callable[[], None] = lambda: None) -> None:
        """Call `listener` with each revocation, and `reset` when some may have been missed. Neither may block."""
        self._listeners.append(listener)
        self._resets.append(reset)

    def cache_s(self, wanted: float) -> float:
        """Return for how long what was looked up may be remembered now."""
        return wanted if self.is_listening else min(wanted, UNHEARD_CACHE_S)

    async def announce(self, unit: UnitOfWork, revocation: Revocation) -> None:
        """Tell every process once the unit's transaction has committed; this one at that very moment."""
        connection = await unit.driver()
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, revocation.to_text())
        unit.after_commit(lambda: self._hand_on(revocation))

    async def start(self) -> None:
        """Begin to listen. Returns when this process hears, or when a first try has failed."""
        if self._database is None:
            raise ValueError("there is no database to listen to")
        first = asyncio.Event()
        self._task = asyncio.create_task(self._listen(self._database, first), name="revocations")
        await first.wait()

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _listen(self, database: Database, first: asyncio.Event) -> None:
        failures = 0
        while True:
            connection: asyncpg.Connection | None = None
            try:
                connection = await database.connect_system()
                await connection.add_listener(CHANNEL, self._heard)
                self.is_listening = True
                failures = 0
                self._look_at_everything()
                first.set()
                while True:
                    await asyncio.sleep(_PING_S)
                    # A connection that is cut on the way stays silent for ever.
                    async with asyncio.timeout(_PING_TIMEOUT_S):
                        await connection.execute("SELECT 1")
            except Exception as error:  # noqa: BLE001 - whatever it is, this process must hear again
                logger.warning("not listening to revocations", extra={"cause": type(error).__name__})
            finally:
                self.is_listening = False
                first.set()
                if connection is not None:
                    connection.terminate()
            await asyncio.sleep(_BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)])
            failures += 1

    def _heard(self, _connection: object, _pid: int, _channel: str, text: Any) -> None:
        revocation = Revocation.from_text(str(text))
        if revocation is None:
            # Of a newer version: whatever it means, looking again is right.
            self._look_at_everything()
        else:
            self._hand_on(revocation)

    def _hand_on(self, revocation: Revocation) -> None:
        for listener in self._listeners:
            listener(revocation)

    def _look_at_everything(self) -> None:
        for reset in self._resets:
            reset()
