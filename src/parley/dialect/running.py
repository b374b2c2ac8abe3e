"""Which calls run in this process: bounded by user, ended with their credential, waited for when the process leaves."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from parley.core.errors import AppError, Unauthenticated, Unavailable
from parley.core.revocations import Revocation
from parley.core.scope import Authenticator, Scope
from parley.dialect.errors import TooManyCalls
from parley.tenancy.permissions import Permission

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1
_CLOSING_S = 5.0


class RunningCall:
    """One of them."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._why: AppError | None = None
        self._then: Callable[[AppError], None] | None = None

    def when_ended(self, then: Callable[[AppError], None]) -> None:
        """Have something done when the call is to end, or now if it is already."""
        self._then = then
        if self._why is not None:
            then(self._why)

    def end(self, why: AppError) -> None:
        """Say that the call is to end."""
        self._why = why
        if self._then is not None:
            self._then(why)

    def revoke(self) -> None:
        """End the call because its credential has ended."""
        self.end(Unauthenticated("The credential of this call does not hold any more."))


class RunningCalls:
    """The running calls of this process. `most` is how many one user may have; None when limits are off."""

    def __init__(self, authenticator: Authenticator, *, most: int | None) -> None:
        self._authenticator = authenticator
        self._most = most
        self._running: set[RunningCall] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._none_left = asyncio.Event()

    @contextmanager
    def one_more(self, scope: Scope) -> Iterator[RunningCall]:
        """Count a call for the length of the block. Raises `TooManyCalls`, `Unavailable` when the process leaves."""
        if self._leaving:
            raise Unavailable("This process is about to stop.", retry_after_s=_RETRY_AFTER_S)
        # By user and not by key: who makes many keys has no more.
        if self._most is not None and self.of_user(scope) >= self._most:
            raise TooManyCalls(retry_after_s=_RETRY_AFTER_S)
        call = RunningCall(scope)
        self._running.add(call)
        try:
            yield call
        finally:
            self._running.discard(call)
            if not self._running:
                self._none_left.set()

    def of_user(self, scope: Scope) -> int:
        """Return how many calls a scope's user has running."""
        return sum(call.scope.user_id == scope.user_id for call in self._running)

    @property
    def total(self) -> int:
        """How many calls run in this process."""
        return len(self._running)

    def revoke(self, revocation: Revocation) -> None:
        """End the calls that rest on what was revoked; those whose rights may only have changed are looked at."""
        concerned = [call for call in self._running if revocation.concerns(call.scope)]
        if revocation.kind == "membership":
            self._look_again(concerned)
        else:
            for call in concerned:
                call.revoke()

    def look_at_everything(self) -> None:
        """Look at every call: revocations may have been missed."""
        self._look_again(list(self._running))

    def _look_again(self, calls: Sequence[RunningCall]) -> None:
        if calls:
            task = asyncio.create_task(self._reauthenticate(calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _reauthenticate(self, calls: Sequence[RunningCall]) -> None:
        for call in calls:
            try:
                credential = await self._authenticator.reauthenticate(call.scope)
            except Unauthenticated:
                call.revoke()
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are looked at too
                # It ends by itself within minutes, and the next request is verified.
                logger.warning("a call could not be looked at again", extra={"cause": type(error).__name__})
            else:
                if Permission.MODELS_CALL not in credential.scope.permissions:
                    call.revoke()

    async def drain(self, drain_s: float) -> None:
        """Take no more calls, let the running ones go on for so long, and end the rest."""
        self._leaving = True
        await self._emptied(drain_s)
        for call in list(self._running):
            call.end(Unavailable("This process stops.", retry_after_s=_RETRY_AFTER_S))
        await self.close()

    async def close(self) -> None:
        """Wait for calls that have been ended to be counted. Call before the database closes."""
        # The sweep of the ledger finds what those had reserved that do not end.
        await self._emptied(_CLOSING_S)

    async def _emptied(self, within_s: float) -> None:
        if not self._running:
            return
        self._none_left.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._none_left.wait()
