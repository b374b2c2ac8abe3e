"""Events of the log as they live in memory, and the merging of deltas on their way out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from parley.realtime.frames import MERGED_BYTES

DELTA = "reply.delta"


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel as the log keeps it. `key` is unique in the workspace, `name` is what its clients call it.

    `owner_id` is set on channels that are one user's own.
    """

    workspace_id: UUID
    key: str
    name: str
    owner_id: UUID | None = None

    @property
    def address(self) -> tuple[UUID, str]:
        """What look-ups use: the workspace is part of it."""
        return (self.workspace_id, self.key)


def user_channel(workspace_id: UUID, user_id: UUID) -> Channel:
    """Return a user's inbox. Its clients call it `user:me`; only that user sees its rows."""
    return Channel(workspace_id, f"user:{user_id}", "user:me", owner_id=user_id)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that is to be appended."""

    channel: Channel
    e: str
    d: dict[str, Any]


class LoggedEvent:
    """A committed event. `data` is its JSON text; the frame is encoded once and shared by all who receive it."""

    __slots__ = ("_d", "_frame", "data", "e", "first", "seq", "ts")

    def __init__(self, seq: int, e: str, data: str, ts: int, *, first: int | None = None) -> None:
        self.seq = seq
        self.first = seq if first is None else first
        self.e = e
        self.data = data
        self.ts = ts
        self._d: dict[str, Any] | None = None
        self._frame: str | None = None

    @property
    def d(self) -> dict[str, Any]:
        """The event's data."""
        if self._d is None:
            self._d = orjson.loads(self.data)
        return self._d

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return byte_length(self.data) + 120

    def frame(self, channel: Channel) -> str:
        """Return the `ev` frame."""
        if self._frame is None:
            since = "" if self.first == self.seq else f'"from":{self.first},'
            name = orjson.dumps(channel.name).decode()
            self._frame = (
                f'{{"t":"ev","ch":{name},{since}"seq":{self.seq},"e":"{self.e}","d":{self.data},"ts":{self.ts}}}'
            )
        return self._frame


def byte_length(text: str) -> int:
    """Return how many bytes a text is in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def timestamp_ms(at: datetime) -> int:
    """Return the `ts` of an event."""
    return int(at.timestamp() * 1000)


def _continues(before: dict[str, Any], length: int, after: dict[str, Any]) -> bool:
    return (
        before["reply"] == after["reply"]
        and before["part"] == after["part"]
        and bool(before["off"] + length == after["off"])
    )


def merged(events: Sequence[LoggedEvent]) -> Iterator[LoggedEvent]:
    """Join neighbouring deltas of the same part into one event `first..seq` of at most 32 KiB."""
    index = 0
    while index < len(events):
        first = events[index]
        index += 1
        if first.e != DELTA or index == len(events) or events[index].e != DELTA:
            yield first
            continue
        texts, last, length, size = [first.d["x"]], first, len(first.d["x"]), byte_length(first.data)
        while index < len(events):
            following = events[index]
            if following.e != DELTA or size + byte_length(following.data) > MERGED_BYTES:
                break
            if not _continues(first.d, length, following.d):
                break
            texts.append(following.d["x"])
            length += len(following.d["x"])
            size += byte_length(following.data)
            last = following
            index += 1
        if last is first:
            yield first
        else:
            data = orjson.dumps({**first.d, "x": "".join(texts)}).decode()
            yield LoggedEvent(last.seq, DELTA, data, last.ts, first=first.first)
