"""Limits on guessing passwords, which never keep the owner out.

Failures count for account and address together, and for the address alone; a stranger elsewhere does not touch the
owner's counter, and a known device has one of its own. After a hundred failures in a row an account's password is
taken only where its owner has been before; a reset by mail is always possible. Unknown accounts count alike.
"""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from parley.core.api_limits import network_of
from parley.core.origin import current_origin
from parley.core.rate_limits import Limit, RateLimits, TooMany
from parley.core.settings import LimitSettings

_WINDOW_S = 15 * 60
IN_A_ROW = 100
_IN_A_ROW_S = 30 * 24 * 3600
_RETRY_S = 3600


@dataclass
class Attempt:
    """A try that is under way. Whoever finds the password right says so with `succeeded`."""

    succeeded: bool = False


class Guessing:
    """Counts failed sign-ins."""

    def __init__(self, limits: RateLimits, settings: LimitSettings) -> None:
        self._limits = limits
        self._pair = Limit("signin", settings.signin_failures, _WINDOW_S)
        self._address = Limit("signin-address", settings.signin_failures_per_address, _WINDOW_S)
        self._row = Limit("signin-row", IN_A_ROW, _IN_A_ROW_S)
        # Tries of this process that are not decided yet count as failures of their address.
        self._under_way: Counter[str] = Counter()

    @asynccontextmanager
    async def attempt(
        self, account: str, *, known_device: bool, failures: int | None, known_place: bool
    ) -> AsyncIterator[Attempt]:
        """Allow one try at an account's password, or raise `TooMany`.

        `account` is the folded address, whether or not it exists. `failures` is how many there were in a row, None
        for an account that does not exist. `known_place`: the owner has been let in from here before.
        """
        account = hashlib.sha256(account.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        place = network_of(current_origin().address)
        row = failures if failures is not None else await self._counted(account)
        if row >= IN_A_ROW and not (known_device or known_place) and self._limits.enabled:
            raise TooMany(self._row, retry_after_s=_RETRY_S)
        pair = (account, "device" if known_device else place)
        attempt = Attempt()
        # Counted before the password is looked at, so that tries at the same time cannot pass together.
        others = self._under_way[place]
        self._under_way[place] += 1
        try:
            if not known_device:
                await self._limits.require(self._address, place, more_than=others)
            await self._limits.hit(self._pair, *pair)
            yield attempt
        finally:
            self._under_way[place] -= 1
            if not self._under_way[place]:
                del self._under_way[place]
        # Not after an error of ours: nobody has guessed then.
        if attempt.succeeded:
            await self._limits.clear(self._pair, *pair)
            await self._limits.clear(self._row, account)
        elif not known_device:
            await self._note_failure(place, account, known=failures is not None)

    async def _note_failure(self, place: str, account: str, *, known: bool) -> None:
        with suppress(TooMany):
            await self._limits.hit(self._address, place)
        if not known:
            with suppress(TooMany):
                await self._limits.hit(self._row, account)

    async def _counted(self, account: str) -> int:
        room = await self._limits.peek(self._row, account)
        return 0 if room is None else IN_A_ROW - room.remaining
