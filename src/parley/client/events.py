"""What a client tells its user."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

Event = tuple[str, str, dict[str, Any]]
SNAPSHOT = "snapshot"
"""The name under which an iterator of events is told that a channel's state was replaced; `d` is the state."""


@dataclass(frozen=True, slots=True)
class ConnectionChange:
    """What became of the connection. `positions` is where each channel is resumed at."""

    state: Literal["connecting", "connected", "disconnected", "stopped"]
    code: int | None = None
    reason: str = ""
    positions: dict[str, int] | None = None


class EventStream:
    """An async iterator of `(channel, e, d)`; it ends with the client. What is not read waits without bound."""

    def __init__(self, forget: Callable[["EventStream"], None]) -> None:
        self._forget = forget
        self._waiting: deque[Event] = deque()
        self._moved = asyncio.Event()
        self._ended = False

    def put(self, event: Event) -> None:
        """Add an event."""
        self._waiting.append(event)
        self._moved.set()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._moved.set()

    def close(self) -> None:
        """Stop listening."""
        self.end()
        self._forget(self)

    def __aiter__(self) -> Self:
        """Iterate."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event."""
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._moved.clear()
            await self._moved.wait()
        return self._waiting.popleft()
