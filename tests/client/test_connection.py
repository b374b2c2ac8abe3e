"""How a connection begins, ends, and is made again."""

import asyncio
import json
import socket as sockets

import pytest

from parley.client import ApiError, ConnectionStopped, RealtimeClient, ServerUnreachable, Timing
from tests.client.author import CHANNEL, Author
from tests.client.conftest import Watch
from tests.client.scripted import DEADLINE_S, ScriptedServer, Watched, following


async def test_hello_comes_first_with_credential_and_subscriptions(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    asking = asyncio.create_task(watched.client.subscribe(CHANNEL))
    peer = await server.accept()
    hello = await peer.welcome()
    assert hello == {
        "t": "hello",
        "v": 1,
        "auth": {"ticket": "tk_1"},
        "client": {"name": "parley-python"},
        "caps": ["batch"],
        "subs": [{"ch": CHANNEL}],
    }
    await watched.until("connected")
    asking.cancel()


async def test_a_connection_that_breaks_is_resumed_in_one_round_trip(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    since = author.head
    peer.abort()
    author.delta(0, "two")
    again = await server.accept()
    hello = await again.welcome()
    assert hello["auth"] == {"ticket": "tk_2"}, "each connection has its own credential"
    assert hello["subs"] == [{"ch": CHANNEL, "since": {"ep": "e1", "seq": since}}]
    await again.say(*author.answer(hello["subs"][0]["since"]))
    author.end(0, "completed")
    await again.say(author.ev(author.head))
    async with asyncio.timeout(DEADLINE_S):
        ended = await watched.client.wait_terminal("m0001r")
    assert ended == author.state["messages"][1]
    assert watched.client.state(CHANNEL) == author.state
    assert [e for _, e, _ in watched.events] == ["reply.delta", "reply.completed"]
    states = [(change.state, change.code) for change in watched.changes]
    assert states == [
        ("connecting", None), ("connected", None), ("disconnected", 1006), ("connecting", None), ("connected", None)
    ]  # fmt: skip
    assert watched.changes[-1].positions == {CHANNEL: since}


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013, 4000, 4001, 4002, 4003, 4004, 4199, 4401, 4408, 4429])
async def test_after_these_codes_it_comes_back(server: ScriptedServer, watch: Watch, code: int) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    await peer.close(code, "why")
    again = await server.accept()
    await again.welcome()
    await watched.until("connected")
    assert watched.delays == [5.5 if code == 1013 else 0.5]
    assert (watched.changes[2].code, watched.changes[2].reason) == (code, "why")


@pytest.mark.parametrize("code", [1000, 1003, 1009, 4400, 4403, 4406, 4409, 4450])
async def test_after_these_codes_it_stops(server: ScriptedServer, watch: Watch, code: int) -> None:
    watched = watch()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "hello"))
    waiting = asyncio.create_task(watched.client.wait_terminal("r"))
    peer = await server.accept()
    await peer.welcome()
    await peer.next("chat.send")
    await peer.close(code, "why")
    stopped = await watched.until("stopped")
    assert stopped.code == code
    for task in (sending, waiting):
        with pytest.raises(ConnectionStopped) as caught:
            await task
        assert (caught.value.code, caught.value.reason) == (code, "why")
    with pytest.raises(ConnectionStopped):
        await watched.client.send(CHANNEL, "again")
    assert server.nobody_came()


async def test_a_refused_credential_is_renewed_once(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    for ticket in ("tk_1", "tk_2"):
        peer = await server.accept()
        hello = await peer.next("hello")
        assert hello["auth"] == {"ticket": ticket}
        await peer.say({"t": "err", "code": "unauthenticated", "msg": "no", "retry": "never"})
        await peer.close(4401, "no")
    assert (await watched.until("stopped")).code == 4401
    assert watched.credentials_asked == 2


async def test_a_credential_that_worked_may_be_refused_again_later(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    for _ in range(3):
        peer = await server.accept()
        await peer.welcome()
        await peer.say({"t": "hb", "ts": 1, "heads": {}})
        await peer.next("hb")
        await peer.close(4401, "revoked")
    await (await server.accept()).welcome()
    await watched.until("connected")


async def test_too_many_connections_waits_as_long_as_it_is_told(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.next("hello")
    await peer.say({"t": "err", "code": "rate_limited", "msg": "many", "retry": "backoff", "retry_after_ms": 5000})
    await peer.close(4429, "too many connections")
    await server.accept()
    assert watched.delays == [5.0]


async def test_too_many_frames_wait_as_long_as_the_last_refusal_says(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    refusal = {"t": "err", "code": "rate_limited", "msg": "many", "retry": "backoff"}
    await peer.say(
        {**refusal, "id": 77, "retry_after_ms": 9000},
        {**refusal, "id": 78, "retry_after_ms": 3000},
        {**refusal, "id": 79, "ch": CHANNEL, "retry_after_ms": 60_000},
    )
    await peer.close(4429, "too many frames")
    await server.accept()
    assert watched.delays == [3.0], "and what holds for a channel does not hold for the connection"


@pytest.mark.parametrize(("asked_ms", "expected"), [(1000, 5.0), (8000, 8.0), (None, 5.5)])
async def test_an_overloaded_server(
    server: ScriptedServer, watch: Watch, asked_ms: int | None, expected: float
) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.next("hello")
    after = {} if asked_ms is None else {"retry_after_ms": asked_ms}
    await peer.say({"t": "err", "code": "busy", "msg": "Many are connecting.", "retry": "backoff", **after})
    await peer.close(1013, "busy")
    await (await server.accept()).welcome()
    await watched.until("connected")
    assert watched.delays == [expected]


async def test_attempts_that_bring_nothing_come_ever_more_seldom(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    for _ in range(4):
        peer = await server.accept()
        await peer.welcome()
        await peer.close(4000)
    peer = await server.accept()
    assert watched.delays == [0.5, 1, 2, 4]
    await peer.welcome()
    await peer.say({"t": "hb", "ts": 1, "heads": {}})
    await peer.next("hb")
    await peer.close(4000)
    await server.accept()
    assert watched.delays[4:] == [0.5], "what brought something starts anew"


@pytest.mark.parametrize(("status", "stops"), [(403, True), (404, True), (503, False), (429, False)])
async def test_a_refused_upgrade(server: ScriptedServer, watch: Watch, status: int, stops: bool) -> None:
    server.refuse.append((status, {"Retry-After": "7"}))
    watched = watch()
    if stops:
        assert (await watched.until("stopped")).code == status
    else:
        await (await server.accept()).welcome()
        await watched.until("connected")
        assert watched.delays == [7.0]


async def test_a_server_that_is_not_there_is_tried_again(server: ScriptedServer, watch: Watch) -> None:
    with sockets.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    watched = watch(url=f"ws://127.0.0.1:{port}/")
    for delay in (0.5, 1, 2):
        async with asyncio.timeout(DEADLINE_S):
            assert await watched.slept.get() == delay
    assert {change.state for change in watched.changes} == {"connecting"}


async def test_a_server_that_speaks_something_else_ends_it(watch: Watch) -> None:
    async with ScriptedServer.running(subprotocol=None) as other:
        watched = watch(url=other.url)
        peer = await other.accept()
        await peer.welcome()
        assert (await watched.until("stopped")).code == 4406


@pytest.mark.parametrize("greeting", ["not json", "[]", '{"no":"t"}'])
async def test_a_server_that_cannot_be_understood_ends_it(server: ScriptedServer, watch: Watch, greeting: str) -> None:
    watched = watch()
    peer = await server.accept()
    await peer._socket.send(greeting)
    assert (await watched.until("stopped")).code == 1002


async def test_no_welcome_in_time_is_tried_again(server: ScriptedServer, watch: Watch) -> None:
    watched = watch(timing=Timing(open_s=0.05))
    await (await server.accept()).next("hello")
    await (await server.accept()).welcome()
    await watched.until("connected")


async def test_credentials_that_cannot_be_had(server: ScriptedServer, watch: Watch) -> None:
    problems: list[Exception] = [
        ServerUnreachable("away"), ApiError(503, "unavailable", "away", {"retry_after_s": 3}), ApiError(401, "no", "no")
    ]  # fmt: skip

    async def credentials() -> dict[str, str]:
        raise problems.pop(0)

    watched = watch(credentials=credentials)
    assert (await watched.until("stopped")).code == 401
    assert watched.delays == [0.5, 3]
    with pytest.raises(ConnectionStopped):
        await watched.client.connected()


async def test_silence_is_a_broken_connection(server: ScriptedServer, watch: Watch) -> None:
    watched = watch(timing=Timing(silence_s=0.05))
    await (await server.accept()).welcome()
    await (await server.accept()).welcome()
    lost = next(change for change in watched.changes if change.state == "disconnected")
    assert lost.reason == "nothing was heard"


async def test_a_server_that_asks_to_move_is_left_when_the_new_connection_stands(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    await old.say({"t": "goaway", "reason": "restart", "reconnect_after_ms": 1500, "deadline_ms": 20000})
    new = await server.accept()
    assert watched.delays == [1.5]
    hello = await new.next("hello")
    author.delta(0, "two ")
    await old.say(author.ev(author.head))
    sending = asyncio.create_task(watched.client.send(CHANNEL, "on the old one still"))
    await old.next("chat.send")
    assert watched.client.state(CHANNEL) == author.state, "until then the old one serves"
    await new.say({"t": "welcome", "v": 1, "limits": {}})
    await new.say(*author.answer(hello["subs"][0]["since"]))
    assert await old.ended() == 1000
    again = await new.next("chat.send")
    await new.say({"t": "ok", "id": again["id"], "message": "q", "reply": "r"})
    assert await sending == {"message": "q", "reply": "r"}
    author.delta(0, "three")
    await new.say(author.ev(author.head), {"t": "hb", "ts": 1, "heads": {}})
    await new.next("hb")
    assert watched.client.state(CHANNEL) == author.state
    assert [d["x"] for _, e, d in watched.events if e == "reply.delta"] == ["two ", "three"], "each once"
    assert "disconnected" not in [change.state for change in watched.changes]


async def test_a_server_that_goes_before_the_new_connection_stands(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    old = await server.accept()
    await old.welcome()
    server.refuse.append((503, {}))
    await old.say({"t": "goaway", "reason": "restart", "reconnect_after_ms": 0, "deadline_ms": 0})
    new = await server.accept()
    await old.close(1012)
    await watched.until("disconnected")
    await new.welcome()
    await watched.until("connected")
    assert watched.delays == [0, 1], "the given value, then the usual one"


async def test_the_given_value_holds_for_the_close_too(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    await peer.say({"t": "batch", "f": [{"t": "goaway", "reason": "r", "reconnect_after_ms": 250, "deadline_ms": 0}]})
    await peer.close(1012)
    await server.accept()
    assert watched.delays == [0.25]


async def test_a_credential_is_renewed_in_place(server: ScriptedServer, watch: Watch) -> None:
    watch()
    peer = await server.accept()
    await peer.welcome()
    await peer.say({"t": "auth.expiring", "at": 0})
    renewal = await peer.next("auth")
    assert renewal["auth"] == {"ticket": "tk_2"}
    await peer.say({"t": "ok", "id": renewal["id"], "expires_at": 9}, {"t": "auth.expiring", "at": 0})
    refused = await peer.next("auth")
    await peer.say({"t": "err", "id": refused["id"], "code": "forbidden", "msg": "no", "retry": "never"})
    await peer.close(4004)
    assert (await (await server.accept()).welcome())["auth"] == {"ticket": "tk_4"}


async def test_many_subscriptions_do_not_fit_into_hello(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    channels = [f"conversation:0193c0de-9f3a-7bd2-8000-{n:012}" for n in range(200)]
    asking = [asyncio.create_task(watched.client.subscribe(ch)) for ch in channels]
    peer = await server.accept()
    hello = await peer.welcome()
    assert len(json.dumps(hello, separators=(",", ":"))) <= 8192
    greeted = [sub["ch"] for sub in hello["subs"]]
    assert len(greeted) > 50
    followed = [(await peer.next("sub"))["ch"] for _ in range(30)]
    assert greeted + followed == channels[: len(greeted) + 30], "the rest follows, no faster than is allowed"
    for task in asking:
        task.cancel()


async def test_closing_ends_everything(server: ScriptedServer, author: Author) -> None:
    watched = Watched(server.url)
    async with watched.client:
        peer = await following(watched, server, author)
        stream = watched.client.events()
        waiting = asyncio.create_task(watched.client.wait_terminal("m0001r"))
        await asyncio.sleep(0)
    assert await peer.ended() == 1000
    with pytest.raises(ConnectionStopped):
        await waiting
    assert [event async for event in stream] == []
    assert [event async for event in watched.client.events()] == []
    assert watched.changes[-1].state == "stopped"
    await watched.client.aclose()


async def test_closing_before_there_is_a_connection(nothing_left: None) -> None:
    entered = asyncio.Event()

    async def credentials() -> dict[str, str]:
        entered.set()
        await asyncio.Event().wait()
        return {}

    client = RealtimeClient("ws://127.0.0.1:1/", credentials)
    client.start()
    await entered.wait()
    await client.aclose()
    with pytest.raises(ConnectionStopped):
        await client.subscribe(CHANNEL)


async def test_drop_cuts_the_connection(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    watched.client.drop()
    peer = await server.accept()
    await peer.welcome()
    await watched.client.connected()
    watched.client.drop()
    assert await peer.ended() == 1006
    await (await server.accept()).welcome()
    await watched.until("connected")
