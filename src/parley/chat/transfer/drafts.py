"""A conversation on its way in: what every format is read into, and the ids that make importing it twice harmless.

An id is a UUIDv7 whose time is the message's and whose random half is a hash of whose it is and of its id in the
source. The same source for the same user gives the same hash, whenever it is imported.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from parley.chat.transfer.errors import ItemRefused
from parley.core import clock

MESSAGES: Final = 20_000
_TITLE: Final = 200
_HASH_BITS: Final = 62
_EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
_EARLIEST_MS: Final = int(_EARLIEST.timestamp() * 1000)
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")


@dataclass(slots=True)
class DraftFile:
    """A file that a message carries. Its part stands in the message, with this as the value of `attachment`."""

    name: str
    read: Callable[[], bytes | None]
    """Gives the bytes, as long as the file that is imported is open; None where there are none after all."""


@dataclass(slots=True)
class DraftMessage:
    """A message. `parent` is the source's id of the message before it."""

    source: str
    parent: str | None
    role: str
    parts: list[dict[str, Any]]
    at: datetime | None = None
    model: str | None = None
    status: str = "completed"
    files: list[DraftFile] = field(default_factory=list)


@dataclass(slots=True)
class DraftConversation:
    """A conversation. `current` is the source's id of its visible end."""

    source: str
    title: str | None
    messages: list[DraftMessage]
    current: str | None = None
    at: datetime | None = None
    changed_at: datetime | None = None
    archived: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """A message with its id, in the order in which messages are written."""

    id: UUID
    parent_id: UUID | None
    at: datetime
    draft: DraftMessage

    @property
    def hash(self) -> int:
        """What is the same in every import."""
        return hash_of(self.id)


def hash_of(id: UUID) -> int:
    """Return the half of an id that comes from the source."""
    return id.int & ((1 << _HASH_BITS) - 1)


def conversation_id(user_id: UUID, draft: DraftConversation) -> UUID:
    """Return the id of a conversation: the same one for the same user and source."""
    return _id_at(_EARLIEST_MS, 0, _hash(user_id, "conversation", draft.source))


def file_id(message: Placed, number: int) -> UUID:
    """Return the id of a message's file: the same one for the same message."""
    return _id_at(_EARLIEST_MS, 0, _hash("file", message.hash, number))


def place(user_id: UUID, draft: DraftConversation) -> tuple[list[Placed], UUID | None]:
    """Return the messages in order, each after its parent, and the visible end.

    Whatever the source says of parents, a tree comes out: one that is unknown, or that leads back to its own child,
    counts as none. Raises `ItemRefused` for too many messages, or two with one id.
    """
    if len(draft.messages) > MESSAGES:
        raise ItemRefused(f"It has more than {MESSAGES} messages.")
    by_source = {message.source: message for message in draft.messages}
    if len(by_source) < len(draft.messages):
        raise ItemRefused("Two of its messages have the same id.")
    parents = _parents(draft.messages, by_source)
    times: dict[str, datetime] = {}
    start = _bounded(draft.at) or _EARLIEST
    for message in _parents_first(draft.messages, parents):
        before = times[parent] if (parent := parents[message.source]) is not None else start
        times[message.source] = max(_bounded(message.at) or before, before)
    depth = {message.source: number for number, message in enumerate(_parents_first(draft.messages, parents))}
    ordered = sorted(draft.messages, key=lambda message: (times[message.source], depth[message.source]))
    placed: dict[str, Placed] = {}
    moment, count = 0, 0
    for message in ordered:
        at = times[message.source]
        ms = int(at.timestamp() * 1000)
        count = count + 1 if ms <= moment else 0
        if count > 0xFFF:
            ms, count = max(ms, moment) + 1, 0
        moment = max(ms, moment)
        found = _hash(user_id, "message", draft.source, message.source)
        parent = parents[message.source]
        placed[message.source] = Placed(
            _id_at(moment, count, found), placed[parent].id if parent is not None else None, at, message
        )
    end = placed.get(draft.current or "") or (next(reversed(placed.values())) if placed else None)
    return list(placed.values()), end.id if end else None


def _parents(messages: Sequence[DraftMessage], known: Mapping[str, DraftMessage]) -> dict[str, str | None]:
    """Return each message's parent, without those that are unknown or would close a circle."""
    parents = {
        message.source: message.parent if message.parent in known and message.parent != message.source else None
        for message in messages
    }
    whole: set[str] = set()
    for source in parents:
        seen: list[str] = []
        on_way: set[str] = set()
        at: str | None = source
        while at is not None and at not in whole:
            if at in on_way:
                parents[seen[-1]] = None
                break
            seen.append(at)
            on_way.add(at)
            at = parents[at]
        whole.update(seen)
    return parents


def _parents_first(messages: Sequence[DraftMessage], parents: Mapping[str, str | None]) -> list[DraftMessage]:
    children: dict[str | None, list[DraftMessage]] = {}
    for message in messages:
        children.setdefault(parents[message.source], []).append(message)
    found: list[DraftMessage] = []
    waiting = children.get(None, [])[::-1]
    while waiting:
        message = waiting.pop()
        found.append(message)
        waiting += children.get(message.source, [])[::-1]
    return found


def _hash(*parts: object) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8]) & ((1 << _HASH_BITS) - 1)


def _id_at(ms: int, count: int, hashed: int) -> UUID:
    return UUID(int=ms << 80 | 7 << 76 | count << 64 | 2 << 62 | hashed)


def _bounded(at: datetime | None) -> datetime | None:
    return None if at is None else min(max(at, _EARLIEST), clock.now())


def within(at: datetime | None, otherwise: datetime) -> datetime:
    """Return a time that can have been: not before there was any of this, and not in the future."""
    return _bounded(at) or otherwise


# -- reading what others wrote ---------------------------------------------------------------------------------------


def text_of(value: object, *, limit: int | None = None) -> str:
    """Return a text as it can be stored; anything that is none is empty."""
    return _UNSTORABLE.sub("", value)[:limit] if isinstance(value, str) else ""


def title_of(value: object) -> str | None:
    """Return a title on one line, or None."""
    return " ".join(text_of(value).split())[:_TITLE].strip() or None


def moment_of(value: object) -> datetime | None:
    """Return a time: seconds since 1970 or ISO 8601; None for what is neither."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, tz=UTC) if math.isfinite(value) else None
        if isinstance(value, str):
            found = datetime.fromisoformat(value)
            return found if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return None


def mapping_of(value: object) -> Mapping[str, Any]:
    """Return an object, an empty one for what is none."""
    return value if isinstance(value, dict) else {}


def list_of(value: object) -> Sequence[Any]:
    """Return a list, an empty one for what is none."""
    return value if isinstance(value, list) else ()


def text_part(text: str) -> dict[str, Any]:
    """Return a part of text."""
    return {"type": "text", "text": text}
