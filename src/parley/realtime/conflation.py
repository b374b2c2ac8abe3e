"""Channels whose intermediate values do not count: of what a reader is behind, it gets the last value per key."""

from collections.abc import Iterator, Sequence

from parley.realtime.channels import Mode
from parley.realtime.events import LoggedEvent, merged

MIN_HZ = 1.0
"""Slower than this a client would take the silence for a loss and subscribe again."""


def outgoing(mode: Mode, events: Sequence[LoggedEvent]) -> Iterator[LoggedEvent]:
    """Return the events as a reader gets them: deltas joined, or the last one of each key."""
    return merged(events) if mode == "log" else conflated(events)


def conflated(events: Sequence[LoggedEvent]) -> Iterator[LoggedEvent]:
    """Keep the last event of every `key`, each standing for the range since the one kept before it.

    An event without a key is about the whole channel and always kept.
    """
    last: dict[object, int] = {}
    for event in events:
        key = event.d.get("key")
        if key is not None:
            last[key] = event.seq
    first = events[0].first if events else 0
    for event in events:
        key = event.d.get("key")
        if key is not None and last[key] != event.seq:
            continue
        yield event if first == event.first else LoggedEvent(event.seq, event.e, event.data, event.ts, first=first)
        first = event.seq + 1
