"""Moving every client away before a process stops, so that they go over one by one and lose nothing.

Each connection is asked to open its next one elsewhere while this one still serves (`goaway`), and is closed with 1012
only when it has not left by its deadline. Streams over HTTP cannot be asked; they end at theirs and say so.
"""

import asyncio
import logging
import random
import time

from parley.realtime.connection import Connection
from parley.realtime.frames import Close
from parley.realtime.service import Holder, Realtime

logger = logging.getLogger(__name__)

PER_SECOND = 50
"""How many clients are asked to move each second, where the window is long enough for that."""

_JITTER_MS = 250


async def drain(realtime: Realtime, *, window_s: float, deadline_s: float) -> None:
    """Ask every connection to move, and end those that stay, and the streams.

    From now on no `hello` is taken. The askings are spread evenly, 50 a second or as many as the window demands; each
    connection then has `deadline_s` to leave, less at the end of the window. Returns when the last one is gone, at the
    latest after `window_s`; what was left then has been told to close. Both are in seconds.
    """
    realtime.draining = True
    holders: list[Holder] = [*realtime.connections, *realtime.streams]
    # In no order that clients share: those of one user would move together.
    random.shuffle(holders)
    began = time.monotonic()
    spread_s = min(max(window_s - deadline_s, 0), len(holders) / PER_SECOND)
    logger.info("moving clients away", extra={"count": len(holders), "spread_s": spread_s})
    loop = asyncio.get_running_loop()
    ends: list[asyncio.TimerHandle] = []
    try:
        async with asyncio.timeout(window_s):
            for number, holder in enumerate(holders):
                if (wait := began + spread_s * number / len(holders) - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                left_s = max(min(deadline_s, began + window_s - time.monotonic()), 0)
                if holder in realtime.connections and isinstance(holder, Connection):
                    _ask(holder, deadline_s=left_s)
                ends.append(loop.call_later(left_s, holder.end, Close.RESTART, "restart"))
            await realtime.emptied()
    except TimeoutError:
        logger.info("clients stayed to the end", extra={"count": len(realtime.connections) + len(realtime.streams)})
    finally:
        for handle in ends:
            handle.cancel()
        for holder in [*realtime.connections, *realtime.streams]:
            holder.end(Close.RESTART, "restart")


def _ask(connection: Connection, *, deadline_s: float) -> None:
    # They are asked one after the other: a moment is enough to keep those of the same instant apart.
    after_ms = min(random.randint(0, _JITTER_MS), int(deadline_s * 500))
    connection.say_goaway("deploy", reconnect_after_ms=after_ms, deadline_ms=int(deadline_s * 1000))
