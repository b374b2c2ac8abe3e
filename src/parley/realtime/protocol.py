"""uvicorn's WebSocket protocol, with two additions: a connection can be cut off at once, and floods are bounded.

An ASGI application can only ask for a close, which waits until the peer has taken what was sent before. A peer that
does not read never takes it. And some of what a peer sends never reaches the application: pings, which are answered
into the same buffer, pieces of a message that say nothing, and frames that arrive in one read, each an object here
before the application sees the first.
"""

import logging
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from parley.core.http_protocol import ABORT, IS_GONE
from parley.realtime.flow import Bucket
from parley.realtime.frames import Close

WAITING_FRAMES = 1024
"""How many frames may wait for the application: more than the burst that it takes itself."""

_PIECES = 512
_SIGNALS_PER_S = 10.0
_SIGNALS_BURST = 100.0


class SocketProtocol(WebSocketsSansIOProtocol):
    """Offers `abort` and `is_gone` in the extensions; logs neither addresses, which may hold a query, nor frames."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        quiet = logging.getLogger(__name__)
        if quiet.level != logging.WARNING:
            # Only once: it makes every logger forget what it has worked out.
            quiet.setLevel(logging.WARNING)
        self.logger = self.conn.logger = quiet
        self.conn.debug = False
        self._signals: Bucket | None = None

    def handle_connect(self, event: Request) -> None:
        """Take a handshake."""
        super().handle_connect(event)
        # The application's task was made and has not begun to run.
        if scope := getattr(self, "scope", None):
            offered = scope.setdefault("extensions", {})
            offered[ABORT] = self.transport.abort
            offered[IS_GONE] = self.transport.is_closing

    def handle_events(self) -> None:
        """Take what has arrived."""
        super().handle_events()
        if self.queue.qsize() > WAITING_FRAMES:
            self._refuse("too many frames")

    def handle_ping(self) -> None:
        """Answer a ping, which nobody needs ten times a second."""
        super().handle_ping()
        self._count_signal()

    def handle_pong(self, event: Frame) -> None:
        """Take a pong; those that nobody asked for are counted like pings."""
        if self.pending_ping_payload is None:
            self._count_signal()
        super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        """Take a piece of a message. Its bytes are bounded by the frame's; the number of pieces is not."""
        if not event.data and not event.fin:
            self._count_signal()
            return
        super().handle_cont(event)
        if len(self.frames) > _PIECES:
            self.frames = [b"".join(self.frames)]

    def _count_signal(self) -> None:
        if self._signals is None:
            self._signals = Bucket(_SIGNALS_PER_S, _SIGNALS_BURST)
        if self._signals.take():
            self._refuse("too many frames")

    def _refuse(self, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.conn.fail(Close.TOO_MANY, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        # What waits is not worth its memory any more.
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": Close.TOO_MANY, "reason": reason})
        self.transport.close()
