"""Channels whose intermediate values do not count: the last value per key, at the pace that a client asks for."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.realtime.channels import Mode, State
from parley.realtime.conflation import conflated
from parley.realtime.events import Channel, LoggedEvent, NewEvent
from parley.realtime.log import append
from tests.conftest import Account
from tests.realtime.conftest import Frame, LiveServer, Serve
from tests.realtime.steps import channel_of, scope_of


def event(seq: int, key: str | None, value: int = 0) -> LoggedEvent:
    return LoggedEvent(seq, "position.upsert", json.dumps({"key": key, "value": value} if key else {"value": value}), 1)


def test_the_last_value_of_each_key_is_kept_in_order() -> None:
    events = [event(5, "a"), event(6, "b"), event(7, "a"), event(8, "c"), event(9, "a")]
    assert [(e.first, e.seq, e.d["key"]) for e in conflated(events)] == [(5, 6, "b"), (7, 8, "c"), (9, 9, "a")]


def test_what_has_no_key_is_kept() -> None:
    events = [event(1, "a"), event(2, None, 7), event(3, "a")]
    assert [(e.first, e.seq) for e in conflated(events)] == [(1, 2), (3, 3)]
    assert not list(conflated([]))


def test_whoever_follows_the_ranges_has_the_last_values() -> None:
    choose = random.Random(7)
    for _ in range(50):
        values: dict[str, int] = {}
        events = []
        for seq in range(1, choose.randint(2, 200)):
            key = choose.choice("abcdefg")
            values[key] = seq
            events.append(event(seq, key, seq))
        last, held = 0, {}
        for found in conflated(events):
            assert found.first == last + 1
            last = found.seq
            held[found.d["key"]] = found.d["value"]
        assert (last, held) == (events[-1].seq, values)


class Positions:
    """A source that only these tests have: the newest value per key is its state."""

    prefix = "positions"
    permission = "realtime:connect"

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self.items: dict[str, int] = {}

    async def resolve(self, unit: UnitOfWork, scope: Scope, argument: str) -> Channel:
        return Channel(scope.workspace_id, f"positions:{argument}", f"positions:{argument}")

    async def state(self, unit: UnitOfWork, scope: Scope, channel: Channel) -> State:
        return {"items": dict(self.items)}


class Watcher:
    """A client of such a channel, by the client rule. Its frames are in no document yet, so it reads them itself."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.last = -1
        self.items: dict[str, int] = {}
        self.frames = 0
        self.moments: list[float] = []

    async def sub(self, **fields: Any) -> Frame:
        await self.socket.send(json.dumps({"t": "sub", "id": 1, "ch": "positions:x", **fields}))
        subbed = await self.until("subbed")
        await self.until("live")
        return subbed

    async def until(self, t: str) -> Frame:
        async with asyncio.timeout(10):
            while True:
                frame = await self.read()
                if frame["t"] == t:
                    return frame

    async def read(self) -> Frame:
        async with asyncio.timeout(10):
            frame: Frame = json.loads(await self.socket.recv())
        if frame["t"] == "snap":
            self.items, self.last = frame["state"]["items"], frame["seq"]
        elif frame["t"] == "live":
            assert self.last in {-1, frame["seq"]}
            self.last = frame["seq"]
        elif frame["t"] == "ev":
            assert frame.get("from", frame["seq"]) == self.last + 1
            self.last = frame["seq"]
            self.items[frame["d"]["key"]] = frame["d"]["value"]
            self.frames += 1
            self.moments.append(time.monotonic())
            await self.socket.send(json.dumps({"t": "ack", "a": {"positions:x": self.last}}))
        return frame


@asynccontextmanager
async def watching(server: LiveServer, account: Account) -> AsyncIterator[Watcher]:
    async with connect(server.ws, subprotocols=[Subprotocol("parley.v1")], compression=None) as socket:
        await socket.send(json.dumps({"t": "hello", "v": 1, "auth": {"token": account.access_token}}))
        watcher = Watcher(socket)
        await watcher.until("welcome")
        yield watcher


async def move(server: LiveServer, account: Account, source: Positions, *, count: int, keys: int) -> int:
    """Change values so many times; return the last position."""
    channel = await channel_of(server, account, "positions:x")
    events = []
    for number in range(count):
        key = f"k{number % keys}"
        source.items[key] = source.items.get(key, 0) + 1
        events.append(NewEvent(channel, "position.upsert", {"key": key, "value": source.items[key]}))
    async with server.app.state.database.unit_of_work(scope_of(account)) as unit:
        return (await append(unit, server.realtime.bus, events))[-1]


@pytest.mark.parametrize("mode", ["keyed", "latest"])
async def test_a_paced_client_ends_with_the_values_of_the_source(
    serve_with: Serve, mode: Literal["keyed", "latest"]
) -> None:
    async with serve_with() as server, server.sign_up() as account:
        source = Positions(mode)
        server.realtime.channels._sources["positions"] = source
        async with watching(server, account) as paced:
            assert (await paced.sub(max_hz=10))["mode"] == mode
            for _ in range(20):
                head = await move(server, account, source, count=200, keys=20)
            while paced.last < head:
                await paced.read()
            assert paced.items == source.items
            assert paced.frames < 1000, "not every one of the 4,000 changes"
            # One more, when all is quiet: it comes within the pause.
            head = await move(server, account, source, count=1, keys=1)
            while paced.last < head:
                await paced.read()
            assert paced.items == source.items


async def test_max_hz_is_a_bound(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        source = Positions("keyed")
        server.realtime.channels._sources["positions"] = source
        async with watching(server, account) as paced:
            await paced.sub(max_hz=5)
            began = time.monotonic()
            head = 0
            while time.monotonic() - began < 1:
                head = await move(server, account, source, count=3, keys=1)
                # Within one page of the log between two frames: of several pages each has its own last value.
                await asyncio.sleep(0.01)
            while paced.last < head:
                await paced.read()
            # One key: a frame each fifth of a second, and the first at once.
            assert 2 <= paced.frames <= (paced.moments[-1] - began) * 5 + 2


async def test_a_log_is_never_slowed_down(serve_with: Serve) -> None:
    from tests.realtime.steps import publish, task_of

    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:
        task = await task_of(account)
        await peer.sub("tasks", since={"seq": -1}, max_hz=1)
        began = time.monotonic()
        for _ in range(6):
            seq = await publish(server, account, task, count=1, size=10)
            assert (await peer.until("ev"))["seq"] == seq
        assert time.monotonic() - began < 4
