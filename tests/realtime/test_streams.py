"""The log over HTTP, as server-sent events."""

import asyncio
import hashlib
from uuid import UUID, uuid4

import asyncpg
import httpx

from parley.core import clock
from tests.conftest import Account, TestDatabases
from tests.realtime.conftest import (
    Frame,
    LiveServer,
    Log,
    assert_terminal,
    conversation_of,
    visible_text,
)
from tests.realtime.steps import (
    Events,
    flattened,
    slow_words,
    stream_turn,
    touch,
    within,
)


async def test_the_turn_over_http_is_the_turn_of_the_socket(live_server: LiveServer, ada: Account) -> None:
    channel, key = await conversation_of(ada), str(uuid4())
    async with live_server.join(ada) as peer:
        ep = (await peer.sub(channel))["ep"]
        streamed = await stream_turn(ada, channel, "some words to repeat 😀", key)
        reply = streamed[1][2]["d"]["id"]
        await peer.event("reply.completed", reply=reply)
        seen = [frame for frame in peer.seen if frame["t"] == "ev"]
    assert flattened([frame for _, _, frame in streamed]) == flattened(seen)
    log = Log(last=seen[0]["seq"] - 1)
    for name, id_, frame in streamed:
        assert (name, id_) == (frame["e"], f"{ep}:{frame['seq']}")
        log.take(frame)
    assert log.ended == {reply}
    # The same key gives the same turn, from its question to its end, and starts nothing.
    again = await stream_turn(ada, channel, "some words to repeat 😀", key)
    assert flattened([frame for _, _, frame in again]) == flattened(seen)
    rows = (await ada.http.get(f"/api/v1/conversations/{channel.partition(':')[2]}/messages")).json()["data"]
    assert len(rows) == 2
    path = f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
    other = await ada.http.post(
        path, json={"text": "other"}, headers={"Idempotency-Key": key, "Accept": "text/event-stream"}
    )
    assert (other.status_code, other.json()["error"]) == (422, "idempotency_key_reused")
    for bad in ("x", "1", "0" * 64):
        answer = await ada.http.post(path, json={"text": "x"}, headers={"Idempotency-Key": bad})
        assert answer.status_code == 422
        assert answer.json()["error"] == "validation_error"


async def test_a_trimmed_turn_is_answered_with_a_snapshot(
    live_server: LiveServer, ada: Account, databases: TestDatabases
) -> None:
    channel, key = await conversation_of(ada), str(uuid4())
    first = await stream_turn(ada, channel, "hello", key)
    connection = await asyncpg.connect(databases.postgres.admin_url(live_server.urls.name))
    try:
        await connection.execute("DELETE FROM channel_events WHERE channel = $1 AND seq <= 3", channel)
        await connection.execute("UPDATE channel_heads SET floor = 3 WHERE channel = $1", channel)
    finally:
        await connection.close()
    again = await stream_turn(ada, channel, "hello", key)
    assert [name for name, _, _ in again] == ["snap"]
    assert again[0][2]["state"]["messages"][1] == first[-1][2]["d"]["message"]


async def test_two_turns_of_one_conversation_do_not_mix(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    turns = await asyncio.gather(
        *(stream_turn(ada, channel, f"turn {number} " + slow_words(5), None) for number in range(4))
    )
    for turn in turns:
        frames = [frame for _, _, frame in turn]
        question, reply = frames[0]["d"]["id"], frames[1]["d"]["id"]
        assert all(frame["d"].get("reply", reply) == reply for frame in frames)
        assert {frame["d"]["id"] for frame in frames if frame["e"] == "message.created"} == {question, reply}
        assert frames[-1]["e"] == "reply.completed"
        assert_terminal(frames[-1]["d"])


async def test_the_log_as_server_sent_events(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    turn = await stream_turn(ada, channel, "hello there", None)
    frames = [frame for _, _, frame in turn]
    ep = str(turn[0][1]).partition(":")[0]
    head = frames[-1]["seq"]
    path = f"/api/v1/channels/{channel}/events"

    async with ada.http.stream("GET", path) as response:
        events = Events(response)
        name, id_, snap = await within(events.next())
        assert (name, id_, snap["t"], snap["seq"]) == ("snap", f"{ep}:{head}", "snap", head)
    wanted = flattened(frames)
    for params, headers in (
        ({"since": f"{ep}:0"}, {}), ({"since": "other:5"}, {"Last-Event-ID": f"{ep}:0"}), ({}, {"Last-Event-ID": f"{ep}:0"}),
    ):  # fmt: skip
        async with ada.http.stream("GET", path, params=params, headers=headers) as response:
            events = Events(response)
            found: list[Frame] = []
            while not found or found[-1]["seq"] < head:
                _, id_, frame = await within(events.next())
                assert id_ == f"{ep}:{frame['seq']}"
                found.append(frame)
            assert flattened(found)[: len(wanted)] == wanted
            # Then live.
            answer = await ada.http.post(f"/api/v1/conversations/{channel[13:]}/messages", json={"text": "more"})
            assert answer.status_code == 202
            name, _, frame = await within(events.next())
            question = answer.json()["data"]["message"]["id"]
            assert (name, frame["seq"], frame["d"]["id"]) == ("message.created", head + 1, question)
            while name != "reply.completed":
                name, _, frame = await within(events.next())
            head = frame["seq"]
    for since in ("other:1", f"{ep}:999999", f"{ep}:9223372036854775808"):
        async with ada.http.stream("GET", path, params={"since": since}) as response:
            name, id_, snap = await within(Events(response).next())
            assert (name, id_) == ("snap", f"{ep}:{head}")


async def test_a_stream_ends_when_its_channel_is_deleted(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with ada.http.stream("GET", f"/api/v1/channels/{channel}/events") as response:
        events = Events(response)
        await within(events.next())
        assert (await ada.http.delete(f"/api/v1/conversations/{channel[13:]}")).status_code == 204
        rest = await within(events.rest())
        assert [(name, frame["t"], frame["ch"]) for name, _, frame in rest] == [("unsubbed", "unsubbed", channel)]


async def test_a_stream_ends_with_the_credential_that_opened_it(live_server: LiveServer, ada: Account) -> None:
    """Not with an access token's whole life from now: a token with a minute left opens a minute of stream."""
    with clock.shifted(14 * 60):
        async with ada.http.stream("GET", "/api/v1/channels/user:me/events") as response:
            events = Events(response)
            await within(events.next())
            with clock.shifted(2 * 60):
                # Something has to move for the stream to look at the clock before its next comment.
                await touch(live_server, ada)
                rest = await within(events.rest())
                assert rest[-1][0] == "unsubbed"
                assert rest[-1][2]["code"] == "expired"


async def test_no_stream_without_a_credential(live_server: LiveServer, ada: Account, bob: Account) -> None:
    channel = await conversation_of(ada)
    async with httpx.AsyncClient(base_url=live_server.base) as client:
        for name in (channel, "user:me", "x"):
            answer = await client.get(f"/api/v1/channels/{name}/events")
            assert answer.status_code == 401
            answer = await client.get(f"/api/v1/channels/{name}/events", params={"access_token": ada.access_token})
            assert answer.status_code == 401
    assert (await bob.http.get(f"/api/v1/channels/{channel}/events")).status_code == 404


async def test_len_and_sha256_count_code_points(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    turn = await stream_turn(ada, channel, "e\u0301o\u0308 👩‍👩‍👧 🇫🇷 日本 क्ष \u200f שלום", None)
    terminal = turn[-1][2]["d"]
    text = visible_text(terminal["message"])
    assert "👩‍👩‍👧" in text
    assert terminal["len"] == len(text) < len(text.encode("utf-16-le")) // 2
    assert terminal["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert str(UUID(terminal["reply"])) == terminal["reply"]
