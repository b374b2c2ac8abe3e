"""What a connection needs from the service, in one place."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from parley.core.errors import Unauthenticated
from parley.core.scope import Authenticator, Credential, Scope
from parley.core.settings import RealtimeSettings
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels
from parley.realtime.cursor import Cursor
from parley.realtime.frames import Auth, Close
from parley.realtime.log import LogReader
from parley.realtime.tickets import Tickets

if TYPE_CHECKING:
    from parley.realtime.connection import Connection


@dataclass(frozen=True, slots=True)
class FrameHandler:
    """What a higher module does with one of its frames, and the permission that the frame asks for."""

    permission: str
    handle: Callable[[Scope, Any], Awaitable[dict[str, Any]]]

    async def __call__(self, scope: Scope, frame: Any) -> dict[str, Any]:
        """Handle a frame. Raises `Forbidden` without the permission."""
        scope.require(self.permission)
        return await self.handle(scope, frame)


class Revocable(Protocol):
    """A stream over HTTP that is open in the name of a session."""

    session_id: UUID | None

    def revoke(self) -> None:
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
    streams: "set[Revocable]" = field(default_factory=set)
    per_user: dict[UUID, int] = field(default_factory=dict)

    async def authenticate(self, auth: Auth) -> Credential:
        """Verify what a `hello` or `auth` frame carries. Raises `Unauthenticated`."""
        given = [value for value in (auth.ticket, auth.token, auth.api_key) if value]
        if len(given) != 1:
            raise Unauthenticated("Give one of ticket, token and api_key.")
        if auth.ticket:
            return await self.tickets.redeem(auth.ticket)
        return await self.authenticator.authenticate(given[0])

    def revoke(self, session_id: UUID) -> None:
        """End what is open in the name of a session."""
        for connection in list(self.connections):
            if connection.scope.session_id == session_id:
                connection.end(Close.FORBIDDEN, "revoked")
        for stream in list(self.streams):
            if stream.session_id == session_id:
                stream.revoke()

    def cursor(self, scope: Scope, wake: Callable[[], None]) -> Cursor:
        """Return a cursor for one reader."""
        return Cursor(
            bus=self.bus, log=self.log, channels=self.channels, settings=self.settings, scope=scope, wake=wake
        )
