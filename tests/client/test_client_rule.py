"""The client rule on a real connection, and what is asked over it."""

import asyncio
from typing import Any

import pytest

from parley.client import SNAPSHOT, ApiError, ReplyGone, Timing
from tests.client.author import CHANNEL, Author
from tests.client.conftest import Watch
from tests.client.scripted import DEADLINE_S, Peer, ScriptedServer, following

FAST = Timing(ack_s=0.02, stall_s=0.05)


async def settled(peer: Peer) -> None:
    """Wait until the client has taken everything that was said."""
    await peer.say({"t": "hb", "ts": 77, "heads": {}})
    await peer.next("hb")


async def test_a_gap_is_asked_for_once(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    since = author.head
    for text in ("two ", "three ", "four"):
        author.delta(0, text)
    await peer.say(author.ev(since + 2), author.ev(since + 3))
    sub = await peer.next("sub")
    assert (sub["ch"], sub["since"]) == (CHANNEL, {"ep": "e1", "seq": since})
    first, *rest = author.answer(sub["since"])
    await peer.say({**first, "id": sub["id"]}, *rest)
    await settled(peer)
    assert [frame["t"] for frame in peer.heard].count("sub") == 1
    assert watched.client.state(CHANNEL) == author.state


async def test_what_the_heartbeat_knows_and_does_not_come_is_asked_for(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch(timing=FAST)
    peer = await following(watched, server, author)
    since = author.head
    author.delta(0, "lost")
    await peer.say({"t": "hb", "ts": 5, "heads": {CHANNEL: author.head, "conversation:other": 9}})
    answer = await peer.next("hb")
    assert answer == {"t": "hb", "ts": 5, "a": {CHANNEL: since}}
    sub = await peer.next("sub")
    assert sub["since"] == {"ep": "e1", "seq": since}
    await peer.say(*author.answer(sub["since"]))
    await settled(peer)
    assert watched.client.state(CHANNEL) == author.state


async def test_what_comes_after_the_heartbeat_is_not_asked_for(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch(timing=Timing(ack_s=0.02, stall_s=0.3))
    peer = await following(watched, server, author)
    await peer.say({"t": "hb", "ts": 5, "heads": {CHANNEL: author.head + 100}})
    # More than twice the wait, and something comes all the while: an ack each, and no sub among them.
    for _ in range(35):
        author.delta(0, "x")
        await peer.say(author.ev(author.head))
        await peer.next("ack")
    assert "sub" not in [frame["t"] for frame in peer.heard]


async def test_a_text_that_is_not_what_its_end_says(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    author.end(0, "completed")
    false = author.ev(author.head)
    false["d"]["sha256"] = "0" * 64
    await peer.say(false)
    sub = await peer.next("sub")
    assert "since" not in sub
    assert watched.client.integrity_failures == 1
    await peer.say(*author.answer(None))
    await settled(peer)
    assert watched.client.state(CHANNEL) == author.state
    await asyncio.gather(watched.client.unsubscribe(CHANNEL), answer(peer, "unsub"))
    assert watched.client.integrity_failures == 1, "it is counted for good"


async def answer(peer: Peer, kind: str, **fields: Any) -> dict[str, Any]:
    """Answer the next request of a kind."""
    request = await peer.next(kind)
    await peer.say({"t": "ok", "id": request["id"], **fields})
    return request


async def test_positions_are_told_while_events_come(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch(timing=FAST)
    peer = await following(watched, server, author)
    assert await peer.next("ack") == {"t": "ack", "a": {CHANNEL: author.head}}
    for _ in range(3):
        author.delta(0, "x")
        await peer.say(author.ev(author.head))
        assert await peer.next("ack") == {"t": "ack", "a": {CHANNEL: author.head}}


async def test_much_text_is_acknowledged_at_once(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch(timing=Timing(ack_s=3600))
    peer = await following(watched, server, author)
    for _ in range(5):
        author.delta(0, "x" * 30_000)
        await peer.say(author.ev(author.head))
    told = await peer.next("ack")
    assert author.head - 5 < told["a"][CHANNEL] <= author.head


async def test_a_batch_and_what_is_not_known(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    since = author.head
    author.delta(0, "two ")
    author.log("reply.sang", {"reply": "m0001r", "note": 1})
    author.log("weather.changed", {"now": "rain"})
    author.delta(0, "three")
    frames = [author.ev(seq) for seq in range(since + 1, author.head + 1)]
    await peer.say(
        {"t": "later", "x": 1},
        {"t": "batch", "f": [*frames, {"t": "batch", "f": []}]},
        {"t": "eph", "ch": CHANNEL, "e": "typing", "d": {"who": "bob"}},
        {"t": "ev", "ch": "conversation:other", "seq": 1, "e": "x", "d": {}},
        {"t": "err", "code": "internal", "msg": "something", "retry": "never"},
    )
    await settled(peer)
    assert watched.client.state(CHANNEL) == author.state
    assert watched.events[-1] == (CHANNEL, "typing", {"who": "bob"})


async def test_a_user_who_raises_does_not_break_the_connection(
    server: ScriptedServer, watch: Watch, author: Author, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(ch: str, state: dict[str, Any]) -> None:
        raise RuntimeError("the user's own")

    watched = watch(on_snapshot=fail)
    peer = await following(watched, server, author)
    author.delta(0, "two")
    await peer.say(author.ev(author.head))
    await settled(peer)
    assert watched.client.state(CHANNEL) == author.state
    assert "a callback of the client failed" in caplog.text


async def test_events_can_be_iterated(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    stream = watched.client.events()
    peer = await following(watched, server, author)
    author.delta(0, "two")
    author.end(0, "completed")
    await peer.say(author.ev(author.head - 1), author.ev(author.head))
    async with asyncio.timeout(DEADLINE_S):
        first, second, third = [await anext(stream) for _ in range(3)]
    assert first[:2] == (CHANNEL, SNAPSHOT)
    assert second == (CHANNEL, "reply.delta", {"reply": "m0001r", "part": 0, "off": 4, "x": "two"})
    assert third[1] == "reply.completed"
    stream.close()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_message_is_repeated_with_its_key_until_it_is_answered(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?", model="demo", on_active="reject"))
    first = await peer.next("chat.send")
    assert first["parts"] == [{"type": "text", "text": "why?"}]
    assert (first["opts"], first["on_active"]) == ({"model": "demo"}, "reject")
    peer.abort()
    peer = await server.accept()
    await peer.welcome()
    assert await peer.next("chat.send") == first
    await peer.close(4003)
    peer = await server.accept()
    await peer.welcome()
    again = await answer(peer, "chat.send", message="q", reply="r")
    assert again["cid"] == first["cid"]
    async with asyncio.timeout(DEADLINE_S):
        assert await sending == {"message": "q", "reply": "r"}


async def test_what_is_sent_before_there_is_a_connection_waits_for_it(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?", cid="0193c0de-9f3a-7bd2-8000-000000000001"))
    cancelling = asyncio.create_task(watched.client.cancel("r"))
    peer = await server.accept()
    await peer.welcome()
    request = await answer(peer, "chat.send", message="q", reply="r")
    assert request["cid"] == "0193c0de-9f3a-7bd2-8000-000000000001"
    assert (await answer(peer, "reply.cancel", reply="r"))["reply"] == "r"
    await asyncio.gather(sending, cancelling)


async def test_a_refusal(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?", on_active="reject"))
    request = await peer.next("chat.send")
    await peer.say({"t": "err", "id": request["id"], "code": "active_reply", "msg": "Wait.", "retry": "never"})
    with pytest.raises(ApiError) as caught:
        await sending
    assert (caught.value.status, caught.value.code, caught.value.message) == (409, "active_reply", "Wait.")


async def test_a_refusal_for_now_is_tried_again(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?"))
    for retry in ({"retry": "now"}, {"retry": "backoff", "retry_after_ms": 1}):
        request = await peer.next("chat.send")
        await peer.say({"t": "err", "id": request["id"], "code": "busy", "msg": "in flight", **retry})
    await answer(peer, "chat.send", message="q", reply="r")
    await sending


async def test_a_refusal_for_now_does_not_last_for_ever(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?"))
    for _ in range(7):
        request = await peer.next("chat.send")
        await peer.say({"t": "err", "id": request["id"], "code": "busy", "msg": "in flight", "retry": "now"})
    with pytest.raises(ApiError, match="in flight"):
        await sending


async def test_a_credential_that_dies_under_a_message(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    peer = await server.accept()
    await peer.welcome()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?"))
    request = await peer.next("chat.send")
    await peer.say({"t": "err", "id": request["id"], "code": "unauthenticated", "msg": "expired", "retry": "never"})
    await peer.close(4401, "expired")
    peer = await server.accept()
    await peer.welcome()
    await answer(peer, "chat.send", message="q", reply="r")
    assert (await sending)["reply"] == "r"


async def test_a_message_that_is_too_large_is_not_sent(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    await (await server.accept()).welcome()
    await watched.client.connected()
    with pytest.raises(ApiError) as caught:
        await watched.client.send(CHANNEL, "€" * 30_000)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("in_hello", [True, False])
async def test_a_channel_that_may_not_be_seen(server: ScriptedServer, watch: Watch, in_hello: bool) -> None:
    watched = watch()
    refusal = {"t": "err", "code": "not_found", "msg": "No such channel.", "retry": "never", "ch": CHANNEL}
    if in_hello:
        asking = asyncio.create_task(watched.client.subscribe(CHANNEL))
        peer = await server.accept()
        await peer.welcome()
        await peer.say(refusal)
    else:
        peer = await server.accept()
        await peer.welcome()
        await watched.client.connected()
        asking = asyncio.create_task(watched.client.subscribe(CHANNEL))
        await peer.say({**refusal, "id": (await peer.next("sub"))["id"]})
    with pytest.raises(ApiError, match="No such channel"):
        await asking
    with pytest.raises(KeyError):
        watched.client.state(CHANNEL)


async def test_a_subscription_that_is_refused_for_now(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    asking = asyncio.create_task(watched.client.subscribe(CHANNEL))
    peer = await server.accept()
    await peer.welcome()
    refusal = {"t": "err", "code": "rate_limited", "msg": "m", "retry": "backoff", "retry_after_ms": 1}
    await peer.say({**refusal, "ch": CHANNEL})
    sub = await peer.next("sub")
    first, *rest = author.answer(None)
    await peer.say({**first, "id": sub["id"]}, *rest)
    assert await asking == author.state


async def test_access_that_is_withdrawn(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    await peer.say({"t": "unsubbed", "ch": CHANNEL, "code": "not_found", "retry": "never"})
    await settled(peer)
    assert watched.events[-1] == (CHANNEL, "unsubbed", {"code": "not_found"})
    peer.abort()
    assert (await (await server.accept()).welcome())["subs"] == []


async def test_a_channel_that_the_server_lets_go_of(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    since = author.head
    watched.client._subscriptions._random = lambda: 0.0
    await peer.say({"t": "unsubbed", "ch": CHANNEL, "code": "unavailable", "retry": "backoff"})
    assert (await peer.next("sub"))["since"] == {"ep": "e1", "seq": since}


async def test_unsubscribing(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    leaving = asyncio.create_task(watched.client.unsubscribe(CHANNEL))
    assert (await peer.next("unsub"))["ch"] == CHANNEL
    peer.abort()
    await leaving
    assert (await (await server.accept()).welcome())["subs"] == []
    await watched.client.unsubscribe(CHANNEL)


async def test_an_end_that_comes_with_a_snapshot(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    waiting = asyncio.create_task(watched.client.wait_terminal("m0001r"))
    author.end(0, "failed")
    peer.abort()
    peer = await server.accept()
    await peer.welcome()
    await peer.say(*author.answer(None))
    async with asyncio.timeout(DEADLINE_S):
        assert (await waiting)["status"] == "failed"
    assert (await watched.client.wait_terminal("m0001r"))["status"] == "failed", "and when it is known already"


async def test_a_reply_that_is_deleted(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    peer = await following(watched, server, author)
    waiting = asyncio.create_task(watched.client.wait_terminal("m0001r"))
    author.state["messages"].pop()
    author.log("message.deleted", {"id": "m0001r"})
    await settled(peer)
    await peer.say(author.ev(author.head))
    with pytest.raises(ReplyGone):
        await waiting
