"""uvicorn's HTTP protocol, with one addition: the request line and headers are bounded.

uvicorn keeps all that a client sends until the headers are complete, whoever the client is.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from parley.core.envelope import respond_error

HEADER_BYTES = 64 * 1024
ABORT = "parley.abort"
"""In the scope's extensions: cuts the connection off, where a close would wait for a peer that does not read."""


class RequestProtocol(HttpToolsProtocol):
    """Refuses a request whose headers do not end."""

    _in_headers = False
    _header_bytes = 0

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._in_headers = True
        self._header_bytes = 0
        super().on_message_begin()
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        extensions[ABORT] = self.transport.abort

    def on_headers_complete(self) -> None:
        """Stop counting: the body has a bound of its own."""
        self._in_headers = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer."""
        super().data_received(data)
        if self._in_headers and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse()

    def _refuse(self) -> None:
        error = {"error": "headers_too_large", "message": "The request's headers are too large.", "details": {}}
        body = bytes(respond_error(431, [error]).body)
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
