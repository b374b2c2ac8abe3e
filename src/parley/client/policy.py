"""What a client does when a connection ends (docs/protocol.md, section 5)."""

from collections.abc import Callable
from dataclasses import dataclass

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 20.0
OVERLOADED_S = 5.0

NORMAL = 1000
ABNORMAL = 1006
PROTOCOL_ERROR = 1002
GOAWAY = 1012
OVERLOADED = 1013
UNAUTHENTICATED = 4401
NO_HELLO = 4408
TOO_MANY = 4429

# 1002, 1003, 1007, 1009: we and the server disagree about the protocol; the same again would end the same.
_STOP = frozenset({NORMAL, PROTOCOL_ERROR, 1003, 1007, 1009, 1010})


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection, or the attempt to make one, ended.

    `code` is the close code; below 1000, the HTTP status that the upgrade or the credential was refused with.
    `retry_after_s` is what the server asked for.
    """

    code: int
    reason: str = ""
    retry_after_s: float | None = None


def backoff_s(failures: int, random: Callable[[], float]) -> float:
    """Return random(0, min(20 s, 0.5 s · 2ⁿ))."""
    return random() * min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(failures, 16))


def next_attempt_s(ending: Ending, *, failures: int, refused: bool, random: Callable[[], float]) -> float | None:
    """Return in how many seconds to connect again and resume, or None to stop.

    `failures` counts the attempts in a row that brought nothing; `refused`: the credential before was refused too.
    """
    if not _is_retried(ending.code, refused=refused):
        return None
    least = OVERLOADED_S if ending.code == OVERLOADED else 0.0
    if ending.retry_after_s is not None:
        return max(least, ending.retry_after_s)
    # On top of the least: all who were sent away at once do not come back at once.
    return least + backoff_s(failures, random)


def is_final(ending: Ending) -> bool:
    """Return whether there is no coming back, with a new credential either."""
    return not _is_retried(ending.code, refused=False)


def _is_retried(code: int, *, refused: bool) -> bool:
    if code < 1000:
        return not (400 <= code < 500) or code in {408, 425, 429}
    if code in _STOP:
        return False
    if code == UNAUTHENTICATED:
        return not refused
    return code < 4400 or code in {NO_HELLO, TOO_MANY}
