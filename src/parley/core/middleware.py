"""The outermost layer around every HTTP request, as plain ASGI: ids, limits, the last error handler, one log line."""

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core.error_handlers import error_response
from parley.core.errors import TooLarge
from parley.core.logging import log_context

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")


class ServiceMiddleware:
    """Give each request an id, bound its body, and answer what nothing else answered."""

    def __init__(self, app: ASGIApp, *, body_bytes: int) -> None:
        self.app = app
        self.body_bytes = body_bytes

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else b"req_" + secrets.token_hex(8).encode()
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id),
                                      (b"x-content-type-options", b"nosniff")]  # fmt: skip
            await send(message)

        with log_context(request_id=request_id.decode()):
            try:
                await self.app(scope, self._bounded(scope, receive), send_with_id)
            except Exception as error:
                if status:
                    logger.exception("failed after the answer had begun")
                    raise
                await error_response(error)(scope, receive, send_with_id)
            logger.debug(
                "%s %s %d",
                scope["method"],
                scope["path"],
                status,
                extra={"duration_ms": round((time.perf_counter() - started) * 1000, 2)},
            )

    def _bounded(self, scope: AsgiScope, receive: Receive) -> Receive:
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        over = declared.isdigit() and int(declared[:20]) > self.body_bytes
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            if over:
                raise TooLarge(f"The body is larger than {self.body_bytes} bytes.")
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.body_bytes:
                raise TooLarge(f"The body is larger than {self.body_bytes} bytes.")
            return message

        return bounded
