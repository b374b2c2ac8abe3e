"""The live connection: connects, resumes, sends once, and tells what happens."""

import asyncio
import itertools
import logging
import random as random_module
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID, uuid4

from parley.client.channel import ChannelState
from parley.client.errors import ApiError, ClientError, ConnectionStopped, ReplyGone, ServerUnreachable
from parley.client.events import SNAPSHOT, ConnectionChange, EventStream
from parley.client.link import Frame, Link, LinkFailed, Timing
from parley.client.policy import ABNORMAL, GOAWAY, UNAUTHENTICATED, Ending, is_final, next_attempt_s
from parley.client.requests import Requests
from parley.client.states import FINISHED, find_message
from parley.client.subscriptions import Subscriptions
from parley.realtime.fold import TERMINAL

logger = logging.getLogger(__name__)


class RealtimeClient:
    """A client of `parley.v1` that follows the client rule.

    `credentials` returns `{"ticket": …}`, `{"token": …}` or `{"api_key": …}` and is asked for each connection.
    Callbacks are plain functions: `on_event(channel, e, d)` once per event that was applied, in order, with the new
    part of `d` only; `on_snapshot(channel, state)`; `on_connection(change)`. Use it as a context, or call `start` and
    `aclose`. The states that it returns are its own: read them, do not change them.
    """

    def __init__(
        self,
        url: str,
        credentials: Callable[[], Awaitable[dict[str, str]]],
        *,
        on_event: Callable[[str, str, dict[str, Any]], None] | None = None,
        on_snapshot: Callable[[str, dict[str, Any]], None] | None = None,
        on_connection: Callable[[ConnectionChange], None] | None = None,
        name: str = "parley-python",
        timing: Timing | None = None,
        random: Callable[[], float] = random_module.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._url = url
        self._credentials = credentials
        self._on_event = on_event
        self._on_snapshot = on_snapshot
        self._on_connection = on_connection
        self._name = name
        self._timing = timing or Timing()
        self._random = random
        self._sleep = sleep
        self._link: Link | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._renewals: set[asyncio.Task[None]] = set()
        self._streams: set[EventStream] = set()
        self._replies: dict[str, set[asyncio.Future[dict[str, Any]]]] = {}
        self._connected = asyncio.Event()
        self._leftover: list[Link] = []
        self._stopped: ConnectionStopped | None = None
        self._failures = 0
        self._refused = False
        ids = itertools.count(1)
        self._requests = Requests(next_id=lambda: next(ids), random=random)
        self._subscriptions = Subscriptions(
            timing=self._timing, next_id=lambda: next(ids), random=random, on_event=self._event,
            on_snapshot=self._snapshot,
        )  # fmt: skip

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start."""
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()

    def start(self) -> None:
        """Begin to connect. What is asked meanwhile is sent when the connection is there."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._run(), name="parley-client")

    async def connected(self) -> None:
        """Wait for the connection. Raises `ConnectionStopped` when there will be none."""
        while self._stopped is None and self._link is None:
            self._connected.clear()
            await self._connected.wait()
        if self._stopped is not None:
            raise self._stopped

    async def aclose(self) -> None:
        """Close the connection and wait until nothing of this client runs. Who still waits gets an error."""
        for task in (*self._renewals, self._supervisor):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        if self._link is not None:
            link, self._link = self._link, None
            self._leftover.append(link)
        await self._tidy()
        self._stop(Ending(1000, "closed"))

    def drop(self) -> None:
        """Cut the TCP connection, as a network would: for tests of recovery."""
        if self._link is not None:
            self._link.abort()

    # -- what users do -------------------------------------------------------------------------------------------

    async def subscribe(self, ch: str) -> dict[str, Any]:
        """Follow a channel; returns its state once it is current. Raises `ApiError` when it is refused."""
        self._check()
        return await self._subscriptions.subscribe(ch)

    async def unsubscribe(self, ch: str) -> None:
        """Stop following a channel."""
        if self._subscriptions.unsubscribe(ch) and self._link is not None:
            with suppress(ApiError):  # not found, or the connection went: it is not subscribed either way
                await self._requests.ask({"t": "unsub", "ch": ch}, durable=False)

    async def send(
        self,
        ch: str,
        text: str,
        *,
        model: str | None = None,
        cid: UUID | str | None = None,
        parent: str | None = None,
        on_active: Literal["queue", "reject", "interrupt"] = "queue",
    ) -> dict[str, Any]:
        """Send a message; returns `{message, reply}`, the ids, once it is durable.

        It has one effect however often the connection breaks: it is repeated with the same `cid`.
        """
        self._check()
        frame: Frame = {
            "t": "chat.send",
            "ch": ch,
            "cid": str(cid or uuid4()),
            "parts": [{"type": "text", "text": text}],
            "on_active": on_active,
        }
        if parent is not None:
            frame["parent"] = parent
        if model is not None:
            frame["opts"] = {"model": model}
        return await self._requests.ask(frame, durable=True)

    async def cancel(self, reply: str) -> None:
        """Stop a reply, durably. Its `reply.cancelled` (or its own end, if that came first) follows as an event."""
        self._check()
        await self._requests.ask({"t": "reply.cancel", "reply": reply}, durable=True)

    async def approve(self, reply: str, call: str, *, approved: bool) -> dict[str, Any]:
        """Say yes or no to a tool call that waits; returns `{call, reply, approved}`. What comes of it are events.

        The first answer holds, whoever gives it where: the same one again is harmless, the other one an `ApiError`.
        """
        self._check()
        frame: Frame = {"t": "tool.approve", "reply": reply, "call": call, "approved": approved}
        return await self._requests.ask(frame, durable=True)

    async def continue_reply(self, reply: str, *, cid: UUID | str | None = None) -> dict[str, Any]:
        """Go on from where a reply stopped, in a reply of its own; returns `{message, reply}`, the ids.

        It has one effect however often the connection breaks: it is repeated with the same `cid`.
        """
        return await self._answer_again("reply.continue", reply, cid)

    async def regenerate_reply(self, reply: str, *, cid: UUID | str | None = None) -> dict[str, Any]:
        """Answer the same question once more; returns `{message, reply}`, the ids. One `cid`, one effect."""
        return await self._answer_again("reply.regenerate", reply, cid)

    async def _answer_again(self, t: str, reply: str, cid: UUID | str | None) -> dict[str, Any]:
        self._check()
        return await self._requests.ask({"t": t, "reply": reply, "cid": str(cid or uuid4())}, durable=True)

    def state(self, ch: str) -> dict[str, Any]:
        """Return a channel's state as it is now; empty before the first snapshot."""
        return self.channel(ch).state

    def channel(self, ch: str) -> ChannelState:
        """Return a channel with its position. Raises `KeyError` if it is not subscribed."""
        return self._subscriptions.channels[ch]

    @property
    def integrity_failures(self) -> int:
        """How often a reply's text was not what its end vouched for. Must stay 0."""
        return self._subscriptions.integrity_failures

    async def wait_terminal(self, reply: str) -> dict[str, Any]:
        """Return the whole message of a reply when it has ended. Its channel must be subscribed.

        Raises `ReplyGone` when it was deleted, `ConnectionStopped` when the client ends first.
        """
        self._check()
        for channel in self._subscriptions.channels.values():
            message = find_message(channel.state, reply)
            if message is not None and message["status"] in FINISHED:
                return message
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        waiting = self._replies.setdefault(reply, set())
        waiting.add(future)
        try:
            return await future
        finally:
            waiting.discard(future)
            if not waiting:
                self._replies.pop(reply, None)

    def events(self) -> EventStream:
        """Return an async iterator of all events from now on, and of `(channel, SNAPSHOT, state)`."""
        stream = EventStream(self._streams.discard)
        self._streams.add(stream)
        if self._stopped is not None:
            stream.end()
        return stream

    def _check(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    # -- connecting ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            ending = await self._attempt()
            while True:
                delay = next_attempt_s(ending, failures=self._failures, refused=self._refused, random=self._random)
                serving = self._serving
                if delay is None and serving is None:
                    self._stop(ending)
                    return
                self._failures += 1
                self._refused = self._refused or ending.code == UNAUTHENTICATED
                if delay is not None:
                    ending = await self._pause(delay, ending) or await self._attempt()
                elif serving is not None:
                    # The new connection is refused for good: the old one is used for as long as it lasts.
                    ending = await asyncio.shield(serving.ended)
        except Exception as error:
            logger.exception("the client failed")
            self._stop(Ending(ABNORMAL, repr(error)))
        finally:
            if self._stopped is not None:
                if self._link is not None:
                    self._leftover.append(self._link)
                await self._tidy()

    async def _attempt(self) -> Ending:
        """Connect and serve until the connection ends or the server asks us to move."""
        if self._link is None:
            self._announce(ConnectionChange("connecting"))
        try:
            auth = await self._credentials()
            greeting = self._subscriptions.greeting(auth)
            client = {"name": self._name}
            hello = {"t": "hello", "v": 1, "auth": auth, "client": client, "caps": ["batch"], "subs": greeting}
            link = await Link.open(self._url, hello, self._timing)
        except ServerUnreachable as error:
            return Ending(ABNORMAL, str(error))
        except ApiError as error:
            # A credential that could not be had is final; so is whatever else the server holds against the request.
            after = error.details.get("retry_after_s")
            return Ending(error.status, error.message, after)
        except LinkFailed as failed:
            return failed.ending
        self._adopt(link, greeting)
        await self._tidy()
        moved: set[asyncio.Future[Any]] = {link.ended, link.goaway}
        await asyncio.wait(moved, return_when=asyncio.FIRST_COMPLETED)
        if link.ended.done():
            await self._tidy()
            return link.ended.result()
        # The old connection goes on while the new one is made.
        return Ending(GOAWAY, "the server asked us to move", link.goaway.result())

    async def _pause(self, delay: float, ending: Ending) -> Ending | None:
        """Wait to connect again. Returns how the connection that still stood ended, where that is not to be waited out.

        It is when it was closed for good, or broke while we waited to move without haste.
        """
        serving = self._serving
        if serving is None:
            await self._sleep(delay)
            return None
        sleeping = asyncio.ensure_future(self._sleep(delay))
        ends: set[asyncio.Future[Any]] = {sleeping, serving.ended}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if serving.ended.done():
                ended = serving.ended.result()
                if is_final(ended) or (ending.code == GOAWAY and ended.code != GOAWAY):
                    return ended
            await sleeping
        finally:
            sleeping.cancel()
        return None

    @property
    def _serving(self) -> Link | None:
        return None if self._link is None or self._link.ended.done() else self._link

    def _adopt(self, link: Link, greeting: list[Frame]) -> None:
        """Move over to a connection that was welcomed, before anything of it is read."""
        if self._link is not None:
            self._link.mute()
            self._leftover.append(self._link)
        self._link = link
        positions = self._subscriptions.positions()
        self._subscriptions.adopt(link, greeting)
        self._requests.adopt(link)
        link.ended.add_done_callback(lambda ended: self._lost(link, ended.result()))
        link.start(self._take)
        self._announce(ConnectionChange("connected", positions=positions))
        self._connected.set()

    def _lost(self, link: Link, ending: Ending) -> None:
        if self._link is not link:
            return
        self._link = None
        self._leftover.append(link)
        self._subscriptions.release()
        self._requests.release()
        if self._stopped is None:
            self._announce(ConnectionChange("disconnected", ending.code, ending.reason))

    async def _tidy(self) -> None:
        """Close what is not used any more."""
        while self._leftover:
            link = self._leftover[-1]
            await link.close()
            self._leftover.remove(link)

    def _stop(self, ending: Ending) -> None:
        if self._stopped is not None:
            return
        self._stopped = ConnectionStopped(ending.code, ending.reason)
        self._requests.close(self._stopped)
        self._subscriptions.close(self._stopped)
        for future in [future for waiting in self._replies.values() for future in waiting]:
            if not future.done():
                future.set_exception(self._stopped)
        for stream in self._streams:
            stream.end()
        self._connected.set()
        self._announce(ConnectionChange("stopped", ending.code, ending.reason))

    async def _renew(self) -> None:
        try:
            await self._requests.ask({"t": "auth", "auth": await self._credentials()}, durable=False)
        except ClientError as error:
            # The server closes with 4004 at the time, and the next connection asks for a credential anew.
            logger.info("the credential could not be renewed in place: %s", error)

    # -- frames --------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        progress = False
        match frame["t"]:
            case "ev" | "snap" | "subbed" | "live" | "unsubbed":
                progress = self._subscriptions.take(frame)
            case "ok":
                progress = self._requests.answered(frame)
            case "err":
                if not (self._requests.answered(frame) or self._subscriptions.refused(frame)):
                    logger.warning("the server says %s: %s", frame["code"], frame.get("msg"))
            case "hb":
                progress = True
                if self._link is not None:
                    self._link.answer_heartbeat(frame, self._subscriptions.positions())
                self._subscriptions.heads(frame.get("heads") or {})
            case "auth.expiring":
                task = asyncio.create_task(self._renew(), name="parley-renew")
                self._renewals.add(task)
                task.add_done_callback(self._renewals.discard)
            case "eph":
                self._tell(frame["ch"], frame["e"], frame["d"])
        if progress and self._link is not None and not self._link.goaway.done():
            # What a connection brings that is to be left says nothing about the attempts to replace it.
            self._failures, self._refused = 0, False

    def _event(self, ch: str, e: str, d: dict[str, Any]) -> None:
        self._tell(ch, e, d)
        if e in TERMINAL:
            self._ended(d["reply"], d["message"])
        elif e == "message.deleted":
            for future in self._replies.get(d["id"], ()):
                if not future.done():
                    future.set_exception(ReplyGone("The reply was deleted."))

    def _snapshot(self, ch: str, state: dict[str, Any]) -> None:
        if self._on_snapshot is not None:
            self._guarded(self._on_snapshot, ch, state)
        for stream in self._streams:
            stream.put((ch, SNAPSHOT, state))
        for reply in list(self._replies):
            message = find_message(state, reply)
            if message is not None and message["status"] in FINISHED:
                self._ended(reply, message)

    def _ended(self, reply: str, message: dict[str, Any]) -> None:
        for future in self._replies.get(reply, ()):
            if not future.done():
                future.set_result(message)

    def _tell(self, ch: str, e: str, d: dict[str, Any]) -> None:
        if self._on_event is not None:
            self._guarded(self._on_event, ch, e, d)
        for stream in self._streams:
            stream.put((ch, e, d))

    def _announce(self, change: ConnectionChange) -> None:
        if self._on_connection is not None:
            self._guarded(self._on_connection, change)

    def _guarded(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            # The user's code is not the connection's: the stream goes on.
            logger.exception("a callback of the client failed")
