"""Splits a byte stream into server-sent events, by hand: this runs once for every piece of every answer.

https://html.spec.whatwg.org/multipage/server-sent-events.html, less two things that no provider uses: a lone carriage
return as the end of a line, and the fields `id` and `retry`.
"""

from parley.llm.errors import BadOutput

MAX_EVENT_BYTES = 1024 * 1024

Event = tuple[bytes, bytes]
"""The name (empty when there is none) and the data of an event."""


class EventSplitter:
    """Turns chunks, cut anywhere, into events. Holds at most `limit` bytes of one event, then raises `BadOutput`."""

    __slots__ = ("_data", "_limit", "_name", "_rest", "_size")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._name = b""
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that this chunk completes."""
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
        for raw in head.split(b"\n"):
            line = raw[:-1] if raw[-1:] == b"\r" else raw
            if not line:
                if self._data:
                    events.append((self._name, self._data[0] if len(self._data) == 1 else b"\n".join(self._data)))
                    self._data = []
                    self._size = 0
                self._name = b""
            elif line[:5] == b"data:":
                self._size += len(line)
                if self._size > self._limit:
                    raise BadOutput
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line[:6] == b"event:":
                self._name = line[6:].strip()
        if end + 1 < len(chunk):
            self._keep(chunk[end + 1 :])
        return events

    def flush(self) -> list[Event]:
        """Return the last event when the stream ended without the blank line behind it. Half a line is dropped."""
        events = [(self._name, b"\n".join(self._data))] if self._data else []
        self._data = []
        return events

    def _keep(self, part: bytes) -> None:
        if len(self._rest) + self._size + len(part) > self._limit:
            raise BadOutput
        self._rest += part
