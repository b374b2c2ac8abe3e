"""Live channels over HTTP: tickets, the log as server-sent events, and the socket's address."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.routing import WebSocketRoute
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core import clock
from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.errors import Invalid, Unavailable
from parley.core.http_protocol import ABORT
from parley.core.scope import Credential, CurrentScope
from parley.realtime.channels import ChannelNotFound, Snapshot
from parley.realtime.cursor import Cursor
from parley.realtime.dependencies import RealtimeDep
from parley.realtime.events import LoggedEvent
from parley.realtime.frames import Close, Since, encode
from parley.realtime.handshake import RealtimeEndpoint
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["realtime"])

_COMMENT_S = 15.0


class TicketRead(BaseModel):
    """A ticket for `hello`, good once and for `expires_in` seconds."""

    ticket: str
    expires_in: int


def socket_route(path: str) -> WebSocketRoute:
    """Return the socket's route."""
    return WebSocketRoute(path, RealtimeEndpoint(), name="realtime")


@router.post(
    "/realtime/tickets",
    status_code=201,
    response_model=Envelope[TicketRead],
    openapi_extra=needs(Permission.REALTIME_CONNECT),
)
async def create_realtime_ticket(scope: CurrentScope, realtime: RealtimeDep) -> Response:
    """Get a one-time ticket for the socket."""
    ticket = await realtime.tickets.issue(scope)
    answer = TicketRead(ticket=ticket, expires_in=realtime.tickets.life_s)
    return respond(answer, status=201, headers={"Cache-Control": "no-store"})


def parse_position(text: str) -> Since:
    """Read `EP:SEQ`, or raise `Invalid`."""
    epoch, colon, seq = text.rpartition(":")
    if not colon or not seq.removeprefix("-").isascii() or not seq.removeprefix("-").isdigit() or len(seq) > 20:
        raise Invalid("since must look like EPOCH:SEQ", details={"field": "since", "constraint": "EPOCH:SEQ"})
    if int(seq) < -1:
        raise Invalid("since must not be below -1", details={"field": "since", "constraint": "ge=-1"})
    return Since(ep=epoch or None, seq=int(seq))


def sse(event: str, data: str, *, id: str | None = None) -> str:
    """Return one server-sent event."""
    return (f"id: {id}\n" if id else "") + f"event: {event}\ndata: {data}\n\n"


def sse_snapshot(snapshot: Snapshot, cursor: Cursor) -> list[str]:
    """Return the events of a snapshot, to be sent one by one.

    The id is on the last part only, so that a cut one is not taken for whole.
    """
    parts = list(snapshot.frames(cursor.channel))
    position = f"{snapshot.head.epoch}:{snapshot.head.seq}"
    return [sse("snap", part, id=position if number == len(parts) else None) for number, part in enumerate(parts, 1)]


def sse_event(event: LoggedEvent, cursor: Cursor, epoch: str) -> str:
    """Return an event of the log."""
    return sse(event.e, event.frame(cursor.channel), id=f"{epoch}:{event.seq}")


class EventStream:
    """A reader of one channel for one HTTP response."""

    def __init__(self, realtime: RealtimeDep, scope: CurrentScope) -> None:
        self._realtime = realtime
        self._moved = asyncio.Event()
        self.scope = scope
        self.revoked = False
        self._ending = "expired"
        self.cursor = realtime.cursor(scope, self._moved.set)
        self.epoch = ""

    async def open(self, channel: str, since: Since | None) -> Snapshot | None:
        """Subscribe; raises `ChannelNotFound` before anything was sent.

        Counts as one of the user's connections; raises `RateLimited` when there are as many as may be.
        """
        self._realtime.enter_stream(self)
        try:
            head, _, snapshot = await self.cursor.open(channel, since)
        except BaseException:
            self._realtime.leave_stream(self)
            raise
        # A response that is never sent does not even begin to follow, and would count for ever.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self.close())
        self.epoch = head.epoch
        return snapshot

    def end(self, code: int, reason: str) -> None:  # noqa: ARG002 - a stream says it in an event
        """End with what it was opened by, or with the process."""
        self.revoked = True
        if code in {Close.RESTART, Close.RETRY}:
            self._ending = "unavailable"
        self._moved.set()

    def close(self) -> None:
        """Unsubscribe."""
        self._realtime.leave_stream(self)
        self.cursor.close()

    async def wait(self, timeout_s: float) -> bool:
        """Return whether the channel moved within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError:
            return False
        self._moved.clear()
        return True

    def farewell(self) -> str:
        """Return the event that says why the stream ends, and that its reader may come back."""
        code = "not_found" if self.cursor.lost else self._ending
        return sse("unsubbed", encode(t="unsubbed", ch=self.cursor.channel.name, code=code, retry="now"))

    async def read(self) -> list[LoggedEvent]:
        """Return the next events; none, and the stream is to end, while the database is away."""
        try:
            return await self.cursor.read()
        except Unavailable:
            self.revoked, self._ending = True, "unavailable"
            return []

    async def follow(self, snapshot: Snapshot | None, *, until: float) -> AsyncIterator[str]:
        """Yield the channel as server-sent events until the time comes (seconds since 1970) or the channel ends."""
        try:
            yield ": parley.v1\n\n"
            if snapshot is not None:
                for part in sse_snapshot(snapshot, self.cursor):
                    yield part
            while (left := until - clock.timestamp()) > 0 and not self.revoked:
                while self.cursor.is_behind and not self.cursor.lost and not self.revoked:
                    events = await self.read()
                    yield "".join(sse_event(event, self.cursor, self.epoch) for event in events)
                if self.cursor.lost or self.revoked:
                    break
                if not await self.wait(min(_COMMENT_S, left)):
                    yield ": still here\n\n"
            yield self.farewell()
        finally:
            self.close()


class EventStreamResponse(StreamingResponse):
    """A stream that cuts off a client that does not take it: what is sent would wait in memory for ever."""

    def __init__(self, content: AsyncIterator[str], *, timeout_s: float) -> None:
        super().__init__(content, media_type="text/event-stream", headers=SSE_HEADERS)
        self._timeout_s = timeout_s

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Send the stream."""

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await send(message)
            except TimeoutError:
                # The server then reports a disconnect, which ends the stream.
                if abort := scope.get("extensions", {}).get(ABORT):
                    abort()

        await super().__call__(scope, receive, bounded)


SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@router.get(
    "/channels/{channel}/events",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The channel's log, from a position or a snapshot"},
        404: {"model": ErrorEnvelope},
    },
    openapi_extra=needs(Permission.REALTIME_CONNECT),
)
async def stream_channel_events(
    channel: str,
    request: Request,
    scope: CurrentScope,
    realtime: RealtimeDep,
    since: Annotated[str | None, Query(max_length=64, description="EPOCH:SEQ; without it, a snapshot first")] = None,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """Follow a channel as server-sent events. `Last-Event-ID` beats `since`."""
    if len(channel) > 200:
        raise ChannelNotFound
    position = last_event_id or since
    stream = EventStream(realtime, scope)
    credential: Credential = request.state.credential
    snapshot = await stream.open(channel, parse_position(position) if position else None)
    return EventStreamResponse(
        stream.follow(snapshot, until=credential.expires_at), timeout_s=realtime.settings.ack_timeout_s
    )
