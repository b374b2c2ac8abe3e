"""However the frames of the old and the new connection come in between each other, each event counts once, in order."""

import asyncio
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from parley.client import RealtimeClient
from parley.client.channel import ChannelState, Frame
from tests.client.author import CHANNEL, Author, steps, wire
from tests.client.scripted import Peer, ScriptedServer, Watched, following

Item = tuple[str, Any]
SNAPSHOT = "(snapshot)"


def pieces(e: str, d: Frame) -> list[Item]:
    """Return an event, and a delta as its characters: how they are merged on the way does not matter."""
    if e != "reply.delta":
        return [(e, d)]
    return [(e, (d["reply"], d["part"], d["off"] + at, character)) for at, character in enumerate(d["x"])]


def written(author: Author, first: int) -> list[tuple[int, Item]]:
    """Return everything that the log says from an event on, with the number of its event."""
    events = enumerate(author.events[first - 1 :], first)
    return [(seq, piece) for seq, (e, d) in events for piece in pieces(e, wire(d))]


def check(told: list[Item], author: Author, start: int) -> None:
    """What was told is the log from `start` on: nothing twice, and left out only what a snapshot held."""
    expected = written(author, start + 1)
    place = 0
    for item in told:
        if item[0] == SNAPSHOT:
            held = sum(seq <= item[1] for seq, _ in expected)
            assert held >= place, "a snapshot does not take back what was told"
            place = held
        else:
            assert item == expected[place][1]
            place += 1
    assert place == len(expected), "all of it"


# -- the client rule alone ---------------------------------------------------------------------------------------------


class Heard:
    """A channel, and what its user is told."""

    def __init__(self, author: Author) -> None:
        self.channel = ChannelState(CHANNEL)
        self.told: list[Item] = []
        self.start = author.head
        for frame in [author.subbed(recovered=False), *author.snap()]:
            self.take(frame)
        self.told.clear()

    def take(self, frame: Frame) -> None:
        match frame["t"]:
            case "subbed":
                self.channel.subbed(frame)
            case "snap":
                replaced = self.channel.snap(frame)
                assert replaced is not None
                if replaced:
                    self.told.append((SNAPSHOT, self.channel.last))
            case "ev":
                taken = self.channel.ev(frame)
                assert not taken.resubscribe, "nothing is missing"
                if taken.applied and taken.d is not None:
                    self.told += pieces(frame["e"], taken.d)


def told_by(author: Author, data: st.DataObject, first: int) -> list[Frame]:
    """Return a connection's frames from an event on, merged in some way."""
    frames = []
    while first <= author.head:
        frames.append(author.ev(first, data.draw(st.integers(1, 6))))
        first = frames[-1]["seq"] + 1
    return frames


@given(steps, steps, steps, st.data())
@hypothesis_settings(deadline=None, max_examples=200)
def test_any_interleaving_of_both_is_applied_once(
    before: list[tuple[Any, ...]], during: list[tuple[Any, ...]], after: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    author = Author().write([("ask",), *before])
    heard = Heard(author)
    author.write(during)
    since = data.draw(st.integers(heard.start, author.head))
    author.write(after)
    old = told_by(author, data, heard.start + 1)
    # The old one has told everything up to where the new one is to go on from.
    while old and (heard.channel.last or 0) < since:
        heard.take(old.pop(0))
    new = [author.subbed(recovered=True), *told_by(author, data, since + 1), author.live()]
    while old or new:
        source = old if old and (not new or data.draw(st.booleans())) else new
        heard.take(source.pop(0))
        assert heard.channel.state == author.states[heard.channel.last or 0]
    check(heard.told, author, heard.start)
    assert heard.channel.integrity_failures == 0


@given(steps, steps, st.data())
@hypothesis_settings(deadline=None, max_examples=100)
def test_a_snapshot_of_the_new_one_takes_nothing_back(
    before: list[tuple[Any, ...]], during: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    author = Author().write([("ask",), *before])
    heard = Heard(author)
    author.write(during)
    for frame in told_by(author, data, heard.start + 1)[: data.draw(st.integers(0, 40))]:
        heard.take(frame)
    taken = data.draw(st.integers(heard.start, author.head))
    heard.take(author.subbed(recovered=False, why=data.draw(st.sampled_from(["trimmed", "too_far", "initial"]))))
    for frame in [*author.snap(taken, per_part=data.draw(st.integers(1, 4))), *told_by(author, data, taken + 1)]:
        heard.take(frame)
    check(heard.told, author, heard.start)
    assert heard.channel.state == author.state
    assert heard.channel.last == author.head


# -- the client on two connections -------------------------------------------------------------------------------------


class Move:
    """A conversation that goes on while its client is asked to move, perhaps more than once."""

    def __init__(self, author: Author, server: ScriptedServer, data: st.DataObject) -> None:
        self.author = author
        self.watched = Watched(server.url, on_event=self.listen, on_snapshot=self.look)
        self.server = server
        self.data = data
        self.told: list[Item] = []
        self.old: Peer
        self.new: Peer | None = None
        self.at: dict[Peer, int] = {}
        self.asked = False

    @property
    def client(self) -> RealtimeClient:
        return self.watched.client

    async def begin(self) -> None:
        self.old = await following(self.watched, self.server, self.author)
        self.at[self.old] = self.author.head
        self.told.clear()

    def listen(self, ch: str, e: str, d: Frame) -> None:
        self.told += pieces(e, wire(d))

    def look(self, ch: str, state: Frame) -> None:
        self.told.append((SNAPSHOT, self.client.channel(ch).last))

    async def tell(self, peer: Peer) -> None:
        """Say the next event that there is."""
        if self.at[peer] < self.author.head:
            frame = self.author.ev(self.at[peer] + 1, self.data.draw(st.integers(1, 6)))
            self.at[peer] = frame["seq"]
            with suppress(ConnectionClosed):  # it has been left
                await peer.say(frame)

    async def settle(self) -> None:
        if self.asked:
            return  # which of the two would answer is not known
        await self.old.say({"t": "hb", "ts": 1, "heads": {CHANNEL: self.at[self.old]}})
        await self.old.next("hb")

    async def ask(self) -> None:
        if self.asked:
            return
        self.asked = True
        await self.old.say({"t": "goaway", "reason": "deploy", "reconnect_after_ms": 0, "deadline_ms": 1000})
        self.new = await self.server.accept()
        [sub] = (await self.new.next("hello"))["subs"]
        self.at[self.new] = sub["since"]["seq"]
        assert self.at[self.new] <= self.author.head

    async def welcome(self) -> None:
        """Welcome the new one, with a replay or a snapshot to come. What the old one says now comes too late."""
        if self.new is None:
            return
        new, self.new = self.new, None
        await new.say({"t": "welcome", "v": 1, "limits": {}})
        if self.data.draw(st.booleans()):
            await new.say(self.author.subbed(recovered=True))
        else:
            self.at[new] = self.data.draw(st.integers(self.at[new], self.author.head))
            await new.say(self.author.subbed(recovered=False, why="too_far"), *self.author.snap(self.at[new]))
        for _ in range(self.data.draw(st.integers(0, 3))):
            await self.tell(self.old)
            await self.tell(new)
        assert await self.old.ended() == 1000
        self.old, self.asked = new, False

    async def finish(self) -> None:
        await self.welcome()
        while self.at[self.old] < self.author.head:
            await self.tell(self.old)
        await self.old.say(self.author.live())
        await self.settle()


async def moved(todo: list[tuple[Any, ...]], data: st.DataObject) -> None:
    author = Author().write([("ask",)])
    async with ScriptedServer.running() as server:
        move = Move(author, server, data)
        async with move.client:
            await move.begin()
            start = author.head
            for step in todo:
                author.write([step])
                for do in data.draw(st.lists(st.sampled_from(["old", "old", "settle", "ask", "welcome"]), max_size=3)):
                    match do:
                        case "old":
                            await move.tell(move.old)
                        case "settle":
                            await move.settle()
                        case "ask":
                            await move.ask()
                        case "welcome":
                            await move.welcome()
            await move.finish()
            check(move.told, author, start)
            assert move.client.state(CHANNEL) == author.state
            assert move.client.channel(CHANNEL).last == author.head
            assert move.client.integrity_failures == 0
            assert "sub" not in [frame["t"] for peer in move.at for frame in peer.heard[1:] if peer is not move.old]
            assert "disconnected" not in [change.state for change in move.watched.changes]


@given(steps, st.data())
@hypothesis_settings(deadline=None, max_examples=60)
def test_a_client_that_moves_hears_everything_once(todo: list[tuple[Any, ...]], data: st.DataObject) -> None:
    asyncio.run(moved(todo, data))
