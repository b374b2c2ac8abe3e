"""uvicorn's WebSocket protocol, with one addition: a connection can be cut off at once.

An ASGI application can only ask for a close, which waits until the peer has taken what was sent before. A peer that
does not read never takes it.
"""

import logging
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from parley.core.http_protocol import ABORT


class SocketProtocol(WebSocketsSansIOProtocol):
    """Offers `abort` in the scope's extensions, and logs neither addresses, which may hold a query, nor frames."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        quiet = logging.getLogger(__name__)
        quiet.setLevel(logging.WARNING)
        self.logger = self.conn.logger = quiet
        self.conn.debug = False

    def handle_connect(self, event: Request) -> None:
        """Take a handshake."""
        super().handle_connect(event)
        # The application's task was made and has not begun to run.
        if scope := getattr(self, "scope", None):
            scope.setdefault("extensions", {})[ABORT] = self.transport.abort
