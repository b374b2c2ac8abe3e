"""The layers around every HTTP request, as plain ASGI: ids and the log outside, then CORS, then bounds and errors."""

import logging
import re
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core.envelope import respond_error
from parley.core.error_handlers import error_response
from parley.core.errors import TooLarge
from parley.core.logging import log_context
from parley.core.origin import origin
from parley.core.security_headers import SecurityHeaders

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")


class RequestIdMiddleware:
    """Give each request an id, which is in its log lines and in its answer."""

    def __init__(self, app: ASGIApp, *, security: SecurityHeaders) -> None:
        self.app = app
        self._security = security

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        sent_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else b"req_" + secrets.token_hex(8).encode()
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._security.add(message, private="credential" in state)
                message["headers"].append((b"x-request-id", request_id))
                if (room := state.get("room")) is not None:
                    message["headers"] += [
                        (b"ratelimit-policy", room.limit.policy.encode()),
                        (b"ratelimit", room.header.encode()),
                    ]
            await send(message)

        client = scope.get("client")
        user_agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"").decode("latin-1")
        with log_context(request_id=request_id.decode()), origin(client[0] if client else None, user_agent):
            await self.app(scope, receive, send_with_id)
            if logger.isEnabledFor(logging.DEBUG):
                duration_ms = round((time.perf_counter() - started) * 1000, 2)
                logger.debug("%s %s %d", scope["method"], scope["path"], status, extra={"duration_ms": duration_ms})


class CorsMiddleware(CORSMiddleware):
    """Starlette's, whose refusal is an envelope like every other."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser's question."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        kept = {k: v for k, v in answer.headers.items() if k not in {"content-length", "content-type"}}
        error = {"error": "cors_refused", "message": "This origin, method or header is not allowed.", "details": {}}
        return respond_error(answer.status_code, [error], headers=kept)


class GuardMiddleware:
    """Bound the body, and answer what nothing else answered. `larger` has paths with a bound of their own."""

    def __init__(self, app: ASGIApp, *, body_bytes: int, larger: Mapping[str, int] | None = None) -> None:
        self.app = app
        self.body_bytes = body_bytes
        self._larger = larger or {}

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False
        bound = self._larger.get(scope["path"], self.body_bytes)

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if self._declared(scope) > bound:
                raise self._too_large(bound)
            await self.app(scope, self._bounded(receive, bound), watched)
        except Exception as error:
            if started:
                logger.exception("failed after the answer had begun")
                raise
            await error_response(error)(scope, receive, watched)

    @staticmethod
    def _declared(scope: AsgiScope) -> int:
        text = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        return int(text[:20]) if text.isdigit() else 0

    @staticmethod
    def _too_large(bound: int) -> TooLarge:
        return TooLarge(f"The body is larger than {bound} bytes.")

    def _bounded(self, receive: Receive, bound: int) -> Receive:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > bound:
                # FastAPI makes a 400 of whatever else a body raises.
                raise HTTPException(413, self._too_large(bound).detail)
            return message

        return bounded
