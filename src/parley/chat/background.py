"""Looking after open replies whose process is gone."""

import asyncio
import logging
from contextlib import suppress

from parley.chat.turns import Turns
from parley.core.db import Database
from parley.realtime import runs
from parley.realtime.tick import TickWriter

logger = logging.getLogger(__name__)

_EVERY_S = 1.0


class ReplySweep:
    """Ends replies that nobody writes any more, and begins those that still wait: at start, then each second."""

    def __init__(self, database: Database, turns: Turns, writer: TickWriter) -> None:
        self._database = database
        self._turns = turns
        self._writer = writer
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._loop(), name="reply-sweep")

    async def close(self) -> None:
        """Stop."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def sweep(self) -> int:
        """Look once; return how many replies were found without a process."""
        async with self._database.system_unit_of_work() as unit:
            found = await runs.orphans(unit, owner=self._writer.owner)
        for orphan in found:
            if orphan.status == "streaming":
                await self._turns.fail_orphan(orphan)
                logger.warning("reply of a lost process ended", extra={"reply_id": str(orphan.reply_id)})
        for orphan in found:
            await self._turns.start_next(orphan.scope, orphan.channel)
        return len(found)

    async def _loop(self) -> None:
        while True:
            try:
                await self._writer.ensure_connected()
                await self.sweep()
            except Exception as error:  # noqa: BLE001 - the database may be away; the next round tries again
                logger.warning("sweep of open replies failed", extra={"cause": type(error).__name__})
            await asyncio.sleep(_EVERY_S)
