"""Who gets in, and how fast: a storm of returning clients waits in a line that ends, and requests go on meanwhile."""

import asyncio
from contextlib import suppress
from uuid import UUID

from parley.core.errors import RateLimited, Unavailable
from parley.core.settings import RealtimeSettings


class Busy(Unavailable):
    """Too many are waiting to be let in."""

    frame_code = "busy"
    message = "Too many clients are connecting."


class TooManyConnections(RateLimited):
    """One user has as many connections and streams as one may."""

    message = "Too many connections."


class TooManyOpen(Unavailable):
    """There are as many connections and streams here as one process can take."""

    frame_code = "busy"
    message = "Too many connections on this server."


class Turn:
    """The right to be let in now. Given back as soon as nothing more is read for the newcomer."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns: asyncio.Semaphore | None = turns

    def release(self) -> None:
        """Let the next one in. Any number of times."""
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.release()


class Admission:
    """Counts who is here and lets newcomers in, a few at a time and first come, first served."""

    def __init__(self, settings: RealtimeSettings) -> None:
        self._settings = settings
        self._turns = asyncio.Semaphore(settings.hello_at_once)
        self.waiting = 0
        self.per_user: dict[UUID, int] = {}
        self.places = 0

    async def wait(self) -> Turn:
        """Wait for a turn. Raises `Busy` at once when the line is full, and when it did not move in time."""
        if self.waiting >= self._settings.hello_waiting and self._turns.locked():
            raise Busy
        self.waiting += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.hello_wait_s):
                    await self._turns.acquire()
                return Turn(self._turns)
        finally:
            self.waiting -= 1
        raise Busy

    def take_place(self, user_id: UUID) -> None:
        """Count a connection or a stream. Raises `TooManyConnections` or `TooManyOpen`."""
        if self.places >= self._settings.connections:
            raise TooManyOpen(retry_after_s=5)
        held = self.per_user.get(user_id, 0)
        if held >= self._settings.connections_per_user:
            raise TooManyConnections(retry_after_s=5)
        self.per_user[user_id] = held + 1
        self.places += 1

    def leave_place(self, user_id: UUID) -> None:
        """Count one less."""
        self.places -= 1
        self.per_user[user_id] -= 1
        if not self.per_user[user_id]:
            del self.per_user[user_id]
