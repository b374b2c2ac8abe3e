"""A connection of its own on which notifications of PostgreSQL are heard; tried again until it holds.

What is notified while nobody listens is gone. Whoever needs to know that looks at everything anew in `listening`.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import asyncpg

from parley.core.db import Database

logger = logging.getLogger(__name__)

_PING_S = 0.5
_PING_TIMEOUT_S = 0.5
_BACK_OFF_S = (0.1, 0.2, 0.4, 0.8, 1.5)


class Listening:
    """Hands the text of each notification of one channel to `heard`, which must not fail or block.

    `listening` is called each time the connection has begun to listen, the first time included.
    """

    def __init__(
        self, database: Database, channel: str, heard: Callable[[str], None], *, listening: Callable[[], None]
    ) -> None:
        self._database = database
        self._channel = channel
        self._heard = heard
        self._listening = listening
        self._task: asyncio.Task[None] | None = None
        self._connection: asyncpg.Connection | None = None
        self.is_listening = False

    async def start(self) -> None:
        """Begin to listen. Returns when this process hears, or when a first try has failed."""
        first = asyncio.Event()
        self._task = asyncio.create_task(self._listen(first), name=f"listening-{self._channel}")
        await first.wait()

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _listen(self, first: asyncio.Event) -> None:
        failures = 0
        while True:
            try:
                self._connection = connection = await self._database.connect_system()
                await connection.add_listener(self._channel, self._hand_on)
                self.is_listening = True
                failures = 0
                self._listening()
                first.set()
                while True:
                    await asyncio.sleep(_PING_S)
                    # A connection that is cut on the way stays silent for ever.
                    async with asyncio.timeout(_PING_TIMEOUT_S):
                        await connection.execute("SELECT 1")
            except Exception as error:  # noqa: BLE001 - whatever it is, this process must hear again
                logger.warning("not listening to %s", self._channel, extra={"cause": type(error).__name__})
            finally:
                self.is_listening = False
                first.set()
                if self._connection is not None:
                    self._connection.terminate()
                    self._connection = None
            await asyncio.sleep(_BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)])
            failures += 1

    def _hand_on(self, _connection: object, _pid: int, _channel: str, text: Any) -> None:
        self._heard(str(text))
