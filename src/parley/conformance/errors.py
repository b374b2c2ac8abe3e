"""How a check ends that does not pass."""


class Failed(Exception):
    """The server does not do what the protocol says. `frames` are the ones that show it."""

    def __init__(self, reason: str, *frames: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.frames = frames


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


class CannotStart(Exception):
    """There is nothing to check, or nobody to check it as; the message says what to do."""


def require(holds: object, reason: str, *frames: object) -> None:
    """Raise `Failed` unless it holds."""
    if not holds:
        raise Failed(reason, *frames)
