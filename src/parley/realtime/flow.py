"""What bounds one connection: how fast it may ask, how much it may leave unacknowledged, and how it ends."""

import time

from parley.realtime.conflation import MIN_HZ
from parley.realtime.cursor import Cursor

TURN_BYTES = 32 * 1024
"""How much of a channel is sent before it is another one's turn."""

_GRAIN_BYTES = 4096


class Closing(Exception):
    """Close the socket with a code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Subscription:
    """A cursor, and what the client has acknowledged of it.

    `max_hz` slows down a channel whose intermediate values do not count; a log is sent as it comes.
    """

    __slots__ = ("_outstanding", "cursor", "held", "live_sent", "pause_s", "rests", "turn_left", "unacked")

    def __init__(self, cursor: Cursor, *, max_hz: float | None = None) -> None:
        self.cursor = cursor
        self.live_sent = False
        self.turn_left = TURN_BYTES
        self.unacked = 0
        self.pause_s = 0.0 if max_hz is None or cursor.mode == "log" else 1 / max(max_hz, MIN_HZ)
        self.rests = False
        self.held = False
        # Positions and bytes. A list: ten thousand idle connections have ten thousand empty ones.
        self._outstanding: list[tuple[int, int]] = []

    def sent(self, seq: int, size: int) -> None:
        """Note what went out. Small frames count together, so that there are never many."""
        self.unacked += size
        if self._outstanding and self._outstanding[-1][1] < _GRAIN_BYTES:
            size += self._outstanding.pop()[1]
        self._outstanding.append((seq, size))

    def acked(self, seq: int) -> int:
        """Note an acknowledgement; returns how many bytes it was for."""
        before = self.unacked
        while self._outstanding and self._outstanding[0][0] <= seq:
            self.unacked -= self._outstanding.pop(0)[1]
        return before - self.unacked


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
