"""Asking for approvals, waiting for them, and giving them, whichever process each happens in.

The row is the truth: whoever waits is woken when an answer is committed, here at once and elsewhere by a word on the
bus, and looks at the row every few seconds in case the word was lost.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from parley.chat.approvals.errors import AlreadyDecided, NoLongerWaiting, ToolCallNotFound
from parley.chat.approvals.repository import ApprovalRepository, Asked, Waiting
from parley.chat.approvals.schemas import ApprovalRead
from parley.chat.repository import MessageRepository
from parley.chat.tools import ToolBox
from parley.core import clock
from parley.core.db import Database
from parley.core.error_handlers import translate
from parley.core.errors import Unavailable
from parley.core.scope import Scope
from parley.realtime.bus import Bus
from parley.realtime.runs import Run

logger = logging.getLogger(__name__)

WORD = "approval"
"""What is said on the bus when a call was decided."""

_POLL_S = 2.0
_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call was decided. `arguments` are the ones that it was decided for; None when there is nothing to call."""

    approved: bool
    arguments: dict[str, Any] | None
    reason: str = ""
    """Why not, for the model."""


class Approvals:
    """The approvals of one process."""

    def __init__(self, database: Database, bus: Bus, tools: ToolBox, *, life_s: float, poll_s: float = _POLL_S) -> None:
        self._database = database
        self._bus = bus
        self._tools = tools
        self._life = timedelta(seconds=life_s)
        self._poll_s = poll_s
        self._waiting: dict[UUID, asyncio.Event] = {}
        self._draining = False

    # -- whoever writes the reply ----------------------------------------------------------------------------------

    async def ask(self, run: Run, calls: Sequence[Asked]) -> None:
        """Store that calls wait. To be committed before anyone is shown that they do.

        A reply outlasts a database that is away for a while: it is tried until it is done.
        """
        while True:
            try:
                async with self._database.unit_of_work(run.scope) as unit:
                    await ApprovalRepository(unit, run.scope).ask(run.reply_id, calls, life=self._life)
                return
            except Unavailable as error:
                logger.warning("calls that wait could not be stored", extra={"cause": type(error).__name__})
                await asyncio.sleep(_AGAIN_S)

    async def answer(self, run: Run, call: UUID, *, busy: Callable[[], bool]) -> Answer:
        """Return how a call was decided; waits for it. Nobody's answer is a no when its time is over.

        While this process stops the reply is given to another one, which waits on: it may take longer than a stop may.
        Not while it is `busy` with calls that nobody has to approve.
        """
        heard = asyncio.Event()
        self._waiting[call] = heard
        try:
            while True:
                heard.clear()
                if self._draining and not busy():
                    run.signal(handed_over=True)
                waiting = await self._look(run, call)
                if waiting is not None and (answer := _answer(waiting)) is not None:
                    return answer
                try:
                    async with asyncio.timeout(self._pause_s(waiting)):
                        await heard.wait()
                except TimeoutError:
                    continue
        finally:
            # The reply may have been lost, and be this process's again: then another one waits by now.
            if self._waiting.get(call) is heard:
                del self._waiting[call]

    async def _look(self, run: Run, call: UUID) -> Waiting | None:
        """Return a call as it stands, or None when it cannot be looked at just now."""
        try:
            async with self._database.unit_of_work(run.scope) as unit:
                approvals = ApprovalRepository(unit, run.scope)
                waiting = await approvals.find(call)
                if waiting is None:
                    raise ToolCallNotFound
                if waiting.approved is None and waiting.is_over:
                    await approvals.expire(call)
                    waiting = await approvals.find(call)
                return waiting
        except ToolCallNotFound:
            raise
        except Exception as error:
            if translate(error) is None:
                raise
            logger.warning("an approval could not be looked at", extra={"cause": type(error).__name__})
            return None

    def _pause_s(self, waiting: Waiting | None) -> float:
        left = (waiting.expires_at - clock.now()).total_seconds() if waiting is not None else self._poll_s
        return min(self._poll_s, max(left, 0.05))

    def decided(self, call: UUID) -> None:
        """Look at a call again that waits here, if it does: somebody has decided it."""
        if (heard := self._waiting.get(call)) is not None:
            heard.set()

    def drain(self) -> None:
        """Give every reply that waits here, and every one that comes to wait, to another process."""
        self._draining = True
        for heard in self._waiting.values():
            heard.set()

    @property
    def waiting(self) -> int:
        """How many calls wait here."""
        return len(self._waiting)

    # -- whoever decides -------------------------------------------------------------------------------------------

    async def decide(self, scope: Scope, call: UUID, *, approved: bool, reply: UUID | None = None) -> ApprovalRead:
        """Say yes or no to a call, durably: the first answer holds, the same one again is harmless.

        Only whoever asked for the reply may: the call runs with their rights. A yes needs the tool's permission too,
        so that a key lets nothing through that it could not do itself. Raises `ToolCallNotFound`, `Forbidden`,
        `AlreadyDecided`, `NoLongerWaiting`.
        """
        async with self._database.unit_of_work(scope) as unit:
            approvals = ApprovalRepository(unit, scope)
            found = await approvals.find(call)
            if found is None or (reply is not None and found.reply_id != reply):
                raise ToolCallNotFound
            run = await MessageRepository(unit, scope).find_run(found.reply_id)
            if run is None:
                raise ToolCallNotFound
            if approved and (tool := self._tools.find(found.tool)) is not None:
                scope.require(tool.permission)
            if found.approved is None:
                if run["status"] != "streaming":
                    raise NoLongerWaiting
                if await approvals.decide(call, approved=approved):
                    unit.after_commit(self._announcing(call))
                    return ApprovalRead(call=call, reply=found.reply_id, approved=approved)
                found = await approvals.find(call)
            _check(found, approved=approved)
            assert found is not None
            return ApprovalRead(call=call, reply=found.reply_id, approved=approved)

    def _announcing(self, call: UUID) -> Callable[[], None]:
        def announce() -> None:
            self.decided(call)
            self._bus.call(WORD, call)

        return announce


def _check(found: Waiting | None, *, approved: bool) -> None:
    """Raise unless a call was decided by someone, and this way."""
    if found is None:
        raise ToolCallNotFound
    if found.approved is None or found.decided_by is None:
        raise NoLongerWaiting
    if found.approved != approved:
        raise AlreadyDecided


def _answer(waiting: Waiting) -> Answer | None:
    if waiting.approved is None:
        return None
    if waiting.approved and not waiting.is_unchanged:
        return Answer(False, None, "The arguments are not the ones that were approved. The call was not made.")
    if waiting.approved:
        return Answer(True, waiting.arguments)
    if waiting.decided_by is None:
        return Answer(False, None, "Nobody approved this call in time. It was not made.")
    return Answer(False, None, "The user refused this call. It was not made: do not try it again unless they ask.")
