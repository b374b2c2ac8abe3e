"""What bounds one connection: how fast it may ask, how much it may leave unacknowledged, and how it ends."""

import time
from collections import deque

from parley.realtime.cursor import Cursor


class Closing(Exception):
    """Close the socket with a code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Subscription:
    """A cursor, and what the client has acknowledged of it."""

    __slots__ = ("_outstanding", "cursor", "live_sent", "unacked")

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.live_sent = False
        self.unacked = 0
        self._outstanding: deque[tuple[int, int]] = deque()

    def sent(self, seq: int, size: int) -> None:
        self._outstanding.append((seq, size))
        self.unacked += size

    def acked(self, seq: int) -> bool:
        """Note an acknowledgement; returns whether it was progress."""
        before = self.unacked
        while self._outstanding and self._outstanding[0][0] <= seq:
            self.unacked -= self._outstanding.popleft()[1]
        return self.unacked < before


class Bucket:
    """A token bucket: `rate` a second, `burst` at once."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._level, self._at = rate, burst, burst, time.monotonic()

    def take(self) -> float:
        """Take one; returns 0, or in how many seconds there will be one."""
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0
        return (1 - self._level) / self._rate
