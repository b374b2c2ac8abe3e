"""Which channels there are. Modules contribute sources; the shell puts them together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import orjson

from parley.core.db import Database, UnitOfWork
from parley.core.errors import NotFound
from parley.core.scope import Scope
from parley.realtime.events import Channel
from parley.realtime.frames import SNAPSHOT_BYTES, encode
from parley.realtime.log import Head, head_of

Mode = Literal["log", "keyed", "latest"]
State = dict[str, Any]


class ChannelNotFound(NotFound):
    """No such channel, or not the caller's to see."""

    message = "No such channel."


class ChannelSource(Protocol):
    """What a module says of its kind of channel. `prefix` is the name up to the colon, or the whole name.

    `permission` is what the caller's scope must have.
    """

    prefix: str
    mode: Mode
    permission: str

    async def resolve(self, unit: UnitOfWork, scope: Scope, argument: str) -> Channel:
        """Return the channel if the caller may see it, else raise `ChannelNotFound`."""
        ...

    async def state(self, unit: UnitOfWork, scope: Scope, channel: Channel) -> State:
        """Return the state after the last event that the unit's snapshot can see."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state and the position that it is the state of."""

    head: Head
    state: State

    def frames(self, channel: Channel) -> Iterator[str]:
        """Return the `snap` frames: each at most 64 KiB unless a single item is larger, lists to be joined."""
        lists = {key: value for key, value in self.state.items() if isinstance(value, list)}
        rest = {key: value for key, value in self.state.items() if key not in lists}
        room = SNAPSHOT_BYTES - 512 - len(orjson.dumps(rest, default=str))
        parts: list[dict[str, list[Any]]] = [{key: [] for key in lists}]
        size = 0
        for key, items in lists.items():
            for item in items:
                length = len(orjson.dumps(item, default=str)) + 1
                if size and size + length > room:
                    parts.append({name: [] for name in lists})
                    size = 0
                parts[-1][key].append(item)
                size += length
        for number, part in enumerate(parts):
            yield encode(
                t="snap", ch=channel.name, ep=self.head.epoch, seq=self.head.seq, part=number,
                more=number + 1 < len(parts), state={**rest, **part},
            )  # fmt: skip


class Channels:
    """All kinds of channel of this service."""

    def __init__(self, database: Database, sources: list[ChannelSource]) -> None:
        self._database = database
        self._sources = {source.prefix: source for source in sources}

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The kinds of channel there are."""
        return tuple(self._sources)

    def source(self, name: str) -> tuple[ChannelSource, str]:
        """Return who answers for a channel's name, and the part after the colon."""
        prefix, colon, argument = name.partition(":")
        source = self._sources.get(prefix)
        if source is None or (colon and not argument):
            raise ChannelNotFound
        return source, argument

    async def authorise(self, scope: Scope, name: str) -> tuple[Channel, Head, Mode]:
        """Return a channel that the caller may see, and where it stands. Raises `ChannelNotFound` and `Forbidden`."""
        source, argument = self.source(name)
        scope.require(source.permission)
        async with self._database.unit_of_work(scope) as unit:
            channel = await source.resolve(unit, scope, argument)
            return channel, await head_of(unit, channel), source.mode

    async def snapshot(self, scope: Scope, channel: Channel) -> Snapshot:
        """Return the state and the head of one instant. Raises `ChannelNotFound` if access is gone."""
        source, argument = self.source(channel.name)
        scope.require(source.permission)
        async with self._database.unit_of_work(scope, snapshot=True) as unit:
            await source.resolve(unit, scope, argument)
            return Snapshot(head=await head_of(unit, channel), state=await source.state(unit, scope, channel))
