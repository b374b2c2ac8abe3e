"""The port of whoever works the outbox off."""

from typing import Protocol


class Dispatcher(Protocol):
    """Takes due jobs and has them done, at least once each. One of them runs in every process."""

    async def start(self) -> None:
        """Begin to take jobs."""
        ...

    async def close(self) -> None:
        """Take no more; let what runs end, within bounds, and hand the rest back. Before the database closes."""
        ...
