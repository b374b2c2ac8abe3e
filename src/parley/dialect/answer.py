"""Answers one request for a completion, whole or as a stream, and stops the provider when nobody listens any more."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core import clock
from parley.core.errors import AppError
from parley.core.http_protocol import ABORT
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.dialect.errors import failure_of
from parley.dialect.running import RunningCall
from parley.dialect.service import Asked, Dialect
from parley.dialect.wire import DONE, HEARTBEAT, Chunks, completion
from parley.llm.errors import BadOutput, ProviderUnavailable
from parley.llm.ports import (
    AttemptStarted,
    Finish,
    FinishReason,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
)
from parley.usage.service import ModelCall, StreamItem

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
SEND_TIMEOUT_S = 30.0
"""How long a client may leave what is sent untaken."""
_MOST_WAITING = 1024 * 1024

_STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store",
                   "x-accel-buffering": "no"}  # fmt: skip


class _Output(Protocol):
    """Takes what a model says."""

    finish: FinishReason | None
    """Why the model stopped, once it has."""

    @property
    def has_room(self) -> bool:
        """Whether more is wanted now."""
        ...

    def take(self, item: StreamItem) -> None:
        """Take the next item. Raises `ModelError` for what cannot be passed on."""
        ...


class Completion(Response):
    """The answer to `POST /v1/chat/completions`.

    The body is read here and not before, so that only those who may call a model can make us hold a large one. Until
    the first piece of the answer is there a failure is an HTTP error, which clients can repeat; after it, it is an
    event of the stream. When the client goes, the call of the provider is closed at once.
    """

    def __init__(self, request: Request, caller: Scope, dialect: Dialect) -> None:
        super().__init__()
        self._request = request
        self._caller = caller
        self._dialect = dialect

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer."""
        with self._dialect.running.one_more(self._caller) as running:
            try:
                asked = await self._dialect.ask(self._caller, await self._request.body())
            except AppError as error:
                await failure_of(error).response()(scope, receive, send)
                return
            about = {"id": f"chatcmpl-{new_id().hex}", "created": int(clock.timestamp())}
            serve = _stream if asked.wanted.stream else _whole
            await serve(asked, about, running, scope, receive, send)


class _Reading:
    """Reads a call in a task of its own, and tells whoever waits of what comes.

    Apart from the sending, so that what the provider sends in one go is sent on in one go, and so that the provider's
    connection is closed in the moment in which the client's is gone.
    """

    def __init__(self, asked: Asked, output: _Output) -> None:
        self._asked = asked
        self._output = output
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self.call: ModelCall | None = None
        self.error: Exception | None = None
        self.ended = False
        self.gone = False
        """Whether the client is."""

    async def follow(self, running: RunningCall, receive: Receive, serve: Callable[[], Awaitable[None]]) -> None:
        """Read while `serve` runs; neither outlives the other, the client, nor its credential."""
        reader = asyncio.create_task(self._read())
        tasks = [reader, asyncio.create_task(self._watch(receive))]

        def end(why: AppError) -> None:
            if self._output.finish is None:
                self.error = why
                reader.cancel()

        running.when_ended(end)
        try:
            await serve()
        finally:
            for task in tasks:
                task.cancel()
            # The call is closed and counted before the answer is over.
            await asyncio.wait(tasks)

    def wake(self) -> None:
        """Make `wait` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return when something has come, ended or gone since."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def taken(self) -> None:
        """Say that the output has been emptied."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _read(self) -> None:
        try:
            async with self._asked.call as call:
                self.call = call
                async for item in call:
                    self._output.take(item)
                    self.wake()
                    if not self._output.has_room:
                        self._room = asyncio.get_running_loop().create_future()
                        await self._room
        except Exception as error:  # noqa: BLE001 - the one who serves tells the client
            self.error = error
        finally:
            self.ended = True
            self.wake()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.wake()


# -- as a stream -------------------------------------------------------------------------------------------------------


class _Stream:
    """What waits to be sent of a stream."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._pieces: list[bytes] = []
        self._size = 0
        self._calls = 0
        self._void = False
        self.begun = False
        """Whether anything of the answer has been shown."""
        self.finish: FinishReason | None = None

    @property
    def has_room(self) -> bool:
        return self._size < _MOST_WAITING

    def take(self, item: StreamItem) -> None:
        match item:
            case TextChunk(text=text):
                self._add(self._chunks.text(text))
            case ReasoningChunk(text=text):
                self._add(self._chunks.reasoning(text))
            case ToolCallChunk():
                self._add(self._chunks.tool_call(self._calls, item))
                self._calls += 1
            case Finish(reason=reason):
                self._add(self._chunks.finish(reason))
                self.finish = reason
            case AttemptStarted():
                # What has been sent cannot be taken back here.
                self._void = item.after_text and not item.continues
                self._chunks.model = item.model_id

    def put(self, piece: bytes) -> None:
        """Have a piece sent that is not the model's."""
        self._pieces.append(piece)
        self._size += len(piece)

    def emptied(self) -> bytes:
        """Return what waits, which then waits no more."""
        whole = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        return whole

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def _add(self, piece: bytes) -> None:
        if self._void:
            raise ProviderUnavailable("The model provider broke off its answer.")
        if not self.begun:
            self.begun = True
            self.put(self._chunks.role())
        self.put(piece)


async def _stream(
    asked: Asked, about: Mapping[str, Any], running: RunningCall, scope: AsgiScope, receive: Receive, send: Send
) -> None:
    options = asked.wanted.stream_options
    include_usage = bool(options and options.include_usage)
    chunks = Chunks(about["id"], created=about["created"], model=asked.model, include_usage=include_usage)
    output = _Stream(chunks)
    reading = _Reading(asked, output)
    beat = _Beat(reading.wake, scope)

    async def serve() -> None:
        while not (output or reading.ended or reading.gone or beat.due):
            await reading.wait()
        if reading.gone:
            return
        if reading.error is not None and not output.begun:
            # Nothing has been said: the client may well ask again.
            await failure_of(reading.error).response()(scope, receive, send)
            return
        headers = [(name.encode(), value.encode()) for name, value in _STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            if output:
                beat.sending()
                await send(_body(output.emptied()))
                beat.sent()
                reading.taken()
            elif reading.gone:
                return
            elif reading.ended:
                break
            elif beat.due:
                beat.sending()
                await send(_body(HEARTBEAT))
                beat.sent()
            else:
                await reading.wait()
        await send(_body(_ending(reading, output, chunks, include_usage=include_usage), last=True))

    try:
        await reading.follow(running, receive, serve)
    finally:
        beat.stop()


def _ending(reading: _Reading, output: _Stream, chunks: Chunks, *, include_usage: bool) -> bytes:
    """Return the end of a stream. It comes once the call is in the ledger."""
    error = reading.error
    if output.finish is None:
        return b"data: " + failure_of(error or BadOutput()).body + b"\n\n"
    if error is not None:
        logger.error("a completed call could not be settled", exc_info=error)
    assert reading.call is not None
    return (chunks.usage(reading.call.tally) if include_usage else b"") + DONE


def _body(piece: bytes, *, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": not last}


class _Beat:
    """Tells when a stream has been silent for so long that a proxy might take it for dead.

    Cuts off a client that does not take what is sent to it. One timer for both, so that nothing is timed per piece.
    """

    def __init__(self, wake: Callable[[], None], scope: AsgiScope) -> None:
        self._wake = wake
        self._abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT)
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._is_sending = False
        self.due = False
        self._timer = self._loop.call_later(HEARTBEAT_S, self._look)

    def sending(self) -> None:
        """Something is about to be sent."""
        self.due = False
        self._is_sending = True
        self._since = self._loop.time()

    def sent(self) -> None:
        """It has been taken."""
        self._is_sending = False

    def stop(self) -> None:
        """Stop."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self._is_sending:
            if now - self._since >= SEND_TIMEOUT_S and self._abort is not None:
                # The server then reports a disconnect, which ends the call.
                self._abort()
            left = HEARTBEAT_S
        elif (left := self._since + HEARTBEAT_S - now) <= 0:
            self.due = True
            self._wake()
            left = HEARTBEAT_S
        self._timer = self._loop.call_later(left, self._look)


# -- whole -------------------------------------------------------------------------------------------------------------


class _Gathered:
    """A whole answer in the making."""

    has_room = True

    def __init__(self, model: str) -> None:
        self.model = model
        self.finish: FinishReason | None = None
        self._clear()

    def _clear(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ToolCallChunk] = []

    def take(self, item: StreamItem) -> None:
        match item:
            case TextChunk(text=text):
                self.text.append(text)
            case ReasoningChunk(text=text):
                self.reasoning.append(text)
            case ToolCallChunk():
                self.calls.append(item)
            case Finish(reason=reason):
                self.finish = reason
            case AttemptStarted():
                if not item.continues:
                    self._clear()
                self.model = item.model_id


async def _whole(
    asked: Asked, about: Mapping[str, Any], running: RunningCall, scope: AsgiScope, receive: Receive, send: Send
) -> None:
    output = _Gathered(asked.model)
    reading = _Reading(asked, output)

    async def serve() -> None:
        while not (reading.ended or reading.gone):
            await reading.wait()
        if reading.gone and not reading.ended:
            return
        answer: Response
        if output.finish is None or reading.call is None:
            answer = failure_of(reading.error or BadOutput()).response()
        else:
            if reading.error is not None:
                logger.error("a completed call could not be settled", exc_info=reading.error)
            body = completion(
                about["id"],
                created=about["created"],
                model=output.model,
                text="".join(output.text),
                reasoning="".join(output.reasoning),
                calls=output.calls,
                finish=output.finish,
                tally=reading.call.tally,
            )
            answer = Response(body, media_type="application/json")
        await answer(scope, receive, send)

    await reading.follow(running, receive, serve)
