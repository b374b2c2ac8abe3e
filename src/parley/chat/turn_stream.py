"""One turn as server-sent events: from its question to its terminal event, live or read back."""

from collections.abc import AsyncIterator
from typing import Any

from parley.chat.turns import Sent
from parley.core import clock
from parley.realtime.channels import Snapshot
from parley.realtime.events import LoggedEvent
from parley.realtime.fold import TERMINAL
from parley.realtime.frames import Since
from parley.realtime.router import EventStream, sse_event, sse_snapshot
from parley.realtime.runs import TERMINAL as ENDED


class TurnStream:
    """Follows a conversation's channel and shows what belongs to one turn."""

    def __init__(self, stream: EventStream, sent: Sent) -> None:
        self._stream = stream
        self._question = sent.message["id"]
        self._reply = sent.reply["id"]

    async def open(self, channel: str, start_seq: int) -> Snapshot | None:
        """Go to the turn's first event. Returns a snapshot where the log no longer has it."""
        # The question's event comes right before the reply's, and a position is that of the last event seen.
        return await self._stream.open(channel, Since(ep=None, seq=max(start_seq - 2, 0)))

    def _is_ours(self, event: LoggedEvent) -> bool:
        return self._reply in {event.d.get("reply"), event.d.get("id")} or event.d.get("id") == self._question

    def _ends(self, event: LoggedEvent) -> bool:
        return event.e in TERMINAL and event.d["reply"] == self._reply

    async def follow(self, snapshot: Snapshot | None, *, until: float) -> AsyncIterator[str]:
        """Yield the turn's events; ends with the terminal one."""
        cursor = self._stream.cursor
        try:
            yield ": parley.v1\n\n"
            if snapshot is not None:
                for part in sse_snapshot(snapshot, cursor):
                    yield part
                if _ended(snapshot.state, self._reply):
                    return
            while (left := until - clock.timestamp()) > 0 and not self._stream.revoked:
                while cursor.is_behind and not cursor.lost and not self._stream.revoked:
                    events = [event for event in await self._stream.read() if self._is_ours(event)]
                    yield "".join(sse_event(event, cursor, self._stream.epoch) for event in events)
                    if any(self._ends(event) for event in events):
                        return
                if cursor.lost or self._stream.revoked:
                    break
                if not await self._stream.wait(min(15.0, left)):
                    yield ": still here\n\n"
            yield self._stream.farewell()
        finally:
            self._stream.close()


def _ended(state: dict[str, Any], reply: str) -> bool:
    shown = next((message for message in state["messages"] if message["id"] == reply), None)
    return shown is None or shown["status"] in ENDED
