"""A server that asks its clients to go: they open the next connection first, and lose and repeat nothing."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.client.author import CHANNEL, Author
from tests.client.conftest import Watch
from tests.client.scripted import DEADLINE_S, Frame, Peer, ScriptedServer, Watched, following
from tests.client.test_client_rule import settled


def goaway(after_ms: int = 100, **fields: Any) -> Frame:
    return {"t": "goaway", "reason": "deploy", "reconnect_after_ms": after_ms, "deadline_ms": 20_000, **fields}


async def write(author: Author, *peers: Peer, text: str = "more ") -> None:
    """Append to the reply and have these connections tell it."""
    author.delta(0, text)
    for peer in peers:
        await peer.say(author.ev(author.head))


def states(watched: Watched) -> list[str]:
    return [change.state for change in watched.changes]


def deltas(watched: Watched) -> list[str]:
    return [d["x"] for _, e, d in watched.events if e == "reply.delta"]


async def test_both_connections_tell_the_same_events_in_mid_reply(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    start = author.head
    await old.say(goaway(1500))
    new = await server.accept()
    hello = await new.next("hello")
    assert watched.delays == [1.5]
    assert hello["auth"] == {"ticket": "tk_2"}, "each connection has its own credential"
    assert hello["subs"] == [{"ch": CHANNEL, "since": {"ep": "e1", "seq": start}}]
    for text in ("a", "b", "c"):
        await write(author, old, text=text)
    await settled(old)
    assert watched.client.state(CHANNEL) == author.state, "until the new one stands the old one serves"
    await new.say({"t": "welcome", "v": 1, "limits": {}}, *author.answer(hello["subs"][0]["since"]))
    for text in ("d", "e"):
        author.delta(0, text)
        await new.say(author.ev(author.head))
        await old.say(author.ev(author.head))
    author.end(0, "completed")
    await new.say(author.ev(author.head))
    assert await old.ended() == 1000
    async with asyncio.timeout(DEADLINE_S):
        assert await watched.client.wait_terminal("m0001r") == author.state["messages"][1]
    assert deltas(watched) == ["a", "b", "c", "d", "e"], "each once"
    assert watched.client.state(CHANNEL) == author.state
    assert watched.client.integrity_failures == 0
    await settled(new)
    assert "sub" not in [frame["t"] for frame in new.heard], "nothing was missing"
    assert states(watched) == ["connecting", "connected", "connected"]
    assert watched.changes[-1].positions == {CHANNEL: start + 3}


async def test_a_refusal_and_then_the_close(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 7.0
    server.refuse.append((503, {}))
    await old.say(goaway(100))
    assert [await watched.waits() for _ in range(2)] == [0.1, 1.0], "it was refused at the door"
    refusing = await server.accept()
    await refusing.next("hello")
    await write(author, old)
    await refusing.close(1013, "overloaded")
    assert await watched.waits() == 7.0, "not before five seconds have passed"
    await write(author, old)
    await settled(old)
    assert watched.client.state(CHANNEL) == author.state, "the old one serves all the while"
    await old.close(1012, "restart")
    assert (await watched.until("disconnected")).code == 1012
    assert server.nobody_came(), "the wait goes on: others want to come back too"
    since = author.head
    await write(author)
    watched.released.set()
    new = await server.accept()
    hello = await new.welcome()
    assert hello["subs"] == [{"ch": CHANNEL, "since": {"ep": "e1", "seq": since}}]
    await new.say(*author.answer(hello["subs"][0]["since"]))
    await settled(new)
    assert watched.client.state(CHANNEL) == author.state
    assert deltas(watched) == ["more "] * 3
    assert watched.delays == [0.1, 1.0, 7.0]
    assert states(watched) == ["connecting", "connected", "disconnected", "connecting", "connected"]


async def test_nobody_listens_where_it_is_to_go(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 8.0
    server.stop_listening()
    await old.say(goaway(100))
    for expected in (0.1, 1.0, 2.0, 4.0):
        assert await watched.waits() == expected, "what the old one brings does not make it hurry"
        await write(author, old)
        await settled(old)
    assert await watched.waits() == 8.0
    assert watched.client.state(CHANNEL) == author.state
    assert deltas(watched) == ["more "] * 4
    assert states(watched) == ["connecting", "connected"]


async def test_a_second_goaway_changes_nothing(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 1.0
    await old.say(goaway(1500), goaway(9000))
    assert await watched.waits() == 1.5
    await old.say(goaway(0), goaway(60_000))
    await settled(old)
    assert server.nobody_came()
    watched.released.set()
    new = await server.accept()
    await old.say(goaway(0))
    await new.welcome()
    assert await old.ended() == 1000
    await settled(new)
    assert server.nobody_came()
    assert watched.delays == [1.5]


async def test_a_second_goaway_does_not_change_what_holds_for_the_close(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    await peer.say({"t": "batch", "f": [goaway(250), goaway(9000)]})
    await peer.close(1012)
    await server.accept()
    assert watched.delays == [0.25]


async def test_the_new_server_may_go_as_well(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peers = [await following(watched, server, author)]
    for after_ms in (100, 200, 300):
        await peers[-1].say(goaway(after_ms))
        new = await server.accept()
        hello = await new.welcome()
        author.delta(0, "x")
        await new.say(*author.answer(hello["subs"][0]["since"]))
        assert await peers[-1].ended() == 1000
        await settled(new)
        peers.append(new)
    assert deltas(watched) == ["x"] * 3
    assert watched.delays == [0.1, 0.2, 0.3]


async def test_a_goaway_that_names_no_time(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    old = await server.accept()
    await old.welcome()
    await old.say({"t": "goaway", "reason": "deploy"})
    await (await server.accept()).welcome()
    assert await old.ended() == 1000
    assert watched.delays == [0.5]


async def test_the_old_one_is_closed_in_time_though_it_goes_on_talking(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    link = watched.client._link
    assert link is not None
    await old.say(goaway(0))
    new = await server.accept()
    await new.next("hello")
    author.delta(0, "x" * 2000)
    frame = author.ev(author.head)

    async def talk() -> None:
        with suppress(ConnectionClosed):
            while True:
                await old.say(*[frame] * 40)
                await asyncio.sleep(0)

    talking = asyncio.create_task(talk())
    await new.say({"t": "welcome", "v": 1, "limits": {}})
    async with asyncio.timeout(DEADLINE_S):
        await link._socket.wait_closed()
        await talking
    assert link._socket.close_code == 1000, "it did not have to be cut"


# -- the old connection ends first ---------------------------------------------------------------------------------


async def test_a_close_while_it_waits_does_not_hurry_it(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 15.0
    await old.say(goaway(20_000))
    assert await watched.waits() == 20.0
    await old.close(1012, "restart")
    await watched.until("disconnected")
    assert server.nobody_came()
    watched.released.set()
    await (await server.accept()).welcome()
    await watched.until("connected")
    assert watched.delays == [20.0], "the given value, counted once"


async def test_a_connection_that_breaks_while_it_waits_is_made_again_at_once(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 15.0
    await old.say(goaway(20_000))
    assert await watched.waits() == 20.0
    old.abort()
    await (await server.accept()).welcome()
    await watched.until("connected")
    assert watched.delays == [20.0, 1.0]


async def test_access_that_is_withdrawn_while_it_waits(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 15.0
    await old.say(goaway(20_000))
    assert await watched.waits() == 20.0
    await old.close(4403, "revoked")
    assert (await watched.until("stopped")).code == 4403
    assert server.nobody_came()


async def test_access_that_is_withdrawn_while_it_tries_again(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    watched.hold_s = 1.0
    server.stop_listening()
    await old.say(goaway(100))
    assert [await watched.waits() for _ in range(2)] == [0.1, 1.0]
    await old.close(4403, "revoked")
    assert (await watched.until("stopped")).code == 4403


async def test_closing_while_it_waits(server: ScriptedServer, author: Author) -> None:
    watched = Watched(server.url)
    async with watched.client:
        old = await following(watched, server, author)
        watched.hold_s = 15.0
        await old.say(goaway(20_000))
        assert await watched.waits() == 20.0
    assert await old.ended() == 1000
    assert watched.changes[-1].state == "stopped"


@pytest.mark.parametrize("code", [4403, 4401])
async def test_a_new_connection_that_is_refused_for_good(
    server: ScriptedServer, watch: Watch, author: Author, code: int
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    await old.say(goaway(100))
    for _ in range(2 if code == 4401 else 1):
        peer = await server.accept()
        await peer.next("hello")
        await write(author, old)
        await settled(old)
        await peer.close(code)
    await write(author, old)
    await settled(old)
    assert watched.client.state(CHANNEL) == author.state, "the old one is used for as long as it lasts"
    assert server.nobody_came()
    assert "stopped" not in states(watched)
    await old.close(1012)
    peer = await server.accept()
    await peer.next("hello")
    await peer.close(code)
    assert (await watched.until("stopped")).code == code
