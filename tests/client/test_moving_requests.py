"""What is under way while a client moves: requests without an answer, channels that are left and entered."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from parley.client import ApiError, ConnectionStopped, RealtimeClient
from tests.client.author import CHANNEL, Author
from tests.client.conftest import Watch
from tests.client.scripted import DEADLINE_S, ScriptedServer, following
from tests.client.test_client_rule import settled
from tests.client.test_moving import deltas, goaway, write

CID = "0193c0de-9f3a-7bd2-8000-000000000001"
ABOUT = {"message": "q", "reply": "r"}
Ask = Callable[[RealtimeClient], Awaitable[dict[str, Any] | None]]

# -- requests ------------------------------------------------------------------------------------------------------

REQUESTS: dict[str, Ask] = {
    "chat.send": lambda client: client.send(CHANNEL, "why?", cid=CID),
    "reply.continue": lambda client: client.continue_reply("r", cid=CID),
    "reply.regenerate": lambda client: client.regenerate_reply("r", cid=CID),
    "reply.cancel": lambda client: client.cancel("r"),
}


@pytest.mark.parametrize("t", REQUESTS)
async def test_a_request_without_an_answer_goes_out_again_over_the_new_one(
    server: ScriptedServer, watch: Watch, t: str
) -> None:
    watched = watch()
    old = await server.accept()
    await old.welcome()
    asking = asyncio.ensure_future(REQUESTS[t](watched.client))
    first = await old.next(t)
    await old.say(goaway())
    new = await server.accept()
    await new.welcome()
    assert await old.ended() == 1000
    again = await new.next(t)
    assert again == first, "the same key"
    assert again.get("cid", CID) == CID
    await new.say({"t": "ok", "id": again["id"], **ABOUT})
    async with asyncio.timeout(DEADLINE_S):
        assert await asking == (None if t == "reply.cancel" else ABOUT)


@pytest.mark.parametrize("t", REQUESTS)
async def test_a_request_that_the_old_one_answers_is_not_repeated(server: ScriptedServer, watch: Watch, t: str) -> None:
    watched = watch()
    old = await server.accept()
    await old.welcome()
    before = asyncio.ensure_future(REQUESTS[t](watched.client))
    first = await old.next(t)
    await old.say(goaway())
    new = await server.accept()
    await new.next("hello")
    during = asyncio.create_task(watched.client.send(CHANNEL, "and this?"))
    second = await old.next("chat.send")
    await old.say(*({"t": "ok", "id": frame["id"], **ABOUT} for frame in (first, second)))
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(before, during)
    await new.say({"t": "welcome", "v": 1, "limits": {}})
    assert await old.ended() == 1000
    await settled(new)
    assert [frame["t"] for frame in new.heard] == ["hello", "hb"]


async def test_a_request_that_is_to_wait_goes_out_over_the_new_one_at_its_time(
    server: ScriptedServer, watch: Watch
) -> None:
    watched = watch()
    old = await server.accept()
    await old.welcome()
    sending = asyncio.create_task(watched.client.send(CHANNEL, "why?"))
    first = await old.next("chat.send")
    refusal = {"t": "err", "id": first["id"], "code": "unavailable", "msg": "m", "retry": "backoff"}
    await old.say({**refusal, "retry_after_ms": 300}, goaway(0))
    new = await server.accept()
    await new.welcome()
    await settled(new)
    assert [frame["t"] for frame in new.heard] == ["hello", "hb"], "not before"
    again = await new.next("chat.send")
    assert again == first
    await new.say({"t": "ok", "id": again["id"], **ABOUT})
    async with asyncio.timeout(DEADLINE_S):
        assert await sending == ABOUT


async def test_a_credential_that_was_to_renew_the_old_one_is_not_used_again(
    server: ScriptedServer, watch: Watch
) -> None:
    watch()
    old = await server.accept()
    await old.welcome()
    await old.say({"t": "auth.expiring", "at": 0})
    await old.next("auth")
    await old.say(goaway())
    new = await server.accept()
    await new.welcome()
    await settled(new)
    assert [frame["t"] for frame in new.heard] == ["hello", "hb"]


# -- channels ------------------------------------------------------------------------------------------------------


async def test_a_channel_that_is_left_meanwhile(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    await old.say(goaway())
    new = await server.accept()
    assert [sub["ch"] for sub in (await new.next("hello"))["subs"]] == [CHANNEL]
    leaving = asyncio.create_task(watched.client.unsubscribe(CHANNEL))
    await old.next("unsub")
    await new.say({"t": "welcome", "v": 1, "limits": {}})
    unsub = await new.next("unsub")
    assert unsub["ch"] == CHANNEL, "the new one was told of it in its hello"
    await new.say(*author.answer(None), {"t": "ok", "id": unsub["id"]})
    await settled(new)
    async with asyncio.timeout(DEADLINE_S):
        await leaving
    assert watched.events == []


async def test_a_channel_that_is_left_and_entered_again_meanwhile(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    await old.say(goaway())
    new = await server.accept()
    hello = await new.next("hello")
    leaving = asyncio.create_task(watched.client.unsubscribe(CHANNEL))
    await old.next("unsub")
    entering = asyncio.create_task(watched.client.subscribe(CHANNEL))
    await old.next("sub")
    await new.say({"t": "welcome", "v": 1, "limits": {}}, *author.answer(hello["subs"][0]["since"]))
    sub = await new.next("sub")
    assert "since" not in sub, "a replay alone does not bring the state"
    await new.say(*author.answer(None))
    async with asyncio.timeout(DEADLINE_S):
        assert await entering == author.state
        await leaving


async def test_a_state_that_was_dropped_meanwhile(server: ScriptedServer, watch: Watch, author: Author) -> None:
    watched = watch()
    old = await following(watched, server, author)
    await old.say(goaway())
    new = await server.accept()
    hello = await new.next("hello")
    author.end(0, "completed")
    false = author.ev(author.head)
    false["d"]["sha256"] = "0" * 64
    await old.say(false)
    assert "since" not in await old.next("sub")
    await new.say({"t": "welcome", "v": 1, "limits": {}}, *author.answer(hello["subs"][0]["since"]))
    assert "since" not in await new.next("sub")
    await new.say(*author.answer(None))
    await settled(new)
    assert watched.client.state(CHANNEL) == author.state
    assert watched.client.integrity_failures == 1


async def test_a_snapshot_from_before_what_the_old_one_told(
    server: ScriptedServer, watch: Watch, author: Author
) -> None:
    watched = watch()
    old = await following(watched, server, author)
    await old.say(goaway())
    new = await server.accept()
    await new.next("hello")
    taken = author.head
    await write(author, old, text="a")
    await write(author, old, text="b")
    await settled(old)
    await new.say({"t": "welcome", "v": 1, "limits": {}}, author.subbed(recovered=False, why="too_far"))
    await new.say(*author.snap(taken))
    await write(author, text="c")
    await new.say(*(author.ev(seq) for seq in range(taken + 1, author.head + 1)), author.live())
    await settled(new)
    assert watched.client.state(CHANNEL) == author.state
    assert deltas(watched) == ["a", "b", "c"], "none of it is told twice"


async def test_another_log_behind_the_new_one(server: ScriptedServer, watch: Watch, author: Author) -> None:
    """The new server knows a log that is another one, and shorter: its state counts, whatever the old one told."""
    watched = watch()
    old = await following(watched, server, author)
    await old.say(goaway())
    new = await server.accept()
    await new.next("hello")
    await write(author, old)
    other = Author(ep="e2")
    other.ask()
    for text in "abcd" * 10:
        other.delta(0, text)
        author.delta(0, "too late")
    late = [{**author.ev(n), "seq": other.head + n} for n in range(1, author.head + 1)]
    await new.say({"t": "welcome", "v": 1, "limits": {}}, *other.answer({"ep": "e1", "seq": author.head}))
    with suppress(ConnectionClosed):
        await old.say(*late)
    await settled(new)
    assert watched.client.state(CHANNEL) == other.state
    assert watched.client.channel(CHANNEL).since == {"ep": "e2", "seq": other.head}


async def test_who_waits_is_told_when_it_cannot_go_on(server: ScriptedServer, watch: Watch) -> None:
    watched = watch()
    old = await server.accept()
    await old.welcome()
    asking = asyncio.create_task(watched.client.continue_reply("r"))
    frame = await old.next("reply.continue")
    await old.say({"t": "err", "id": frame["id"], "code": "conflict", "msg": "It is being written.", "retry": "never"})
    with pytest.raises(ApiError, match="It is being written"):
        await asking
    await old.close(4403)
    await watched.until("stopped")
    with pytest.raises(ConnectionStopped):
        await watched.client.regenerate_reply("r")
