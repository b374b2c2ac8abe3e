"""The world of the model: a log that is a list, processes with their real rings, readers with their real cursors."""

import copy
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import pytest

from parley.client.channel import ChannelState
from parley.core.settings import RealtimeSettings
from parley.realtime import bus as bus_module
from parley.realtime.bus import Bus
from parley.realtime.channels import Mode, Snapshot
from parley.realtime.cursor import Cursor
from parley.realtime.events import Channel, LoggedEvent
from parley.realtime.frames import Since
from parley.realtime.log import Head
from parley.realtime.ring import Ring
from tests.client.author import CHANNEL, Author, Frame

PROCESSES = 2
_WORKSPACE = UUID(int=1)
ONE_CHANNEL = Channel(_WORKSPACE, CHANNEL, CHANNEL)
# Small, so that rings overflow, readers lag and replays are refused within a few steps.
SETTINGS = RealtimeSettings(
    ring_events=8, ring_bytes=4096, replay_events=25, replay_bytes=4096, lag_events=20, lag_bytes=8192
)


def run[T](work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing but its turn."""
    while True:
        try:
            work.send(None)
        except StopIteration as done:
            value: T = done.value
            return value


class World:
    """The log of every epoch, as lists; and what happens while someone reads it."""

    def __init__(self) -> None:
        self.author = Author()
        self.epochs = {self.author.ep: self.author}
        self.floor = 0
        self.buses = [ModelBus(self) for _ in range(PROCESSES)]
        self.pockets: list[list[list[LoggedEvent]]] = [[] for _ in range(PROCESSES)]
        self.meanwhile: list[list[tuple[Any, ...]]] = []

    @property
    def head(self) -> Head:
        return Head(self.author.head, self.floor, self.author.ep)

    def events(self, after: int, until: int | None = None) -> list[LoggedEvent]:
        rows = self.author.events[after:until]
        return [LoggedEvent(seq, e, orjson.dumps(d).decode(), 1) for seq, (e, d) in enumerate(rows, after + 1)]

    def write(self, todo: Sequence[tuple[Any, ...]]) -> None:
        """Commit, and leave an announcement for each process in its pocket."""
        before = self.author.head
        self.author.write(list(todo))
        batch = self.events(before)
        if batch:
            for pocket in self.pockets:
                pocket.append(batch)

    def happen(self) -> None:
        """Let something be committed between two looks of a reader."""
        if self.meanwhile:
            self.write(self.meanwhile.pop(0))

    def trim(self, floor: int) -> None:
        self.floor = max(self.floor, min(floor, self.author.head))

    def restore(self, seq: int) -> None:
        """Go back to an older backup: the epoch changes, and numbers may come again with other content."""
        former = self.author
        # A question and the beginning of its answer are one transaction: no backup ends between them.
        while any(message["status"] == "queued" for message in former.states[seq]["messages"]) or _ends_with_question(
            former.states[seq]
        ):
            seq -= 1
        made = Author(ep=f"e{len(self.epochs) + 1}")
        made.events = copy.deepcopy(former.events[:seq])
        made.states = copy.deepcopy(former.states[: seq + 1])
        made.state = copy.deepcopy(former.states[seq])
        made._count = former._count + 100
        self.author = self.epochs[made.ep] = made
        self.floor = min(self.floor, seq)
        # Those who announced are gone with the old database.
        for pocket in self.pockets:
            pocket.clear()


def _ends_with_question(state: Frame) -> bool:
    return bool(state["messages"]) and state["messages"][-1]["role"] == "user"


class _Lists:
    """Stands where the database is: a unit of work that is the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    @asynccontextmanager
    async def system_unit_of_work(self) -> AsyncIterator[World]:
        yield self._world


async def _read_range(unit: World, channel: Channel, *, after: int, limit: int) -> list[LoggedEvent]:
    return unit.events(max(after, unit.floor))[:limit]


def use_lists(patch: pytest.MonkeyPatch) -> None:
    """Let buses read the lists of their world, and wait for nothing."""
    patch.setattr(bus_module, "read_range", _read_range)
    patch.setattr(bus_module, "_ANNOUNCED_S", 0)


class ModelBus(Bus):
    """The real bus of a process; only what it reads comes from the lists."""

    def __init__(self, world: World) -> None:
        super().__init__(_Lists(world), SETTINGS)  # type: ignore[arg-type]  # all that it needs of a database
        self.world = world

    async def _heads(self, rings: Sequence[Ring]) -> Any:
        row = {"seq": self.world.author.head, "epoch": self.world.author.ep, "floor": self.world.floor}
        self.world.happen()
        return [(ring, row) for ring in rings]


class Reads:
    """The log and the channels as a cursor sees them."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def authorise(self, scope: object, name: str) -> tuple[Channel, Head, Mode]:
        head = self._world.head
        self._world.happen()
        return ONE_CHANNEL, head, "log"

    async def snapshot(self, scope: object, channel: Channel) -> Snapshot:
        self._world.happen()
        made = Snapshot(self._world.head, copy.deepcopy(self._world.author.state))
        self._world.happen()
        return made

    async def read(self, scope: object, channel: Channel, *, after: int, limit: int, **_: Any) -> list[LoggedEvent]:
        return self._world.events(max(after, self._world.floor))[:limit]

    async def size(self, scope: object, channel: Channel, *, after: int) -> int:
        return sum(len(event.data) for event in self._world.events(max(after, self._world.floor)))


class _NoLimit:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


@dataclass
class Reader:
    """A client with its connection: what the server has said and it has not yet read is `wire`."""

    world: World
    state: ChannelState = field(default_factory=lambda: ChannelState(CHANNEL))
    process: int = -1
    cursor: Cursor | None = None
    wire: list[Frame] = field(default_factory=list)
    live_sent: bool = False
    said: int | None = None

    def connect(self, process: int) -> None:
        self.process = process
        self.subscribe(self.state.since)

    def disconnect(self) -> None:
        """Whatever was under way is lost."""
        self.wire.clear()
        self.close()

    def close(self) -> None:
        if self.cursor is not None:
            self.cursor.close()
            self.cursor = None

    def _new_cursor(self) -> Cursor:
        reads: Any = Reads(self.world)
        limit: Any = _NoLimit()
        return Cursor(
            bus=self.world.buses[self.process], log=reads, channels=reads, settings=SETTINGS, lookups=limit,
            scope=None, wake=lambda: None,  # type: ignore[arg-type]  # only handed on
        )  # fmt: skip

    def subscribe(self, since: Frame | None) -> None:
        """Do what the server does with a `sub`."""
        self.close()
        cursor = self._new_cursor()
        head, why, snapshot = run(cursor.open(CHANNEL, None if since is None else Since(**since)))
        self.said = None if since is None or why != "ok" else int(since["seq"])
        self.wire.append({
            "t": "subbed", "ch": CHANNEL, "ep": head.epoch, "head": head.seq, "floor": head.floor, "mode": "log",
            "recovered": why == "ok", "why": why,
        })  # fmt: skip
        if snapshot is not None:
            self._say_snapshot(snapshot)
        self.cursor, self.live_sent = cursor, False

    def _say_snapshot(self, snapshot: Snapshot) -> None:
        self.said = snapshot.head.seq
        self.wire += [orjson.loads(text) for text in snapshot.frames(ONE_CHANNEL)]

    def serve(self, max_bytes: int) -> bool:
        """Do one turn of the server's writer. Returns whether anything was said."""
        cursor = self.cursor
        if cursor is None:
            return False
        before = len(self.wire)
        if cursor.lost:
            self.subscribe(None)
            return True
        if cursor.is_behind:
            if cursor.lags:
                self._say_snapshot(run(cursor.renew()))
                self.live_sent = False
            else:
                events = run(cursor.read(limit=10, max_bytes=max_bytes))
                for event in events:
                    assert self.said is not None
                    assert event.first == self.said + 1, "what is sent follows on from what was sent before"
                    self.said = event.seq
                    self.wire.append(orjson.loads(event.frame(ONE_CHANNEL)))
                if cursor.lost:
                    return True
        if not self.live_sent and cursor.is_live:
            self.live_sent = True
            self.wire.append({"t": "live", "ch": CHANNEL, "seq": cursor.seq})
        return len(self.wire) > before

    def catch_up(self) -> None:
        """Say and read all that there is."""
        while self.serve(32768) or self.wire:
            while self.wire:
                self.read()

    def read(self) -> None:
        """Let the client take one frame; it asks again where its rule says so."""
        frame = self.wire.pop(0)
        match frame["t"]:
            case "subbed":
                self.state.subbed(frame)
            case "snap":
                if self.state.snap(frame) is None:
                    self.subscribe(self.state.since)
            case "ev":
                if self.state.ev(frame).resubscribe:
                    self.subscribe(self.state.since)

    def check(self) -> None:
        """What the client shows is the state after the event that it says it has."""
        assert self.state.integrity_failures == 0
        if self.state.last is None or self.state.ep is None:
            return
        truth = self.world.epochs[self.state.ep].states[self.state.last]
        assert self.state.state == truth, f"not the state after event {self.state.last} of {self.state.ep}"
