"""Subscribing: snapshots, replays, what is not the caller's, and how a subscription ends."""

import json
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.conftest import Account, TestDatabases
from tests.realtime.conftest import LiveServer, Serve, conversation_of, visible_text
from tests.realtime.steps import fill, flattened, poll_live, poll_until_ended, slow_words, tail_of


async def test_hello_with_subs_is_one_round_trip(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.open() as peer:
        subs: list[dict[str, Any]] = [
            {"ch": channel},
            {"ch": "user:me", "since": {"seq": -1}},
            {"ch": "tasks"},
            {"ch": f"conversation:{uuid4()}"},
        ]
        await peer.send("hello", v=1, auth={"token": ada.access_token}, subs=subs)
        assert (await peer.read())["t"] == "welcome"
        await peer.until("err")
        await poll_live(peer, channel, "user:me", "tasks")
        kinds = [frame["t"] for frame in peer.seen]
        assert kinds.count("subbed") == 3
        assert "id" not in next(frame for frame in peer.seen if frame["t"] == "subbed")
        refused = next(frame for frame in peer.seen if frame["t"] == "err")
        assert (refused["code"], refused["ch"], "id" in refused) == ("not_found", subs[3]["ch"], False)


async def test_frames_may_follow_hello_at_once(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.open() as peer:
        await peer.send("hello", v=1, auth={"token": ada.access_token})
        await peer.send("sub", id="s", ch=channel)
        await peer.send("hb", ts=1)
        assert (await peer.read())["t"] == "welcome"
        assert (await peer.read())["id"] == "s"
        await peer.until("live", ch=channel)


async def test_a_new_subscription_is_subbed_snap_live(live_server: LiveServer, eve: Account) -> None:
    channel = await conversation_of(eve, title="x")
    task = (await eve.http.post("/api/v1/tasks", json={"title": "milk"})).json()["data"]
    async with live_server.join(eve) as peer:
        for name in (channel, "user:me", "tasks"):
            start = len(peer.seen)
            await peer.sub(name)
            frames = peer.seen[start:]
            assert [frame["t"] for frame in frames] == ["subbed", "snap", "live"], name
            subbed, snap, live = frames
            assert (subbed["ch"], subbed["mode"], subbed["why"], subbed["recovered"]) == (name, "log", "initial", False)
            assert subbed["head"] == snap["seq"] == live["seq"]
            assert (snap["part"], snap["more"], snap["ep"]) == (0, False, subbed["ep"])
        states = {frame["ch"]: frame["state"] for frame in peer.seen if frame["t"] == "snap"}
        assert states[channel]["conversation"]["title"] == "x"
        assert states[channel]["messages"] == []
        assert [c["id"] for c in states["user:me"]["conversations"]] == [channel.partition(":")[2]]
        assert states["user:me"]["jobs"] == []
        assert states["tasks"]["items"] == [task]


async def test_changes_reach_the_inbox_and_the_tasks(live_server: LiveServer, eve: Account) -> None:
    async with live_server.join(eve) as peer:
        await peer.sub("user:me")
        await peer.sub("tasks")
        channel = await conversation_of(eve)
        id_ = channel.partition(":")[2]
        await peer.event("conversation.created", id=id_)
        await eve.http.patch(f"/api/v1/conversations/{id_}", json={"title": "new", "archived": True})
        assert (await peer.event("conversation.updated", id=id_))["d"]["title"] == "new"
        task = (await eve.http.post("/api/v1/tasks", json={"title": "milk"})).json()["data"]
        assert (await peer.event("task.created"))["d"] == task
        await eve.http.patch(f"/api/v1/tasks/{task['id']}", json={"completed": True})
        assert (await peer.event("task.updated"))["d"]["completed"] is True
        await eve.http.delete(f"/api/v1/tasks/{task['id']}")
        assert (await peer.event("task.deleted"))["d"] == {"id": task["id"]}
        await eve.http.delete(f"/api/v1/conversations/{id_}")
        assert (await peer.event("conversation.deleted"))["d"] == {"id": id_}


async def test_a_deleted_conversation_ends_its_subscription(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        await ada.http.delete(f"/api/v1/conversations/{channel.partition(':')[2]}")
        gone = await peer.until("unsubbed")
        assert (gone["ch"], gone["code"]) == (channel, "not_found")
        assert (await peer.ask("unsub", ch=channel))["code"] == "not_found"
        assert (await peer.ask("sub", ch=channel))["code"] == "not_found"


async def test_what_is_not_the_callers_is_not_found(live_server: LiveServer, ada: Account, bob: Account) -> None:
    of_ada = await conversation_of(ada)
    names = [
        of_ada, f"conversation:{uuid4()}", "conversation:", "conversation", "conversation:x", of_ada.upper(), of_ada + " ",
        of_ada + ":x", of_ada.replace("-", ""), "conversation:{" + of_ada[13:] + "}", "conversation:urn:uuid:" + of_ada[13:],
        f"user:{ada.user_id}", f"user:{bob.user_id}", "user:", "user", "user:ME", "user:me ", "USER:me", f"tasks:{bob.user_id}",
        "tasks:", "tasks:me", "TASKS", " tasks", "exams:1", "positions:x", "market-data:EURUSD", "x", ":", "::", "é", "*", "%",
    ]  # fmt: skip
    async with live_server.join(bob) as peer:
        for name in names:
            answer = await peer.ask("sub", ch=name)
            assert (answer["t"], answer.get("code"), answer.get("ch")) == ("err", "not_found", name)
        same = {json.dumps({**frame, "id": 0, "ch": ""}) for frame in peer.seen if frame["t"] == "err"}
        assert len(same) == 1, "absent and someone else's look alike"
        await peer.sub("tasks")
        await ada.http.post("/api/v1/tasks", json={"title": "secret of ada"})
        await peer.alive()
        assert "secret of ada" not in json.dumps(peer.seen)


async def test_since_replays_exactly(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as first, live_server.join(ada) as second:
        subbed = await first.sub(channel)
        sent = await first.say(channel, "three small words")
        await first.event("reply.completed", reply=sent["reply"])
        original = [frame for frame in first.seen if frame["t"] == "ev"]
        head = original[-1]["seq"]
        flat = flattened(original)
        # Inside the deltas a position may lie where the second client's merging has no edge.
        edges = [frame["seq"] for frame in original if frame["e"] != "reply.delta"]
        for at in (0, subbed["head"], *edges):
            start = len(second.seen)
            again = await second.sub(channel, since={"ep": subbed["ep"], "seq": at})
            assert (again["recovered"], again["why"], again["head"]) == (True, "ok", head)
            frames = second.seen[start:]
            assert [frame["t"] for frame in frames if frame["t"] == "snap"] == []
            assert frames[-1]["t"] == "live"
            replayed = [frame for frame in frames if frame["t"] == "ev"]
            if replayed:
                assert (replayed[0].get("from", replayed[0]["seq"]), replayed[-1]["seq"]) == (at + 1, head)
            assert flattened(replayed) == tail_of(flat, at)


@pytest.mark.parametrize(
    ("since", "why"),
    [
        ({"seq": 10**6}, "epoch"), ({"seq": 2**63}, "epoch"), ({"seq": 2**62}, "epoch"), ({"ep": "other", "seq": 0}, "epoch"),
        ({"ep": "", "seq": 0}, None), ({"ep": "OWN", "seq": 10**6}, "epoch"), ({"seq": -1}, "initial"),
        ({"ep": "other", "seq": -1}, "initial"),
    ],
)  # fmt: skip
async def test_a_since_that_cannot_be_gets_a_snapshot(
    live_server: LiveServer, ada: Account, since: dict[str, Any], why: str | None
) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        subbed = await peer.sub(channel)
        if since.get("ep") == "OWN":
            since = {**since, "ep": subbed["ep"]}
        start = len(peer.seen)
        again = await peer.sub(channel, since=since)
        kinds = [frame["t"] for frame in peer.seen[start:]]
        if why is not None:
            assert (again["why"], again["recovered"]) == (why, False)
        if since["seq"] == -1:
            assert kinds == ["subbed", "live"]
        elif why == "epoch":
            assert kinds == ["subbed", "snap", "live"]
        sent = await peer.say(channel, "hello")
        await peer.event("reply.completed", reply=sent["reply"])


async def test_a_trimmed_since_gets_a_snapshot_and_never_a_gap(
    live_server: LiveServer, ada: Account, databases: TestDatabases
) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        subbed = await peer.sub(channel)
        sent = await peer.say(channel, "hello there")
        head = (await peer.event("reply.completed", reply=sent["reply"]))["seq"]
        connection = await asyncpg.connect(databases.postgres.admin_url(live_server.urls.name))
        try:
            await connection.execute("DELETE FROM channel_events WHERE channel = $1 AND seq <= 4", channel)
            await connection.execute("UPDATE channel_heads SET floor = 4 WHERE channel = $1", channel)
        finally:
            await connection.close()
        for at, why in ((0, "trimmed"), (3, "trimmed"), (4, "ok"), (head, "ok")):
            again = await peer.sub(channel, since={"ep": subbed["ep"], "seq": at})
            assert (again["why"], again["recovered"], again["floor"]) == (why, why == "ok", 4)


async def test_too_far_behind_gets_a_snapshot(serve_with: Serve) -> None:
    async with serve_with(realtime={"replay_events": 3}) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as peer:
            subbed = await peer.sub(channel)
            sent = await peer.say(channel, "hello there")
            await peer.event("reply.completed", reply=sent["reply"])
            again = await peer.sub(channel, since={"ep": subbed["ep"], "seq": 0})
            assert (again["why"], again["recovered"]) == ("too_far", False)
            assert [frame["t"] for frame in peer.seen[-3:]] == ["subbed", "snap", "live"]
            assert peer.seen[-2]["state"]["messages"][1]["status"] == "completed"


async def test_too_much_to_replay_gets_a_snapshot(serve_with: Serve) -> None:
    """A replay is bounded in bytes too: a few events may be large."""
    # Without a ring: what it holds is small in any case and not looked at.
    async with serve_with(realtime={"replay_bytes": 8 * 1024, "ring_events": 0}) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as peer:
            subbed = await peer.sub(channel)
            sent = await peer.say(channel, "x" * 10_000)
            head = (await peer.event("reply.completed", reply=sent["reply"]))["seq"]
            again = await peer.sub(channel, since={"ep": subbed["ep"], "seq": 0})
            assert (again["why"], again["recovered"]) == ("too_far", False)
            assert (await peer.sub(channel, since={"ep": subbed["ep"], "seq": head}))["why"] == "ok"


async def test_a_large_state_comes_in_parts(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    parts = json.dumps([{"type": "text", "text": "é" * 20_000}])
    await fill(live_server, ada, channel, 7, parts)
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        snaps = [frame for frame in peer.seen if frame["t"] == "snap"]
        assert [snap["part"] for snap in snaps] == list(range(len(snaps)))
        assert [snap["more"] for snap in snaps] == [True] * (len(snaps) - 1) + [False]
        assert len(snaps) == 7
        assert {snap["seq"] for snap in snaps} == {snaps[0]["seq"]}
        assert sum(len(snap["state"]["messages"]) for snap in snaps) == 7
        assert all(len(json.dumps(snap, ensure_ascii=False).encode()) <= 64 * 1024 for snap in snaps)


async def test_unsub_stops_the_events(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        assert (await peer.ask("unsub", ch=channel)) == {"t": "ok", "id": 1001}
        start = len(peer.seen)
        sent = await peer.say(channel, "hello")
        await poll_until_ended(ada, sent["reply"], channel)
        await peer.alive()
        assert [frame["t"] for frame in peer.seen[start:]] == ["ok", "err"]
        assert (await peer.ask("unsub", ch=channel))["code"] == "not_found"


async def test_subscribing_twice_starts_anew_and_says_everything_once(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as peer:
        await peer.sub(channel)
        await peer.sub(channel)
        sent = await peer.say(channel, "hello")
        await peer.event("reply.completed", reply=sent["reply"])
        await peer.alive()
        seqs = [frame["seq"] for frame in peer.seen if frame["t"] == "ev"]
        assert seqs == sorted(set(seqs))


async def test_a_late_reader_finds_the_running_reply_in_the_snapshot(live_server: LiveServer, ada: Account) -> None:
    channel = await conversation_of(ada)
    async with live_server.join(ada) as writer, live_server.join(ada) as late:
        await writer.sub(channel)
        sent = await writer.say(channel, slow_words(60))
        await writer.event("reply.delta", reply=sent["reply"])
        await writer.event("reply.delta", reply=sent["reply"])
        await late.sub(channel)
        snap = next(frame for frame in late.seen if frame["t"] == "snap")
        running = snap["state"]["messages"][-1]
        assert (running["id"], running["status"]) == (sent["reply"], "streaming")
        assert visible_text(running)
        text = visible_text(running)
        while True:
            frame = await late.event("reply.delta", "reply.completed", reply=sent["reply"])
            if frame["e"] == "reply.completed":
                break
            assert frame["d"]["off"] == len(text)
            text += frame["d"]["x"]
        assert text == visible_text(frame["d"]["message"])
