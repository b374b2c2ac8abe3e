"""A model call that is not a reply's: reserved on entering, settled on leaving."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from uuid import UUID

from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.llm.ports import ModelRequest
from parley.llm.registry import ModelEntry
from parley.llm.retry import BACKOFF_CAP_S
from parley.usage.accounts import Accounts
from parley.usage.bills import Bill, Estimate
from parley.usage.calls import ModelCall
from parley.usage.errors import OverBudget
from parley.usage.ledger import Purpose

# A call that was left is settled some moments later, and what is done with an answer meanwhile takes its time.
_MARGIN_S = 120.0


class MeteredCall:
    """Calls a model within the budgets: enter it for the `ModelCall`, leave it to settle."""

    def __init__(
        self,
        accounts: Accounts,
        scope: Scope,
        call: ModelCall,
        request: ModelRequest,
        *,
        purpose: Purpose,
        conversation_id: UUID | None,
        message_id: UUID | None,
    ) -> None:
        self._accounts = accounts
        self._scope = scope
        self._call = call
        self._request = request
        self._bill = Bill.of(new_id(), scope, purpose, conversation_id=conversation_id, message_id=message_id)

    @property
    def entries(self) -> Sequence[ModelEntry]:
        """The models that may answer, the one that was asked for first. Nothing is reserved before it is entered."""
        return self._call.entries

    async def __aenter__(self) -> ModelCall:
        """Reserve. Raises `OverBudget`."""
        estimate = Estimate.of_request(self.entries, self._request)
        try:
            async with self._accounts.database.unit_of_work(self._scope) as unit:
                await self._accounts.reserve(unit, self._bill, estimate, expires_in=_longest(self.entries))
        except OverBudget:
            raise
        except BaseException:
            # The commit may have been made all the same.
            self._accounts.settle_later(self._scope, self._bill, ())
            raise
        return self._call

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._call.aclose()
        finally:
            # Whoever is cancelled here leaves, and the call is settled all the same.
            await asyncio.shield(self._accounts.settle_later(self._scope, self._bill, self._call.records))


def _longest(entries: Sequence[ModelEntry]) -> timedelta:
    """Return how long a call may take at most, with all its attempts and the pauses between them."""
    seconds = sum((entry.retries + 1) * (entry.timeouts.total + BACKOFF_CAP_S) for entry in entries)
    return timedelta(seconds=seconds + _MARGIN_S)
