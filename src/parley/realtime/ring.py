"""The last events of one channel, for all its local subscribers. A cache: PostgreSQL has what it has not."""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from parley.realtime.events import Channel, LoggedEvent


class Subscriber(Protocol):
    """Someone who wants to know that a channel has moved."""

    def wake(self) -> None:
        """Note that there is something to read. Must not block."""
        ...

    def reset(self) -> None:
        """Note that the channel's positions no longer hold."""
        ...

    async def look_again(self) -> None:
        """Look whether the channel is still the reader's to see; what is not ends as if it were gone."""
        ...


class Ring:
    """Events `base + 1 .. head`, dense. What arrives ahead of its turn waits until the gap is filled."""

    def __init__(self, channel: Channel, *, max_events: int, max_bytes: int) -> None:
        self.channel = channel
        self.subscribers: set[Subscriber] = set()
        self.ready = asyncio.Event()
        self.base = 0
        self.head = 0
        self.taken = 0
        """How many bytes of events it ever took: what two positions in time lie apart."""
        self.epoch = ""
        self.idle_since = 0.0
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events: deque[LoggedEvent] = deque()
        self._bytes = 0
        self._early: dict[int, LoggedEvent] = {}

    @property
    def has_gap(self) -> bool:
        """Whether events wait for one that has not arrived."""
        return bool(self._early)

    def open(self, *, head: int, epoch: str) -> None:
        """Start after `head`; what was published meanwhile is taken up."""
        self._events.clear()
        self._bytes = 0
        self.base = self.head = head
        self.epoch = epoch
        self.ready.set()
        self._drain()

    def append(self, events: Iterable[LoggedEvent]) -> None:
        """Take events, in any order and any number of times."""
        for event in events:
            if event.seq > self.head or not self.ready.is_set():
                self._early[event.seq] = event
        if self.ready.is_set():
            self._drain()

    def _drain(self) -> None:
        before = self.head
        while (event := self._early.pop(self.head + 1, None)) is not None:
            self.head = event.seq
            self._events.append(event)
            self._bytes += event.size
            self.taken += event.size
        for seq in [seq for seq in self._early if seq <= self.head]:
            del self._early[seq]
        while self._events and (len(self._events) > self._max_events or self._bytes > self._max_bytes):
            dropped = self._events.popleft()
            self._bytes -= dropped.size
            self.base = dropped.seq
        if self.head != before:
            if not self._events:
                self.base = self.head
            for subscriber in self.subscribers:
                subscriber.wake()

    def after(self, seq: int, *, limit: int) -> list[LoggedEvent] | None:
        """Return up to `limit` events after a position, or None when the ring no longer has them."""
        if seq < self.base:
            return None
        missing = self.head - seq
        if missing == 1:
            return [self._events[-1]]
        start = len(self._events) - missing
        return [self._events[index] for index in range(start, min(start + limit, len(self._events)))]
