"""What a connection needs from the service, in one place."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from parley.core.errors import Unauthenticated, Unavailable
from parley.core.revocations import Revocation
from parley.core.scope import Authenticator, Credential, Scope
from parley.core.settings import RealtimeSettings
from parley.realtime.admission import Admission
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels
from parley.realtime.cursor import Cursor
from parley.realtime.frames import Auth, Close
from parley.realtime.log import LogReader
from parley.realtime.ring import Subscriber
from parley.realtime.tickets import Tickets

if TYPE_CHECKING:
    from parley.realtime.connection import Connection


logger = logging.getLogger(__name__)

_TOGETHER = 8
_PAUSES_S = (0.1, 0.3)
_RECENT_S = 30.0


@dataclass(frozen=True, slots=True)
class FrameHandler:
    """What a higher module does with one of its frames, and the permission that the frame asks for."""

    permission: str
    handle: Callable[[Scope, Any], Awaitable[dict[str, Any]]]

    async def __call__(self, scope: Scope, frame: Any) -> dict[str, Any]:
        """Handle a frame. Raises `Forbidden` without the permission."""
        scope.require(self.permission)
        return await self.handle(scope, frame)


class Holder(Protocol):
    """A socket or a stream over HTTP that is open in the name of a scope."""

    @property
    def scope(self) -> Scope:
        """In whose name it is open."""
        ...

    def end(self, code: int, reason: str) -> None:
        """End it. Must not block."""
        ...


@dataclass
class Realtime:
    """The live part of the service. `handlers` are what higher modules do with their frames, by `t`."""

    settings: RealtimeSettings
    authenticator: Authenticator
    tickets: Tickets
    channels: Channels
    bus: Bus
    log: LogReader
    origins: frozenset[str]
    allow_loopback_origins: bool
    handlers: dict[str, FrameHandler] = field(default_factory=dict)
    connections: "set[Connection]" = field(default_factory=set)
    streams: "set[Holder]" = field(default_factory=set)
    draining: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Make what follows from the settings."""
        self.admission = Admission(self.settings)
        self._lookups = asyncio.Semaphore(self.settings.lookups)
        self._emptied = asyncio.Event()
        self._revoked_at = -_RECENT_S

    @property
    def per_user(self) -> dict[UUID, int]:
        """How many connections and streams each user has here."""
        return self.admission.per_user

    def enter(self, connection: "Connection") -> None:
        """Count a connection. Raises `TooManyConnections` or `TooManyOpen`."""
        self.admission.take_place(connection.scope.user_id)
        self.connections.add(connection)
        self.look_again_after_news(connection)

    def leave(self, connection: "Connection") -> None:
        """Count it no more."""
        self.connections.discard(connection)
        self._leave(connection)

    def enter_stream(self, stream: Holder) -> None:
        """Count a stream over HTTP. Raises as `enter` does, and `Unavailable` while the process stops."""
        if self.draining:
            raise Unavailable("This server is about to stop.", retry_after_s=1)
        self.admission.take_place(stream.scope.user_id)
        self.streams.add(stream)
        self.look_again_after_news(stream)

    def leave_stream(self, stream: Holder) -> None:
        """Count it no more. Any number of times."""
        if stream in self.streams:
            self.streams.discard(stream)
            self._leave(stream)

    def _leave(self, holder: Holder) -> None:
        self.admission.leave_place(holder.scope.user_id)
        if not self.connections and not self.streams:
            self._emptied.set()

    async def emptied(self) -> None:
        """Wait until no connection and no stream is left."""
        while self.connections or self.streams:
            self._emptied.clear()
            await self._emptied.wait()

    async def authenticate(self, auth: Auth) -> Credential:
        """Verify what a `hello` or `auth` frame carries. Raises `Unauthenticated`."""
        given = [value for value in (auth.ticket, auth.token, auth.api_key) if value]
        if len(given) != 1:
            raise Unauthenticated("Give one of ticket, token and api_key.")
        if auth.ticket:
            return await self.tickets.redeem(auth.ticket)
        credential = await self.authenticator.authenticate(given[0])
        # Each in its own field: what is written down as a token is not to be a key that lives for years.
        if (credential.scope.key_id is not None) != bool(auth.api_key):
            raise Unauthenticated("The credential is in the field of another kind.")
        return credential

    def look_again_after_news(self, holder: Holder) -> None:
        """Look at a holder again if something was revoked a moment ago.

        It may have been verified just before, and was not known by the scope that it has now when the news came.
        """
        if time.monotonic() - self._revoked_at < _RECENT_S:
            self._look_again([holder])

    def revoke(self, revocation: Revocation) -> None:
        """End what rests on what was revoked; what may only have changed is looked at again."""
        if revocation.kind == "conversation":
            self.bus.withdrawals += 1
            self._ask_readers(self.bus.readers((revocation.id, f"conversation:{revocation.second}")))
            return
        self._revoked_at = time.monotonic()
        concerned = [holder for holder in self._holders() if revocation.concerns(holder.scope)]
        if revocation.kind == "membership":
            self._look_again(concerned)
        else:
            for holder in concerned:
                holder.end(Close.FORBIDDEN, "revoked")

    def look_at_everything(self) -> None:
        """Look at everything again that is open: revocations may have been missed."""
        self._revoked_at = time.monotonic()
        self._look_again(self._holders())
        self.bus.withdrawals += 1
        self._ask_readers(self.bus.watched("conversation:"))

    def _holders(self) -> "list[Holder]":
        return [*self.connections, *self.streams]

    def _look_again(self, holders: "list[Holder]") -> None:
        if holders:
            task = asyncio.create_task(self._reauthenticate(holders))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _ask_readers(self, readers: "list[Subscriber]") -> None:
        if readers:
            task = asyncio.create_task(self._ask(readers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, readers: "list[Subscriber]") -> None:
        for start in range(0, len(readers), _TOGETHER):
            await asyncio.gather(*(reader.look_again() for reader in readers[start : start + _TOGETHER]))

    async def _reauthenticate(self, holders: "list[Holder]") -> None:
        # A few at a time: they may be thousands.
        for start in range(0, len(holders), _TOGETHER):
            await asyncio.gather(*(self._reauthenticate_one(holder) for holder in holders[start : start + _TOGETHER]))

    async def _reauthenticate_one(self, holder: "Holder") -> None:
        try:
            credential = await self._looked_at_again(holder)
        except Unauthenticated:
            holder.end(Close.FORBIDDEN, "revoked")
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are looked at too
            # Nobody would look at it again, and it may be one that has ended: whoever comes back is verified.
            logger.warning("a connection could not be looked at again", extra={"cause": type(error).__name__})
            holder.end(Close.RETRY, "look again")
        else:
            if credential.scope.permissions != holder.scope.permissions:
                holder.end(Close.RETRY, "rights changed")

    async def _looked_at_again(self, holder: "Holder") -> Credential:
        # After the database was away the first connections that are tried may be those of before.
        for pause_s in _PAUSES_S:
            try:
                return await self.authenticator.reauthenticate(holder.scope)
            except Unavailable:
                await asyncio.sleep(pause_s)
        return await self.authenticator.reauthenticate(holder.scope)

    def cursor(self, scope: Scope, wake: Callable[[], None]) -> Cursor:
        """Return a cursor for one reader."""
        return Cursor(
            bus=self.bus, log=self.log, channels=self.channels, settings=self.settings, lookups=self._lookups,
            scope=scope, wake=wake,
        )  # fmt: skip
