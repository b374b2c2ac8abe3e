"""From a TCP connection to a client that is known: Origin, subprotocol, `hello`, credential."""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core.api_limits import ApiLimits
from parley.core.errors import AppError, RateLimited, Unauthenticated, Unavailable
from parley.core.http_protocol import ABORT, IS_GONE
from parley.core.logging import log_context
from parley.core.scope import Credential
from parley.realtime import frames
from parley.realtime.admission import Busy, TooManyConnections, TooManyOpen
from parley.realtime.connection import Connection
from parley.realtime.flow import Closing
from parley.realtime.frames import BadFrame, Close
from parley.realtime.service import Realtime
from parley.tenancy.permissions import Permission

logger = logging.getLogger(__name__)

_CLOSE_S = 2.0
_LINGER_S = 15.0
_LOOPBACK = {"localhost", "127.0.0.1", "[::1]", "::1"}


def origin_allowed(realtime: Realtime, origin: str | None) -> bool:
    """Whether a browser page may open the socket. Without an Origin it is no browser: the credential is in `hello`."""
    if origin is None or origin in realtime.origins:
        return True
    if not realtime.allow_loopback_origins:
        return False
    try:
        parts = urlsplit(origin)
        return parts.scheme in {"http", "https"} and parts.hostname in _LOOPBACK
    except ValueError:
        return False


class RealtimeEndpoint:
    """`GET /api/v1/realtime` as a plain ASGI application: nothing between the frames and the server."""

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        realtime: Realtime = scope["app"].state.realtime
        await receive()  # websocket.connect
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not origin_allowed(realtime, headers.get("origin")):
            # Before accept: the browser gets a 403 and no socket.
            await send({"type": "websocket.close", "code": Close.FORBIDDEN})
            return
        limits: ApiLimits = scope["app"].state.api_limits
        client = scope.get("client")
        try:
            await limits.handshake(client[0] if client else None)
        except RateLimited as error:
            await _too_many(scope, send, retry_after_s=error.retry_after_s or 1)
            return
        if frames.SUBPROTOCOL not in scope["subprotocols"]:
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": Close.WRONG_SUBPROTOCOL, "reason": "speak parley.v1"})
            return
        await send({"type": "websocket.accept", "subprotocol": frames.SUBPROTOCOL})
        id_ = f"c_{secrets.token_hex(8)}"
        with log_context(connection_id=id_):
            try:
                closing = await self._serve(realtime, receive, send, id_, is_gone=_is_gone(scope))
            except Closing as refused:
                closing = refused
            except asyncio.CancelledError:
                raise
            except OSError:
                # The peer left while it was being answered.
                closing = Closing(Close.NORMAL, "client")
            except Exception:
                logger.exception("connection failed")
                closing = Closing(Close.SERVER_ERROR, "internal")
            logger.info("socket closed", extra={"code": closing.code, "reason": closing.reason})
            try:
                if closing.reason != "client":
                    await _close(scope, send, closing)
            finally:
                _cut_off_later(scope)

    async def _serve(
        self, realtime: Realtime, receive: Receive, send: Send, id_: str, *, is_gone: Callable[[], bool]
    ) -> Closing:
        hello = await self._hello(realtime, receive, send)
        if hello.v != frames.VERSION:
            raise Closing(Close.WRONG_SUBPROTOCOL, "unknown protocol version")
        await self._refuse_while_draining(realtime, send)
        try:
            turn = await realtime.admission.wait()
        except Busy as error:
            await _say_busy(send, error)
            raise Closing(Close.OVERLOADED, "busy") from None
        try:
            if is_gone():
                # It has given up waiting and stands further back in the line by now, with another connection.
                return Closing(Close.NORMAL, "client")
            await self._refuse_while_draining(realtime, send)
            credential = await self._credential(realtime, hello, send)
            if Permission.REALTIME_CONNECT not in credential.scope.permissions:
                await _say(send, frames.error("forbidden", "The credential may not open a socket."))
                raise Closing(Close.FORBIDDEN, "forbidden")
            # Once more: whoever comes in now would be asked by nobody to leave.
            await self._refuse_while_draining(realtime, send)
            connection = Connection(realtime, credential, receive, send, id=id_, turn=turn)
            await self._enter(realtime, connection, send)
            scope = credential.scope
            try:
                with log_context(user_id=str(scope.user_id), workspace_id=str(scope.workspace_id)):
                    return await connection.run(hello)
            finally:
                realtime.leave(connection)
        finally:
            turn.release()

    async def _enter(self, realtime: Realtime, connection: Connection, send: Send) -> None:
        try:
            realtime.enter(connection)
        except TooManyConnections as error:
            await _say(
                send,
                frames.error(
                    "rate_limited", error.detail, retry="backoff", retry_after_ms=(error.retry_after_s or 1) * 1000
                ),
            )
            raise Closing(Close.TOO_MANY, "too many connections") from None
        except TooManyOpen as error:
            await _say_busy(send, error)
            raise Closing(Close.OVERLOADED, "too many connections") from None

    async def _refuse_while_draining(self, realtime: Realtime, send: Send) -> None:
        if realtime.draining:
            # Another process takes it, or this one's successor.
            message = "This server is about to stop."
            await _say(send, frames.error("unavailable", message, retry="backoff", retry_after_ms=_moment_ms()))
            raise Closing(Close.RESTART, "stopping")

    async def _hello(self, realtime: Realtime, receive: Receive, send: Send) -> frames.Hello:
        bad = 0
        try:
            async with asyncio.timeout(realtime.settings.hello_timeout_s):
                while True:
                    text = _text(await receive())
                    try:
                        frame = frames.parse(text)
                    except BadFrame as error:
                        bad += 1
                        await _say(send, frames.error("bad_frame", error.reason, id=error.id))
                        if bad >= 3:
                            raise Closing(Close.BAD_FRAMES, "too many bad frames") from None
                        continue
                    if isinstance(frame, frames.Hello):
                        return frame
                    await _say(send, frames.error("unauthenticated", "The first frame is hello."))
                    raise Closing(Close.UNAUTHENTICATED, "the first frame is hello")
        except TimeoutError:
            raise Closing(Close.NO_HELLO, "no hello in time") from None

    async def _credential(self, realtime: Realtime, hello: frames.Hello, send: Send) -> Credential:
        try:
            return await realtime.authenticate(hello.auth)
        except Unauthenticated as error:
            await _say(send, frames.error("unauthenticated", error.detail))
            raise Closing(Close.UNAUTHENTICATED, "unauthenticated") from None
        except Unavailable as error:
            await _say(send, frames.error("unavailable", error.detail, retry="backoff"))
            raise Closing(Close.OVERLOADED, "unavailable") from None
        except AppError as error:
            raise Closing(Close.RETRY, error.code) from None


def _is_gone(scope: AsgiScope) -> Callable[[], bool]:
    found: Callable[[], bool] = scope.get("extensions", {}).get(IS_GONE, lambda: False)
    return found


def _text(message: Message) -> str:
    if message["type"] == "websocket.disconnect":
        raise Closing(message.get("code") or Close.NORMAL, "client")
    text = message.get("text")
    if text is None:
        raise Closing(Close.BINARY, "binary frames are not taken")
    if len(text.encode("utf-8", "replace")) > frames.HELLO_BYTES:
        raise Closing(Close.TOO_BIG, "frame too large before welcome")
    return str(text)


async def _too_many(scope: AsgiScope, send: Send, *, retry_after_s: int) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": Close.TOO_MANY})
        return
    headers = [(b"retry-after", str(retry_after_s).encode()), (b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "websocket.http.response.start", "status": 429, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": b"Too many connections."})


def _cut_off_later(scope: AsgiScope) -> None:
    # Both ends have said goodbye, or need not. The server waits for its last bytes to be taken, by whoever reads them.
    if abort := scope.get("extensions", {}).get(ABORT):
        asyncio.get_running_loop().call_later(_LINGER_S, abort)


async def _say(send: Send, text: str) -> None:
    await send({"type": "websocket.send", "text": text})


async def _say_busy(send: Send, error: Unavailable) -> None:
    after = (error.retry_after_s or 0) * 1000 + _moment_ms()
    await _say(send, frames.error("busy", error.detail, retry="backoff", retry_after_ms=after))


def _moment_ms() -> int:
    # Those who are refused together are not to come back together.
    return random.randint(500, 3000)


async def _close(scope: AsgiScope, send: Send, closing: Closing) -> None:
    try:
        async with asyncio.timeout(_CLOSE_S):
            await send({"type": "websocket.close", "code": closing.code, "reason": closing.reason[:120]})
    except TimeoutError:
        # It does not read: what was sent before, and this, would wait in memory for ever.
        if abort := scope.get("extensions", {}).get(ABORT):
            abort()
    except (RuntimeError, OSError) as error:
        logger.debug("peer was gone before the close", extra={"cause": type(error).__name__})
