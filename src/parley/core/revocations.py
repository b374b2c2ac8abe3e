"""Access that has ended or changed, told to every process: REST and open connections follow within two seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from parley.core.db import UnitOfWork
from parley.core.scope import Scope

CHANNEL = "parley_revoked"

Kind = Literal["session", "user", "key", "membership", "workspace"]


@dataclass(frozen=True, slots=True)
class Revocation:
    """What is to be looked at again. `membership` has a workspace and a user, the others one id."""

    kind: Kind
    id: UUID
    user_id: UUID | None = None

    def concerns(self, scope: Scope) -> bool:
        """Whether a scope rests on what was revoked."""
        match self.kind:
            case "session":
                return scope.session_id == self.id
            case "key":
                return scope.key_id == self.id
            case "user":
                return scope.user_id == self.id
            case "workspace":
                return scope.workspace_id == self.id
            case "membership":
                return scope.workspace_id == self.id and scope.user_id == self.user_id


Listener = Callable[[Revocation], None]


class Revocations:
    """Announces revocations, in the transaction that makes them, and hands those of every process to listeners."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with each revocation. It must not fail or block."""
        self._listeners.append(listener)

    async def announce(self, unit: UnitOfWork, revocation: Revocation) -> None:
        """Tell every process once the unit's transaction has committed; this one at that very moment."""
        connection = await unit.driver()
        text = f"{revocation.kind}:{revocation.id}:{revocation.user_id or ''}"
        await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, text)
        unit.after_commit(lambda: self._hand_on(revocation))

    def _hand_on(self, revocation: Revocation) -> None:
        for listener in self._listeners:
            listener(revocation)
