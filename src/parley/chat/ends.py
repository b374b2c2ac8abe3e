"""The ends of replies: each has exactly one, whoever asks for it and however often."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import orjson

from parley.chat.endings import Ending, terminal_data
from parley.chat.errors import ReadOnly, ReplyNotFound
from parley.chat.messages import conversation_channel, message_json
from parley.chat.payments import Payments, bill_for, bill_of
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.scope import Scope
from parley.realtime import runs
from parley.realtime.bus import Bus
from parley.realtime.events import NewEvent
from parley.realtime.log import append
from parley.realtime.runs import Run
from parley.realtime.tick import TickWriter
from parley.usage.ledger import CallRecord

logger = logging.getLogger(__name__)


class Ends:
    """Ends replies."""

    def __init__(self, database: Database, bus: Bus, writer: TickWriter, payments: Payments) -> None:
        self._payments = payments
        self._database = database
        self._bus = bus
        self._writer = writer
        self.on_completed: Callable[[UnitOfWork, Run, dict[str, Any]], Awaitable[None]] | None = None
        """Told of each reply that is whole, with its row, in the transaction of its end."""

    async def finish(self, run: Run, ending: Ending) -> bool:
        """Store a reply's end with its last events. Returns whether the run was still ours.

        Raises `Unavailable` when the database is away: nothing has happened then, or all of it (`is_ended` tells).
        """
        async with self._database.unit_of_work(run.scope) as unit:
            if await self.finish_in(unit, run, ending):
                return True
            await unit.session.rollback()
        await self.left(run, ending.records)
        return False

    async def left(self, run: Run, records: Sequence[CallRecord]) -> None:
        """Settle a run that is not ours any more because it was deleted; one that another process has is its to settle.

        What fails here is settled by the sweep, with an estimate.
        """
        try:
            async with self._database.unit_of_work(run.scope) as unit:
                deleted = await MessageRepository(unit, run.scope).run_status(run.reply_id) is None
        except Exception as error:  # noqa: BLE001 - of any kind: there is nothing more to do for this run
            logger.warning("a lost run was not looked up", extra={"cause": type(error).__name__})
            return
        if deleted:
            await self._payments.settle_alone(run, records)

    async def finish_in(self, unit: UnitOfWork, run: Run, end: Ending) -> bool:
        """Store a reply's end in the unit's transaction; False, and the caller rolls back, when the run is not ours."""
        messages = MessageRepository(unit, run.scope)
        end = await self._payments.complete(unit, run, end)
        by = None
        if end.status == "cancelled":
            by = await messages.cancelled_by(run.reply_id) or run.scope.user_id
        row = await messages.finish(
            run.reply_id, orjson.dumps(end.parts).decode(), end.status, end.model,
            None if end.usage is None else orjson.dumps(end.usage).decode(), end.cost,
            None if end.error is None else orjson.dumps(end.error).decode(), clock.now(), end.prompt_path,
            end.prompt_hash,
        )  # fmt: skip
        if row is None:
            return False
        pending = list(run.buffer)
        run.emit(f"reply.{end.status}", terminal_data(run.reply_id, message_json(row), end, by))
        try:
            if not await self._writer.finish(unit, run, status=end.status):
                return False
        finally:
            run.buffer = pending
        await self._payments.settle(unit, bill_of(run), end.records)
        if end.status == "completed" and self.on_completed is not None:
            await self.on_completed(unit, run, row)
        return True

    async def release(self, run: Run) -> None:
        """Give a run up, so that the sweep of open replies ends it. What fails here leaves it to the next process."""
        run.signal(lost=True)
        try:
            async with self._database.unit_of_work(run.scope) as unit:
                await runs.release(unit, run)
            self._bus.call("sweep", run.reply_id)
        except Exception as error:
            logger.exception("a run could not be released", extra={"cause": type(error).__name__})

    async def is_ended(self, run: Run) -> bool:
        """Whether a reply has its end: asked when the outcome of a commit is not known."""
        async with self._database.unit_of_work(run.scope) as unit:
            # Whoever asked for it may have lost sight of it.
            status = await MessageRepository(unit, run.scope).run_status(run.reply_id)
            return status is None or status in runs.TERMINAL

    async def cancel(self, scope: Scope, reply_id: UUID) -> None:
        """Stop a reply, durably; one that has ended stays as it is. Raises `ReplyNotFound`."""
        async with self._database.unit_of_work(scope) as unit:
            messages = MessageRepository(unit, scope)
            found = await messages.find_run(reply_id)
            if found is None:
                raise ReplyNotFound
            if not found["writable"]:
                raise ReadOnly
            if found["status"] == "queued":
                await ConversationRepository(unit, scope).lock(found["conversation_id"])
                if await self._cancel_queued(unit, scope, found):
                    return
            await messages.request_cancel(reply_id)
            unit.after_commit(lambda: self._signal(reply_id))

    def _signal(self, reply_id: UUID) -> None:
        """Stop a run at once, wherever it is: the next tick would say it too, some seconds later."""
        if not self.cancel_here(reply_id):
            self._bus.call("cancel", reply_id)

    def cancel_here(self, reply_id: UUID) -> bool:
        """Stop a run whose cancellation is committed, if it is this process's."""
        run = self._writer.find(reply_id)
        if run is not None:
            run.signal(cancelled=True)
        return run is not None

    async def _cancel_queued(self, unit: UnitOfWork, scope: Scope, found: Any) -> bool:
        """End a reply that has not begun. False when it began meanwhile: the conversation's lock decides."""
        messages = MessageRepository(unit, scope)
        fresh = await messages.find_run(found["id"])
        if fresh is None or fresh["status"] != "queued":
            return False
        end = Ending(status="cancelled", parts=[])
        row = await messages.finish(
            found["id"], "[]", "cancelled", fresh["model"], None, None, None, clock.now(), None, None
        )
        if row is None:
            return False
        channel = conversation_channel(scope.workspace_id, found["conversation_id"])
        d = terminal_data(found["id"], message_json(row), end, scope.user_id)
        await append(unit, self._bus, [NewEvent(channel, "reply.cancelled", d)])
        if not await messages.end_queued(found["id"]):
            return False
        await self._payments.settle(unit, bill_for(scope, found["id"], found["conversation_id"]))
        return True
