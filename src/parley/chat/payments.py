"""What replies cost: reserved with the question, stored step by step, settled with the end.

A reply's usage and cost are always the sum of its rows in the ledger.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson

from parley.chat.endings import Ending, Stopped, failure
from parley.chat.history import IMAGES
from parley.chat.messages import conversation_of
from parley.chat.repository import MessageRepository
from parley.chat.resuming import Step
from parley.chat.written import UNSETTLED, Written
from parley.core.db import Database, UnitOfWork
from parley.core.error_handlers import translate
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.llm.errors import ModelNotUsable, UnknownModel
from parley.llm.ports import ModelRequest, UsageChunk
from parley.llm.registry import ModelEntry, ModelRegistry
from parley.realtime.events import Channel
from parley.realtime.runs import Run
from parley.usage.accounts import Accounts, abandon_reservations
from parley.usage.bills import Bill, Estimate, lost_record
from parley.usage.errors import OverBudget
from parley.usage.ledger import CallRecord, CallStatus, Purpose, Totals
from parley.usage.pricing import cost_of, input_tokens_of, tokens_of

logger = logging.getLogger(__name__)

_WAITING = "SELECT id FROM replies WHERE workspace_id = $1 AND channel = $2 AND status = 'queued' ORDER BY id"

# How a stored part names an attachment, whose own size the part does not have.
_ATTACHED = b'"attachment"'


def bill_of(run: Run) -> Bill:
    """Return what a reply's calls are paid as."""
    return bill_for(run.scope, run.reply_id, conversation_of(run.channel.name))


def bill_for(scope: Scope, reply_id: UUID, conversation_id: UUID | None) -> Bill:
    """Return what a reply's calls are paid as."""
    return Bill.of(reply_id, scope, Purpose.REPLY, conversation_id=conversation_id, message_id=reply_id)


class Payments:
    """Reserves and settles what replies cost."""

    def __init__(self, database: Database, accounts: Accounts, models: Callable[[Scope], ModelRegistry]) -> None:
        self._database = database
        self._accounts = accounts
        self._models = models

    @property
    def bounded(self) -> bool:
        """Whether a workspace without budgets is bound all the same: by the operator."""
        return bool(self._accounts.ceilings)

    # -- in the transactions of others, as their last statement ----------------------------------------------------

    async def reserve(
        self, unit: UnitOfWork, run: Run, history: str, *, question: dict[str, Any] | None = None
    ) -> None:
        """Set aside what the first call of a new reply costs at most. `history` is what was said before, as stored.

        Raises `OverBudget`.
        """
        entries = self._entries(run.scope, run.options["model"])
        said = history.encode() + orjson.dumps(question["parts"] if question else [])
        said += (run.assistant or {}).get("instructions", "").encode()
        attached = _ATTACHED in said
        estimate = (
            Estimate.of_full_context(entries, images=IMAGES) if attached else Estimate.of_bytes(entries, len(said))
        )
        await self._accounts.reserve(unit, bill_of(run), estimate)

    async def settle(self, unit: UnitOfWork, bill: Bill, records: Sequence[CallRecord] = ()) -> None:
        """Store a reply's records and give back what was reserved for it."""
        await self._accounts.settle(unit, bill, records)

    async def complete(self, unit: UnitOfWork, run: Run, end: Ending) -> Ending:
        """Return an ending with what the whole reply used, by this process and by those before it."""
        totals = await self._accounts.totals(unit, run.reply_id, end.records, stored=run.attempt > 1)
        usage = {
            "input_tokens": totals.input_tokens,
            "cached_tokens": totals.cached_tokens,
            "output_tokens": totals.output_tokens,
        }
        return replace(end, usage=usage, cost=totals.cost)

    async def cost_so_far(self, run: Run, records: Sequence[CallRecord]) -> Decimal:
        """Return what a reply has cost, in dollars: by this process, whose `records` these are, and by those before."""
        if run.attempt == 1:
            return Totals.of(records).cost
        async with self._database.unit_of_work(run.scope) as unit:
            return (await self._accounts.totals(unit, run.reply_id, records, stored=True)).cost

    # -- in transactions of their own ------------------------------------------------------------------------------

    async def store_step(self, run: Run, records: Sequence[CallRecord]) -> None:
        """Store the records of a call that has ended, before its tool calls are made.

        What was reserved is given back: tools take their time, and so do people who approve them.
        """

        async def store() -> None:
            async with self._database.unit_of_work(run.scope) as unit:
                await self._accounts.settle(unit, bill_of(run), records)

        await _surely(store)

    async def store_ended(self, run: Run, records: Sequence[CallRecord]) -> None:
        """Store what has ended of a reply that another process goes on with: what was running it counts itself."""
        ended = [record for record in records if record.status is not CallStatus.STOPPED]
        # Not under the reservation, which stays for whoever goes on.
        bill = replace(bill_of(run), id=new_id())

        async def store() -> None:
            async with self._database.unit_of_work(run.scope) as unit:
                await self._accounts.settle(unit, bill, ended)

        if ended:
            await _surely(store)

    async def reserve_step(
        self, run: Run, model: str | None, request: ModelRequest, records: Sequence[CallRecord]
    ) -> None:
        """Reserve the next call of a reply, after storing the records of those before.

        Raises `Stopped` when a budget has nothing left.
        """
        estimate = Estimate.of_request(self._entries(run.scope, model), request)
        over: list[OverBudget] = []

        async def settle() -> None:
            over.clear()
            async with self._database.unit_of_work(run.scope) as unit:
                if records:
                    await self._accounts.settle(unit, bill_of(run), records)
                try:
                    await self._accounts.reserve(unit, bill_of(run), estimate)
                except OverBudget as error:
                    # What was settled stays settled.
                    over.append(error)

        await _surely(settle)
        if over:
            raise Stopped(failure("over_budget", over[0].detail, retryable=False))

    async def settle_alone(self, run: Run, records: Sequence[CallRecord]) -> None:
        """Settle a reply that is no more: its conversation was deleted while it was being written."""
        try:
            async with self._database.unit_of_work(run.scope) as unit:
                await self._accounts.settle(unit, bill_of(run), records)
        except Exception as error:  # noqa: BLE001 - the workspace may be gone too, and with it the ledger
            logger.warning("a deleted reply was not settled", extra={"cause": type(error).__name__})

    # -- estimates -------------------------------------------------------------------------------------------------

    def lost(self, run: Run, model: str | None, request: ModelRequest, step: Step) -> CallRecord:
        """Return the record of a call that was lost with its process, after it had said a `step`."""
        return self._lost(run.scope, model, input_tokens_of(request), step)

    async def with_lost(self, unit: UnitOfWork, run: Run, end: Ending, written: Written) -> Ending:
        """Return the ending of a reply that nobody goes on with, with the call that was lost with its process."""
        if is_between_calls(written.parts):
            return end
        path = await MessageRepository(unit, run.scope).path_to(run.question_id)
        step = Step.last_of(written.parts)
        told = sum(len(str(parts)) for _, parts in path) + sum(len(str(part)) for part in step.before)
        lost = self._lost(run.scope, end.model, tokens_of(told), step)
        return replace(end, records=(*end.records, lost))

    def _lost(self, scope: Scope, model: str | None, input_tokens: int, step: Step) -> CallRecord:
        entry = self._entries(scope, model)[0]
        output_tokens = tokens_of(len(step.said) + step.reasoned)
        return lost_record(
            new_id(),
            model=entry.id,
            provider=entry.provider,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cost=cost_of(entry, UsageChunk(input_tokens=input_tokens, output_tokens=output_tokens)),
            own_key=entry.own_key,
        )

    def _entries(self, scope: Scope, model: str | None) -> list[ModelEntry]:
        registry = self._models(scope)
        try:
            entry = registry.resolve(model)
        except (UnknownModel, ModelNotUsable):
            # It was there when the reply began. The call will say so; what is reserved meanwhile is as good a guess.
            return list(registry.entries()[:1])
        return [entry, *registry.fallbacks(entry)]


def is_between_calls(parts: Iterable[dict[str, Any]]) -> bool:
    """Whether tools were running, or had still to be run: the model was not being asked then."""
    return any(part.get("state") in UNSETTLED for part in parts)


async def waiting_in(unit: UnitOfWork, channel: Channel) -> list[UUID]:
    """Return the replies of a channel that have not begun. Asked before the channel is forgotten."""
    connection = await unit.driver()
    return [row["id"] for row in await connection.fetch(_WAITING, *channel.address)]


async def abandon(unit: UnitOfWork, workspace_id: UUID, waiting: Mapping[UUID, Sequence[UUID]]) -> None:
    """Give back what was reserved in conversations that are deleted; the last statement but for the commit.

    `waiting` are the replies of each that had not begun. One that is being written is settled by its process, or else
    by the sweep.
    """
    for conversation_id, replies in sorted(waiting.items()):
        await abandon_reservations(unit, workspace_id, conversation_id, replies)


async def _surely(do: Callable[[], Awaitable[None]]) -> None:
    """Do something that may be done twice, however long the database is away."""
    delay_s = 0.1
    while True:
        try:
            return await do()
        except Exception as error:
            if translate(error) is None:
                raise
            logger.warning("what a reply costs could not be stored", extra={"cause": type(error).__name__})
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, 5.0)
