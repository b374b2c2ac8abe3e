"""The protocol page (sections 2 and 5), point by point, against a real server on a real connection."""

import asyncio
import hashlib
import json
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from websockets.exceptions import InvalidStatus

from parley.core import clock
from tests.conftest import Account, TestDatabases
from tests.realtime.conftest import (
    Frame,
    LiveServer,
    Log,
    Peer,
    Serve,
    assert_terminal,
    assert_valid_server_frame,
    conversation_of,
    poll,
    visible_text,
)  # fmt: skip


def slow_words(count: int) -> str:
    """Return a question whose answer takes a while: the demo model writes a word each 20 ms."""
    return f"repeat {count} word"


# -- the connection ------------------------------------------------------------------------------------------------


async def test_welcome_has_every_field(live_server: LiveServer, ada: Account) -> None:
    async with live_server.open() as peer:
        assert peer.socket.subprotocol == "parley.v1"
        await peer.send("hello", v=1, auth={"token": ada.access_token}, client="tests/1", unknown={"x": 1})
        welcome = await peer.read()
        assert (welcome["t"], welcome["v"], welcome["hb"], welcome["durable"]) == ("welcome", 1, 30, True)
        assert (welcome["user"], welcome["workspace"]) == (str(ada.user_id), str(ada.workspace_id))
        assert welcome["limits"] == {"frame": 65536, "subs": 200, "rate": 1000}
        assert 0 < welcome["expires_at"] - welcome["now"] <= 15 * 60
        assert abs(welcome["now"] - clock.timestamp()) < 5


@pytest.mark.parametrize("offered", [None, ["parley.v2"], ["chat", "superchat"], ["PARLEY.V1"]])
async def test_another_subprotocol_is_4406(live_server: LiveServer, offered: list[str] | None) -> None:
    async with live_server.open(subprotocols=offered) as peer:
        assert await peer.code() == 4406
        assert peer.socket.subprotocol is None


async def test_ours_among_others_is_taken(live_server: LiveServer, ada: Account) -> None:
    async with live_server.open(subprotocols=["chat", "parley.v1"]) as peer:
        await peer.send("hello", v=1, auth={"token": ada.access_token})
        assert (await peer.read())["t"] == "welcome"


@pytest.mark.parametrize("version", [0, 2, -1, 2**40])
async def test_another_version_is_4406(live_server: LiveServer, ada: Account, version: int) -> None:
    async with live_server.open() as peer:
        await peer.send("hello", v=version, auth={"token": ada.access_token})
        assert await peer.code() == 4406


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example:3000",
     "http://localhost@evil.example", "file://", "chrome-extension://abc", "http://[::1", "//localhost", "localhost",
     "javascript:alert(1)//localhost"],
)  # fmt: skip
async def test_a_page_elsewhere_is_refused_before_the_socket_opens(live_server: LiveServer, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with live_server.open(origin=origin):
            pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("origin", [None, "http://localhost:5173", "http://127.0.0.1:9", "https://[::1]:8443"])
async def test_loopback_pages_and_programs_may_connect_in_development(
    live_server: LiveServer, ada: Account, origin: str | None
) -> None:
    async with live_server.open(origin=origin) as peer:
        await peer.send("hello", v=1, auth={"token": ada.access_token})
        assert (await peer.read())["t"] == "welcome"


async def test_production_takes_its_own_pages_only(serve_with: Serve) -> None:
    strict: dict[str, Any] = {
        "env": "production", "secret_key": ["k3Jd8sPq0ZbN1xVw7uTy5rGc2mHf9aLe4oXi6B"], "rate_limits": "on",
        "public_url": "https://app.example.com/", "cors_origins": ["https://good.example"],
    }  # fmt: skip
    async with serve_with(**strict) as server, server.sign_up() as account:
        for origin in ("http://localhost:3000", "http://127.0.0.1", "https://sub.good.example", "http://good.example",
                       "https://good.example.evil.example", "https://app.example.com:444"):  # fmt: skip
            with pytest.raises(InvalidStatus) as refused:
                async with server.open(origin=origin):
                    pass
            assert refused.value.response.status_code == 403, origin
        for fine in (None, "https://app.example.com", "https://good.example"):
            async with server.open(origin=fine) as peer:
                await peer.send("hello", v=1, auth={"token": account.access_token})
                assert (await peer.read())["t"] == "welcome"


async def test_no_hello_in_time_is_4408(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_timeout_s": 0.2}) as server:
        async with server.open() as silent:
            assert await silent.code() == 4408
        async with server.open() as busy:
            await busy.raw("{")
            assert (await busy.read())["code"] == "bad_frame"
            assert await busy.code() == 4408


async def test_a_frame_before_hello_is_4401(live_server: LiveServer) -> None:
    for frame in ({"t": "hb"}, {"t": "sub", "id": 1, "ch": "tasks"}, {"t": "ack", "a": {}}):
        async with live_server.open() as peer:
            await peer.raw(json.dumps(frame))
            assert (await peer.read())["code"] == "unauthenticated"
            assert await peer.code() == 4401


async def test_a_second_hello_is_4409(live_server: LiveServer, ada: Account) -> None:
    async with live_server.join(ada) as peer:
        await peer.send("hello", v=1, auth={"token": ada.access_token})
        assert await peer.code() == 4409


async def test_too_many_connections_of_one_user_are_4429(serve_with: Serve) -> None:
    async with serve_with(realtime={"connections_per_user": 3}) as server, AsyncExitStack() as stack:
        account = await stack.enter_async_context(server.sign_up())
        other = await stack.enter_async_context(server.sign_up())
        held = [await stack.enter_async_context(server.join(account)) for _ in range(3)]
        async with server.open() as peer:
            await peer.send("hello", v=1, auth={"token": account.access_token})
            answer = await peer.read()
            assert (answer["code"], answer["retry"]) == ("rate_limited", "backoff")
            assert answer["retry_after_ms"] > 0
            assert await peer.code() == 4429
        async with server.join(other) as free:
            await free.alive()
        await held[0].socket.close()
        await poll(lambda: server.realtime.per_user[account.user_id] == 2)
        async with server.join(account) as again:
            await again.alive()


async def test_too_many_connections_in_all_are_1013(serve_with: Serve) -> None:
    async with serve_with(realtime={"connections": 1}) as server, server.sign_up() as account:
        async with server.join(account) as first:
            async with server.open() as peer:
                await peer.send("hello", v=1, auth={"token": account.access_token})
                assert await peer.code() == 1013
            await first.alive()


# -- credentials ---------------------------------------------------------------------------------------------------


async def ticket_of(account: Account) -> str:
    answer = await account.http.post("/api/v1/realtime/tickets")
    assert answer.status_code == 201
    data = answer.json()["data"]
    assert data["expires_in"] == 30
    found: str = data["ticket"]
    return found


async def hello_code(server: LiveServer, auth: dict[str, Any]) -> int:
    """Return the close code of a hello that is refused, 0 for one that is welcome."""
    async with server.open() as peer:
        await peer.send("hello", v=1, auth=auth)
        answer = await peer.read()
        if answer["t"] == "welcome":
            return 0
        assert (answer["t"], answer["code"], answer["retry"]) == ("err", "unauthenticated", "never")
        for value in auth.values():
            assert str(value) not in answer["msg"] or not value
        return await peer.code()


async def test_a_ticket_is_good_once(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    assert await hello_code(live_server, {"ticket": ticket}) == 0
    assert await hello_code(live_server, {"ticket": ticket}) == 4401


async def test_of_50_at_once_one_gets_in(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    codes = await asyncio.gather(*(hello_code(live_server, {"ticket": ticket}) for _ in range(50)))
    assert sorted(codes) == [0] + [4401] * 49


async def test_a_ticket_of_30_seconds_ago_is_4401(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    with clock.shifted(30.1):
        assert await hello_code(live_server, {"ticket": ticket}) == 4401
    assert await hello_code(live_server, {"ticket": ticket}) == 4401


async def test_a_ticket_dies_with_its_session(live_server: LiveServer, eve: Account) -> None:
    ticket = await ticket_of(eve)
    assert (await eve.http.post("/api/v1/auth/signout")).status_code == 204
    assert await hello_code(live_server, {"ticket": ticket}) == 4401


async def test_a_ticket_is_for_its_own_user(live_server: LiveServer, ada: Account, bob: Account) -> None:
    async with live_server.open() as peer:
        await peer.send("hello", v=1, auth={"ticket": await ticket_of(bob)})
        welcome = await peer.read()
        assert (welcome["user"], welcome["workspace"]) == (str(bob.user_id), str(bob.workspace_id))
    # The workspace in a ticket is only where the look-up starts.
    secret = await ticket_of(bob)
    import base64

    raw = base64.urlsafe_b64decode(secret.removeprefix("tk_"))
    moved = "tk_" + base64.urlsafe_b64encode(ada.workspace_id.bytes + raw[16:]).decode()
    assert await hello_code(live_server, {"ticket": moved}) == 4401


async def test_bad_credentials_are_4401(live_server: LiveServer, ada: Account) -> None:
    head, claims, signature = ada.access_token.split(".")
    bad: list[dict[str, Any]] = [
        {}, {"token": ""}, {"token": "x"}, {"token": "a.b.c"}, {"token": f"{head}.{claims}.{signature[::-1]}"},
        {"token": "eyJhbGciOiJub25lIn0.e30."}, {"token": "é"}, {"token": "\x00"}, {"token": ada.refresh_token},
        {"ticket": "x"}, {"ticket": "tk_"}, {"ticket": "tk_" + "A" * 64}, {"ticket": "tk_é"}, {"ticket": "tk_\x00"},
        {"ticket": ada.access_token}, {"api_key": "x"}, {"api_key": "parley_sk_" + "a" * 40}, {"password": "x"},
        {"token": ada.access_token, "ticket": "tk_x"}, {"token": ada.access_token, "api_key": "x"},
        {"token": None, "ticket": None},
    ]  # fmt: skip
    for auth in bad:
        assert await hello_code(live_server, auth) == 4401, auth


async def test_an_expired_token_is_4401(live_server: LiveServer, ada: Account) -> None:
    with clock.shifted(15 * 60 + 1):
        assert await hello_code(live_server, {"token": ada.access_token}) == 4401


async def test_two_credentials_do_not_spend_the_ticket(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    assert await hello_code(live_server, {"ticket": ticket, "token": ada.access_token}) == 4401
    assert await hello_code(live_server, {"ticket": ticket}) == 0


async def test_a_credential_that_runs_out_is_told_and_then_4004(serve_with: Serve) -> None:
    # The connection looks at its clocks as often as the shortest of them needs.
    quick = {"ack_timeout_s": 0.4}
    async with serve_with(realtime=quick) as server, server.sign_up() as account, server.join(account) as peer:
        expires_at = peer.seen[0]["expires_at"]
        with clock.shifted(15 * 60 - 30):
            expiring = await peer.until("auth.expiring")
            assert expiring["at"] == expires_at
        with clock.shifted(15 * 60 + 1):
            assert await peer.code() == 4004


async def test_renewal_in_place(live_server: LiveServer, eve: Account, bob: Account) -> None:
    async with live_server.join(eve) as peer:
        with clock.shifted(10 * 60):
            answer = await eve.http.post("/api/v1/auth/refresh", json={"refresh_token": eve.refresh_token})
            renewed = answer.json()["data"]["access_token"]
            ok = await peer.ask("auth", auth={"token": renewed})
            assert ok["t"] == "ok"
            assert ok["expires_at"] > peer.seen[0]["expires_at"] + 9 * 60
        with clock.shifted(20 * 60):
            # The old credential has run out, the new one has not.
            await peer.alive()
        assert (await peer.ask("auth", auth={"ticket": await ticket_of(eve)}))["t"] == "ok"
        await peer.send("auth", id=1, auth={"token": bob.access_token})
        assert await peer.code() == 4403


@pytest.mark.parametrize("auth", [{"token": "x"}, {}, {"ticket": "tk_" + "A" * 64}, {"token": "x", "ticket": "y"}])
async def test_a_renewal_that_does_not_hold_is_4401(
    live_server: LiveServer, ada: Account, auth: dict[str, str]
) -> None:
    async with live_server.join(ada) as peer:
        answer = await peer.ask("auth", auth=auth)
        assert (answer["t"], answer["code"]) == ("err", "unauthenticated")
        assert await peer.code() == 4401


async def test_a_revoked_session_loses_its_socket(live_server: LiveServer, eve: Account) -> None:
    """W-10: what signs out must not go on reading and writing until its token would have run out."""
    channel = await conversation_of(eve)
    async with live_server.join(eve) as peer, live_server.join(eve) as idle:
        assert (await peer.sub(channel))["t"] == "subbed"
        assert (await eve.http.post("/api/v1/auth/signout")).status_code == 204
        assert await idle.code(within_s=8) in {4401, 4403}
        assert await peer.code(within_s=8) in {4401, 4403}


# -- time ----------------------------------------------------------------------------------------------------------


async def test_silence_is_4001_and_any_frame_breaks_it(serve_with: Serve) -> None:
    async with serve_with(realtime={"silence_timeout_s": 0.5}) as server, server.sign_up() as account:
        async with server.join(account) as silent, server.join(account) as alive:
            task = asyncio.create_task(silent.code())
            for _ in range(8):
                await alive.send("hb")
                await asyncio.sleep(0.1)  # the pace is what is tested
            assert await task == 4001
            await alive.alive()


async def test_heartbeats_come_with_heads_on_a_busy_connection(serve_with: Serve) -> None:
    async with serve_with(realtime={"heartbeat_s": 0.2}) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as peer:
            assert peer.seen[0]["hb"] >= 1
            await peer.sub(channel)
            sent = await peer.say(channel, slow_words(70))
            terminal = await peer.event("reply.completed", reply=sent["reply"])
            beats = [frame for frame in peer.seen if frame["t"] == "hb"]
            events = [frame for frame in peer.seen if frame["t"] == "ev"]
            span = (events[-1]["ts"] - events[0]["ts"]) / 1000
            assert span > 0.8, "the reply is to last for some heartbeats"
            assert len(beats) >= span / 0.2 - 2
            last = await peer.until("hb")
            assert last["heads"] == {channel: terminal["seq"]}
            heads = [frame["heads"][channel] for frame in peer.seen if frame["t"] == "hb" and frame["heads"]]
            assert heads == sorted(heads)
            # A head may name only what is committed, and what comes after it is higher.
            assert heads[-1] == terminal["seq"]


async def test_who_acknowledges_nothing_is_4002(serve_with: Serve) -> None:
    small = {"ack_window_bytes": 4096, "ack_timeout_s": 0.5}
    async with serve_with(realtime=small) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as lazy, server.join(account) as diligent:
            diligent.acks = True
            await lazy.sub(channel, since={"seq": -1})
            await diligent.sub(channel, since={"seq": -1})
            for number in range(4):
                sent = await diligent.say(channel, f"{number} " + "x" * 3000)
                await diligent.event("reply.completed", reply=sent["reply"])
            assert await lazy.code() == 4002
            received = [frame for frame in lazy.seen if frame["t"] == "ev"]
            assert sum(len(json.dumps(frame)) for frame in received) < 4096 + 16 * 1024
            await diligent.alive()


async def test_an_ack_opens_the_window_again(serve_with: Serve) -> None:
    small = {"ack_window_bytes": 2048, "ack_timeout_s": 20}
    async with serve_with(realtime=small) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as peer, server.join(account) as sender:
            await peer.sub(channel, since={"seq": -1})
            texts = [f"{number} " + "x" * 3000 for number in range(3)]
            for text in texts:
                sent = await sender.say(channel, text)
                await poll_until_ended(account, sent["reply"], channel)
            head = (await sender.ask("sub", ch=channel, since={"seq": -1}))["head"]
            stuck = 0
            while peer.logs[channel].last < head:
                try:
                    await peer.until("ev", within_s=0.3)
                except TimeoutError:
                    stuck += 1
                    await peer.send("ack", a={channel: peer.logs[channel].last})
            assert stuck, "the window closed between"


async def poll_until_ended(account: Account, reply: str, channel: str) -> dict[str, Any]:
    """Return a reply's message once it has ended."""
    path = f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
    async with asyncio.timeout(20):
        while True:
            rows = (await account.http.get(path)).json()["data"]
            found: dict[str, Any] = next(row for row in rows if row["id"] == reply)
            if found["status"] in {"completed", "failed", "cancelled"}:
                return found
            await asyncio.sleep(0.02)


# -- subscriptions -------------------------------------------------------------------------------------------------


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


async def poll_live(peer: Peer, *channels: str) -> None:
    """Read until every channel is live."""
    async with asyncio.timeout(10):
        while any(peer.logs.get(name) is None or peer.logs[name].state != "live" for name in channels):
            await peer.read()


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


def flattened(frames: list[Frame]) -> list[tuple[str, str]]:
    """Return events with the deltas of a part joined: what merging may not change."""
    found: list[tuple[str, str]] = []
    for frame in frames:
        if frame["e"] == "reply.delta" and found and found[-1][0] == "reply.delta":
            found[-1] = ("reply.delta", found[-1][1] + frame["d"]["x"])
        elif frame["e"] == "reply.delta":
            found.append(("reply.delta", frame["d"]["x"]))
        else:
            found.append((f"{frame['seq']} {frame['e']}", json.dumps(frame["d"], sort_keys=True)))
    return found


def tail_of(flat: list[tuple[str, str]], at: int) -> list[tuple[str, str]]:
    """Return what comes after a position that is not inside the deltas."""
    kept: list[tuple[str, str]] = []
    for name, data in reversed(flat):
        if name[0].isdigit() and int(name.split()[0]) <= at:
            break
        kept.insert(0, (name, data))
    return kept


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
    from tests.realtime.test_hostile_frames import fill

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


# -- sending -------------------------------------------------------------------------------------------------------


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


async def once(server: LiveServer, account: Account, channel: str, text: str, cid: str) -> Frame:
    """Send from a connection of its own."""
    async with server.join(account) as peer:
        return await peer.say(channel, text, cid=cid)


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


async def peer_event(peer: Peer, name: str, reply: str) -> Frame:
    """Return an event that may have been read already."""
    for frame in peer.seen:
        if frame["t"] == "ev" and frame["e"] == name and frame["d"].get("reply") == reply:
            return frame
    return await peer.event(name, reply=reply)


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


# -- server-sent events --------------------------------------------------------------------------------------------


class Events:
    """Reads server-sent events."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.comments = 0

    async def next(self) -> tuple[str, str | None, Frame] | None:
        """Return name, id and frame of the next event, None at the end."""
        name, id_, data = "", None, ""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("event: "):
                name = line[7:]
            elif line.startswith("id: "):
                id_ = line[4:]
            elif line.startswith("data: "):
                data = line[6:]
            elif not line and data:
                return name, id_, assert_valid_server_frame(data)
        return None

    async def rest(self) -> list[tuple[str, str | None, Frame]]:
        """Return all that comes until the end."""
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


async def stream_turn(
    account: Account, channel: str, text: str, key: str | None
) -> list[tuple[str, str | None, Frame]]:
    """Send over HTTP and read the turn."""
    headers = {"Accept": "text/event-stream", **({"Idempotency-Key": key} if key else {})}
    path = f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
    async with account.http.stream("POST", path, json={"text": text}, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        return await Events(response).rest()


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


async def within[T](awaitable: Any) -> Any:
    """Wait no longer than a test may."""
    async with asyncio.timeout(10):
        found = await awaitable
    assert found is not None
    return found


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


async def touch(server: LiveServer, account: Account) -> None:
    """Make the user's inbox move, past the credential."""
    from parley.chat.schemas import ConversationCreate
    from parley.chat.service import ConversationService
    from parley.core.scope import Role, Scope

    scope = Scope(account.workspace_id, account.user_id, Role.OWNER)
    async with server.app.state.database.unit_of_work(scope) as unit:
        await ConversationService(unit, scope, server.realtime.bus).start(ConversationCreate())


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


async def test_the_server_says_1012_when_it_stops(serve_with: Serve) -> None:
    async with AsyncExitStack() as stack:
        async with serve_with() as server:
            account = await stack.enter_async_context(server.sign_up())
            peer = await stack.enter_async_context(server.join(account))
            task = asyncio.create_task(peer.code(within_s=20))
        assert await task == 1012
