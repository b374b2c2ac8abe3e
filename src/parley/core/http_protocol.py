"""uvicorn's HTTP protocol, with one addition: the request line and headers are bounded, in bytes and in time.

uvicorn keeps all that a client sends until the headers are complete, whoever the client is, and waits for them for
ever.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from parley.core.envelope import respond_error

HEADER_BYTES = 64 * 1024
ABORT = "parley.abort"
"""In the scope's extensions: cuts the connection off, where a close would wait for a peer that does not read."""
IS_GONE = "parley.is_gone"
"""In the scope's extensions: whether the connection has ended, which is known before it can be received."""


class RequestProtocol(HttpToolsProtocol):
    """Refuses a request whose headers do not end."""

    headers_timeout_s = 10.0
    """From the connection, and from each further request's first byte, to the end of its headers."""

    _in_headers = False
    _header_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Take a connection."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._expect_no_headers()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._in_headers = True
        if self._header_timer is None:
            self._expect_headers()
        self._header_bytes = 0
        super().on_message_begin()
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        extensions[ABORT] = self.transport.abort

    def on_headers_complete(self) -> None:
        """Stop counting: the body has a bound of its own."""
        self._in_headers = False
        self._expect_no_headers()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer."""
        super().data_received(data)
        if self._in_headers and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse()

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.headers_timeout_s, self._give_up)

    def _expect_no_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if not getattr(self.cycle, "response_complete", True):
            # The next request was begun while an answer is under way, which may take its time.
            self._expect_headers()
        elif self._in_headers:
            self._answer(408, "Request Timeout", "request_timeout", "The request's headers did not come in time.")
        else:
            # It never said a word.
            self.transport.close()

    def _refuse(self) -> None:
        message = "The request's headers are too large."
        self._answer(431, "Request Header Fields Too Large", "headers_too_large", message)

    def _answer(self, status: int, phrase: str, code: str, message: str) -> None:
        body = bytes(respond_error(status, [{"error": code, "message": message, "details": {}}]).body)
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
