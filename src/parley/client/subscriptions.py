"""All channels of a client: when to subscribe again, and what the user is told."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from parley.client.channel import ChannelState
from parley.client.errors import ApiError
from parley.client.link import Frame, Link, Timing, encode
from parley.client.policy import backoff_s

# `hello` is at most 8 KiB with its credential: what does not fit follows as `sub` frames, no faster than is allowed.
_HELLO_BYTES = 8 * 1024 - 512
_AT_ONCE = 30
_PER_SECOND = 15
_MAX_REFUSALS = 6


class _Subscription:
    """A channel and what is under way for it. `asked` is the id of a `sub` that has no answer yet."""

    def __init__(self, ch: str, loop: asyncio.AbstractEventLoop) -> None:
        self.channel = ChannelState(ch)
        self.ready: asyncio.Future[None] = loop.create_future()
        self.asked: int | str | None = None
        self.head = -1
        self.arrived = loop.time()
        self.refusals = 0
        self.timer: asyncio.TimerHandle | None = None

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Subscriptions:
    """Keeps each channel's state current over connections that come and go."""

    def __init__(
        self,
        *,
        timing: Timing,
        next_id: Callable[[], int],
        random: Callable[[], float],
        on_event: Callable[[str, str, dict[str, Any]], None],
        on_snapshot: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._timing = timing
        self._next_id = next_id
        self._random = random
        self._on_event = on_event
        self._on_snapshot = on_snapshot
        self._held: dict[str, _Subscription] = {}
        self._link: Link | None = None
        self._loop = asyncio.get_running_loop()
        self._past_failures = 0

    @property
    def integrity_failures(self) -> int:
        """How often a reply's text was not what its end vouched for. Must stay 0."""
        return sum(held.channel.integrity_failures for held in self._held.values()) + self._past_failures

    @property
    def channels(self) -> dict[str, ChannelState]:
        """The channels that are subscribed."""
        return {ch: held.channel for ch, held in self._held.items()}

    # -- connections ---------------------------------------------------------------------------------------------

    def greeting(self, auth: dict[str, str]) -> list[Frame]:
        """Return the `subs` of a `hello` with this credential: one round trip resumes them."""
        subs: list[Frame] = []
        room = _HELLO_BYTES - len(encode(auth))
        for ch, held in self._held.items():
            sub = _sub(ch, held.channel)
            room -= len(encode(sub).encode()) + 1
            if room < 0:
                break
            subs.append(sub)
        return subs

    def adopt(self, link: Link, greeting: list[Frame]) -> None:
        """Go on over a new connection, whose `hello` had this greeting.

        While it was made, the one before may have gone on: channels were left or entered, positions moved.
        """
        self._link = link
        greeted = {sub["ch"]: sub.get("since") for sub in greeting}
        for ch in greeted.keys() - self._held.keys():
            link.send({"t": "unsub", "id": self._next_id(), "ch": ch})
        others = itertools.count(1)
        for ch, held in self._held.items():
            held.cancel_timer()
            # A replay does not help where the state was dropped meanwhile.
            helps = ch in greeted and (held.channel.last is not None or greeted[ch] is None)
            held.asked = "hello" if helps else None
            held.arrived = self._loop.time()
            if held.asked is None:
                delay = max(0, next(others) - _AT_ONCE) / _PER_SECOND
                held.timer = self._loop.call_later(delay, self._ask, held)

    def release(self) -> None:
        """The connection is gone."""
        self._link = None
        for held in self._held.values():
            held.asked = None
            held.cancel_timer()

    def close(self, error: Exception) -> None:
        """Give up: whoever waits for a channel is told why."""
        self.release()
        for held in self._held.values():
            self._fail(held, error)

    # -- the user's side -----------------------------------------------------------------------------------------

    async def subscribe(self, ch: str) -> dict[str, Any]:
        """Return a channel's state as soon as it is current. Raises `ApiError` when it is refused."""
        held = self._held.get(ch)
        if held is None:
            held = self._held[ch] = _Subscription(ch, self._loop)
            self._ask(held)
        await asyncio.shield(held.ready)
        return held.channel.state

    def unsubscribe(self, ch: str) -> bool:
        """Forget a channel. Returns whether it was there."""
        held = self._held.get(ch)
        if held is None:
            return False
        self._forget(held, ApiError(410, "unsubscribed", "The channel was unsubscribed."))
        return True

    # -- frames --------------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> bool:
        """Take a frame that is about a channel. Returns whether something was learnt."""
        held = self._held.get(frame["ch"])
        if held is None:
            return False
        held.arrived = self._loop.time()
        match frame["t"]:
            case "ev":
                return self._event(held, frame)
            case "snap":
                return self._snap(held, frame)
            case "subbed":
                held.asked = None
                held.refusals = 0
                held.channel.subbed(frame)
                return False
            case "live":
                return self._live(held)
            case "unsubbed":
                self._unsubbed(held, frame)
                return True
        return False

    def refused(self, frame: Frame) -> bool:
        """Take an `err`. Returns whether it was the answer to a `sub`."""
        held = self._held.get(frame.get("ch") or "")
        if held is None or held.asked is None or frame.get("id", "hello") != held.asked:
            return False
        if frame["code"] == "unauthenticated":
            return True  # the server closes next, and a new credential asks again
        held.asked = None
        held.refusals += 1
        if frame.get("retry", "never") == "never" or held.refusals > _MAX_REFUSALS:
            error = ApiError.from_frame(frame)
            if held.ready.done():
                self._on_event(held.channel.ch, "unsubbed", {"code": error.code})
            self._forget(held, error)
            return True
        after = frame.get("retry_after_ms")
        delay = after / 1000 if after is not None else backoff_s(held.refusals, self._random)
        held.cancel_timer()
        held.timer = self._loop.call_later(delay, self._ask, held)
        return True

    def heads(self, heads: dict[str, int]) -> None:
        """Rule 3: what the server's heartbeat says is there and has not come within two seconds is asked for."""
        for ch, head in heads.items():
            held = self._held.get(ch)
            if held is not None and held.channel.is_behind(head):
                held.head = max(held.head, head)
                if held.timer is None:
                    held.timer = self._loop.call_later(self._timing.stall_s, self._check_stall, held)

    def positions(self) -> dict[str, int]:
        """Return how far each channel is processed."""
        return {ch: held.channel.last for ch, held in self._held.items() if held.channel.last is not None}

    # -- parts ---------------------------------------------------------------------------------------------------

    def _event(self, held: _Subscription, frame: Frame) -> bool:
        channel = held.channel
        taken = channel.ev(frame)
        if taken.resubscribe:
            self._ask(held)
        self._processed(channel)
        if taken.applied and taken.d is not None:
            self._on_event(channel.ch, frame["e"], taken.d)
        return taken.applied

    def _snap(self, held: _Subscription, frame: Frame) -> bool:
        replaced = held.channel.snap(frame)
        if replaced is None:
            self._ask(held)
        elif replaced:
            held.head = frame["seq"]
            self._processed(held.channel)
            self._on_snapshot(held.channel.ch, held.channel.state)
        return bool(replaced)

    def _live(self, held: _Subscription) -> bool:
        if held.channel.last is None:
            return False
        if not held.ready.done():
            held.ready.set_result(None)
        return True

    def _processed(self, channel: ChannelState) -> None:
        if self._link is not None and channel.last is not None:
            self._link.processed(channel.ch, channel.last)

    def _ask(self, held: _Subscription) -> None:
        """Send `sub`, with `since` where a position holds; not while an answer is on its way."""
        held.cancel_timer()
        if self._link is None or held.asked is not None:
            return
        held.asked = self._next_id()
        self._link.send({"t": "sub", "id": held.asked, **_sub(held.channel.ch, held.channel)})

    def _check_stall(self, held: _Subscription) -> None:
        held.timer = None
        if not held.channel.is_behind(held.head):
            return
        quiet = self._loop.time() - held.arrived
        if quiet < self._timing.stall_s:
            held.timer = self._loop.call_later(self._timing.stall_s - quiet, self._check_stall, held)
            return
        held.asked = None
        self._ask(held)

    def _unsubbed(self, held: _Subscription, frame: Frame) -> None:
        if frame.get("retry", "never") == "never":
            self._on_event(held.channel.ch, "unsubbed", {"code": frame["code"]})
            self._forget(held, ApiError.from_frame(frame))
            return
        held.asked = None
        held.cancel_timer()
        held.timer = self._loop.call_later(backoff_s(0, self._random), self._ask, held)

    def _forget(self, held: _Subscription, error: Exception) -> None:
        held.cancel_timer()
        self._past_failures += held.channel.integrity_failures
        self._held.pop(held.channel.ch, None)
        self._fail(held, error)

    def _fail(self, held: _Subscription, error: Exception) -> None:
        if not held.ready.done():
            held.ready.set_exception(error)
            held.ready.exception()  # read: nobody may be waiting for it


def _sub(ch: str, channel: ChannelState) -> Frame:
    since = channel.since
    return {"ch": ch} if since is None else {"ch": ch, "since": since}
