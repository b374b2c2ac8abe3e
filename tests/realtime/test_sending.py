"""Sending over the socket: turns, idempotency, the line of replies, cancelling."""

import asyncio
from uuid import uuid4

import pytest

from tests.conftest import Account
from tests.realtime.conftest import (
    LiveServer,
    conversation_of,
    visible_text,
)
from tests.realtime.steps import (
    once,
    peer_event,
    poll_until_ended,
    slow_words,
)


async def test_a_turn_has_its_events_in_order(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    cid = str(uuid4())
    text = 'e\u0301 👩‍👩‍👧 🇫🇷 שלום \u2028 <b> "\\'
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        sent = await peer.say(channel, text, cid=cid)
        assert set(sent) == {"t", "id", "message", "reply"}
        await peer.event("reply.completed", reply=sent["reply"])
        events = [frame for frame in peer.seen if frame["t"] == "ev"]
        names = [frame["e"] for frame in events]
        assert names[:4] == ["message.created", "message.created", "reply.started", "reply.part"]
        assert names[-2:] == ["reply.part", "reply.completed"]
        assert set(names[4:-2]) == {"reply.delta"}
        question, reply = events[0]["d"], events[1]["d"]
        assert (question["id"], question["cid"], question["role"]) == (sent["message"], cid, "user")
        assert question["parts"] == [{"type": "text", "text": text}]
        assert (reply["id"], reply["cid"], reply["role"], reply["status"]) == (
            sent["reply"],
            None,
            "assistant",
            "queued",
        )
        assert (reply["parts"], reply["parent_id"]) == ([], question["id"])
        assert events[2]["d"] == {"reply": reply["id"], "to": question["id"], "model": "demo", "attempt": 1}
        terminal = events[-1]["d"]
        assert visible_text(terminal["message"]) == peer.logs[channel].text(reply["id"])
        assert (terminal["message"]["status"], terminal["message"]["error"]) == ("completed", None)
        rows = (await ada.http.get(f"/api/v1/conversations/{question['conversation_id']}/messages")).json()["data"]
        assert rows[1] == terminal["message"]


async def test_the_same_cid_is_the_same_turn_for_ever(live_server: LiveServer, ada: Account, bob: Account) -> None:
    channel, other = await conversation_of(ada), await conversation_of(ada)
    of_bob = await conversation_of(bob)
    cid = str(uuid4())
    async with live_server.join(ada) as peer, live_server.join(bob) as stranger:
        answers = await asyncio.gather(*(once(live_server, ada, channel, "hello", cid) for _ in range(8)))
        assert len({(frame["t"], frame["message"], frame["reply"]) for frame in answers}) == 1
        sent = answers[0]
        await poll_until_ended(ada, sent["reply"], channel)
        again = await peer.say(channel, "hello", cid=cid)
        assert (again["message"], again["reply"]) == (sent["message"], sent["reply"])
        for changed in (
            peer.say(channel, "hello!", cid=cid), peer.say(other, "hello", cid=cid),
            peer.say(channel, "hello", cid=cid, opts={"model": "demo"}), peer.say(channel, "hello", cid=cid, opts={"tools": []}),
            peer.say(channel, "hello", cid=cid, parent=sent["reply"]),
        ):  # fmt: skip
            refused = await changed
            assert (refused["t"], refused["code"]) == ("err", "conflict")
        # Another user's use of the same key is their own.
        assert (await stranger.say(of_bob, "hello", cid=cid))["message"] != sent["message"]
        rows = (await ada.http.get(f"/api/v1/conversations/{channel.partition(':')[2]}/messages")).json()["data"]
        assert len(rows) == 2


@pytest.mark.parametrize(
    "parts",
    [
        [], [{"type": "text", "text": ""}], [{"type": "text", "text": "a\x00b"}], [{"type": "text", "text": "\ud83d"}],
        [{"type": "text", "text": "x" * 32_001}], [{"type": "text", "text": "x" * 16_001}] * 2, [{"type": "text"}],
        [{"type": "image", "text": "x"}], [{"type": "", "text": "x"}], [{"type": "text", "text": "x"}, {"type": "tool"}],
    ],
)  # fmt: skip
async def test_content_that_cannot_be_taken_is_invalid_and_not_counted(
    live_server: LiveServer, ada: Account, parts: list[dict[str, str]]
) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        for _ in range(5):
            answer = await peer.say(channel, "", parts=parts)
            assert (answer["t"], answer["code"], answer["retry"]) == ("err", "invalid", "never"), answer
            assert "xxx" not in answer["msg"]
        sent = await peer.say(channel, "x" * 32_000)
        assert sent["t"] == "ok"


async def test_what_a_send_names_must_exist(live_server: LiveServer, ada: Account, bob: Account) -> None:
    channel, other, foreign = await conversation_of(ada), await conversation_of(ada), await conversation_of(bob)
    async with live_server.join(ada) as peer:
        for name in (foreign, f"conversation:{uuid4()}", "conversation:x", "user:me", "tasks", f"tasks:{channel[13:]}"):
            answer = await peer.say(name, "hello")
            assert (answer["t"], answer["code"]) == ("err", "not_found"), name
        for options in ({"model": "no such model"}, {"tools": ["no such tool"]}, {"model": "\x00"}):
            answer = await peer.say(channel, "hello", opts=options)
            assert (answer["t"], answer["code"]) == ("err", "invalid"), options
        elsewhere = await peer.say(other, "hello")
        for parent in (str(uuid4()), elsewhere["message"]):
            assert (await peer.say(channel, "hello", parent=parent))["code"] == "not_found"
        assert (await peer.say(channel, "hello", opts={"model": "default", "tools": []}))["t"] == "ok"
        assert (await peer.say(channel, "hello", opts={"model": "gpt"}))["code"] == "unavailable"


async def test_an_odd_spelling_of_a_channel_does_not_send(live_server: LiveServer, ada: Account) -> None:
    """A name that cannot be subscribed to is no name to send to either."""
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        for name in (channel.upper().replace("CONVERSATION", "conversation"), channel.replace("-", ""),
                     "conversation:{" + channel[13:] + "}", "conversation:urn:uuid:" + channel[13:]):  # fmt: skip
            answer = await peer.say(name, "hello")
            assert (answer["t"], answer.get("code")) == ("err", "not_found"), name


async def test_reject_queue_and_interrupt(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        first = await peer.say(channel, slow_words(2000))
        await peer.event("reply.delta", reply=first["reply"])
        rejected = await peer.say(channel, "no", on_active="reject")
        assert (rejected["t"], rejected["code"], rejected["retry"]) == ("err", "active_reply", "never")
        second = await peer.say(channel, "second", on_active="queue")
        third = await peer.say(channel, "third")
        assert (await peer_event(peer, "reply.queued", second["reply"]))["d"]["pos"] == 1
        assert (await peer_event(peer, "reply.queued", third["reply"]))["d"] == {
            "reply": third["reply"], "to": third["message"], "pos": 2,
        }  # fmt: skip
        fourth = await peer.say(channel, "fourth", on_active="interrupt")
        await peer.event("reply.completed", reply=fourth["reply"])
        order = [
            (frame["e"], frame["d"]["reply"])
            for frame in peer.seen
            if frame["t"] == "ev" and frame["e"] in {"reply.started", "reply.cancelled", "reply.completed"}
        ]
        replies = [second["reply"], third["reply"], fourth["reply"]]
        assert order == [
            ("reply.started", first["reply"]), ("reply.cancelled", first["reply"]),
            *((name, reply) for reply in replies for name in ("reply.started", "reply.completed")),
        ]  # fmt: skip
        cancelled = next(f["d"] for f in peer.seen if f["t"] == "ev" and f["e"] == "reply.cancelled")
        assert (cancelled["by"], cancelled["partial"], cancelled["message"]["status"]) == (
            str(ada.user_id), True, "cancelled",
        )  # fmt: skip
        assert visible_text(cancelled["message"]) == peer.logs[channel].text(first["reply"]) != ""


async def test_cancel_is_durable_idempotent_and_for_ones_own(
    live_server: LiveServer, ada: Account, bob: Account
) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer, live_server.join(bob) as stranger, live_server.join(ada) as second:
        await peer.sub(channel)
        running = await peer.say(channel, slow_words(2000))
        waiting = await peer.say(channel, "later")
        await peer.event("reply.delta", reply=running["reply"])
        for foreign in (running["reply"], waiting["reply"], str(uuid4())):
            answer = await stranger.ask("reply.cancel", reply=foreign)
            assert (answer["t"], answer["code"]) == ("err", "not_found")
        assert (await peer.ask("reply.cancel", reply=running["message"]))["code"] == "not_found"
        # The one that waits is cancelled before it begins, from another device.
        assert (await second.ask("reply.cancel", reply=waiting["reply"]))["t"] == "ok"
        ended = await peer.event("reply.cancelled", reply=waiting["reply"])
        assert ended["d"]["message"]["parts"] == []
        for _ in range(3):
            assert (await peer.ask("reply.cancel", reply=running["reply"]))["t"] == "ok"
        await peer_event(peer, "reply.cancelled", running["reply"])
        for _ in range(2):
            assert (await peer.ask("reply.cancel", reply=running["reply"]))["t"] == "ok"
        terminals = [f["d"]["reply"] for f in peer.seen if f["t"] == "ev" and f["e"].startswith("reply.cancelled")]
        assert sorted(terminals) == sorted([running["reply"], waiting["reply"]])


async def test_leaving_is_not_cancelling(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        sent = await peer.say(channel, slow_words(40))
        await peer.event("reply.delta", reply=sent["reply"])
        peer.socket.transport.abort()
    ended = await poll_until_ended(ada, sent["reply"], channel)
    assert ended["status"] == "completed"
