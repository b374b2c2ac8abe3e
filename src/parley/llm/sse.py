"""Splits a byte stream into server-sent events, by hand: this runs once for every piece of every answer.

https://html.spec.whatwg.org/multipage/server-sent-events.html, less the fields `id` and `retry`, which no provider
uses, and with events that have no text in their data left out.
"""

from parley.llm.errors import BadOutput

MAX_EVENT_BYTES = 1024 * 1024

Event = tuple[bytes, bytes]
"""The name (empty when there is none) and the data of an event."""

_BOM = b"\xef\xbb\xbf"
_CR = 0x0D


class EventSplitter:
    """Turns chunks, cut anywhere, into events. Holds at most `limit` bytes of one event, then raises `BadOutput`."""

    __slots__ = ("_after_cr", "_begun", "_careful", "_data", "_limit", "_name", "_rest", "_size")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._name = b""
        self._size = 0
        self._careful = True
        self._begun = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that this chunk completes."""
        if self._careful or _CR in chunk:
            chunk = self._prepare(chunk)
        lines = self._data
        if chunk.endswith(b"\n\n") and not (self._rest or lines or self._name):
            # One whole event with one line of data is how most come: this is a third of the work below.
            at = chunk.find(b"\n") + 1 if chunk.startswith(b"event: ") else 0
            if chunk.startswith(b"data: ", at) and chunk.find(b"\n", at, -2) < 0 and at + 8 < len(chunk) <= self._limit:
                return [(chunk[7 : at - 1].strip() if at else b"", chunk[at + 6 : -2])]
        end = chunk.rfind(b"\n")
        if end < 0:
            self._keep(chunk)
            return []
        if self._rest:
            head = bytes(self._rest) + chunk[:end]
            self._rest.clear()
        else:
            head = chunk[:end]
        events: list[Event] = []
        for line in head.split(b"\n"):
            if not line:
                if lines:
                    data = lines[0] if len(lines) == 1 else b"\n".join(lines)
                    if data:
                        events.append((self._name, data))
                    lines = self._data = []
                    self._size = 0
                self._name = b""
            elif line[:5] == b"data:":
                self._size += len(line)
                if self._size > self._limit:
                    raise BadOutput
                lines.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line[:6] == b"event:":
                self._name = line[6:].strip()
        if end + 1 < len(chunk):
            self._keep(chunk[end + 1 :])
        return events

    def flush(self) -> list[Event]:
        """Return the last event when the stream ended without the blank line behind it. Half a line is dropped."""
        data, self._data = b"\n".join(self._data), []
        return [(self._name, data)] if data else []

    def _prepare(self, chunk: bytes) -> bytes:
        if not self._begun:
            chunk = self._begin(chunk)
        if self._after_cr or _CR in chunk:
            chunk = self._with_line_feeds(chunk)
        self._careful = self._after_cr or not self._begun
        return chunk

    def _begin(self, chunk: bytes) -> bytes:
        """Take away a byte order mark, which may be cut too."""
        head = bytes(self._rest) + chunk
        self._rest.clear()
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._rest += head
            return b""
        self._begun = True
        return head.removeprefix(_BOM)

    def _with_line_feeds(self, chunk: bytes) -> bytes:
        r"""End lines with \n alone. A carriage return ends its line at once, so a \n that comes next is part of it."""
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if chunk[-1:] == b"\r":
            self._after_cr = True
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _keep(self, part: bytes) -> None:
        if len(self._rest) + self._size + len(part) > self._limit:
            raise BadOutput
        self._rest += part
