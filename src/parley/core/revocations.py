"""Access that has ended or changed, told to every process: REST and open connections follow within two seconds.

A revocation is announced in its own transaction by NOTIFY, so it is told exactly when it holds. Each process listens
on a connection of its own, which it tries every second: while it does not listen it may have missed something, so
nothing is remembered for longer than a second then, and when it listens again everything is looked at anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.listening import Listening
from parley.core.scope import Scope

CHANNEL = "parley_revoked"
UNHEARD_CACHE_S = 0.8
"""How long anything may be remembered while nobody would hear that it ended."""

Kind = Literal["session", "switch", "user", "key", "membership", "workspace", "conversation", "provider_keys"]


@dataclass(frozen=True, slots=True)
class Revocation:
    """What is to be looked at again.

    Most kinds have one id. `membership` has the workspace and, as `second`, the user; `switch` the session and the
    workspace that it is in now. `provider_keys` has a workspace: nobody's access rests on those.
    `conversation` has the workspace and the conversation that is no longer shared: only who reads it is looked at.
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
            case "provider_keys" | "conversation":
                return False

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
        self._listeners: list[Listener] = []
        self._resets: list[Callable[[], None]] = []
        self._listening = (
            Listening(database, CHANNEL, self._heard, listening=self._look_at_everything) if database else None
        )

    @property
    def is_listening(self) -> bool:
        """Whether this process hears at the moment."""
        return self._listening is not None and self._listening.is_listening

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
        if self._listening is None:
            raise ValueError("there is no database to listen to")
        await self._listening.start()

    async def close(self) -> None:
        """Stop listening."""
        if self._listening is not None:
            await self._listening.close()

    def _heard(self, text: str) -> None:
        revocation = Revocation.from_text(text)
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
