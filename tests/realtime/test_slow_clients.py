"""Clients that take less than there is: their share of memory is bounded, the others notice nothing."""

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakSet

import pytest

from parley.realtime.connection import Connection
from parley.realtime.events import LoggedEvent, NewEvent, merged
from parley.realtime.log import append
from parley.realtime.protocol import SocketProtocol
from tests.conftest import Account
from tests.realtime.conftest import LiveServer, Peer, Serve, poll
from tests.realtime.raw import masked
from tests.realtime.steps import channel_of, publish, scope_of, task_of

MIB = 1024 * 1024


def connection_of(server: LiveServer, peer: Peer) -> Connection:
    """Return the server's side of a peer."""
    return next(c for c in server.realtime.connections if c.id == peer.seen[0]["conn"])


async def paused(server: LiveServer, peer: Peer) -> None:
    """Wait until nothing more is sent for want of acknowledgements, and read what was."""
    connection = connection_of(server, peer)
    await poll(lambda: connection._out.is_paused)
    # One turn may still be under way; an answer comes after it.
    await peer.alive()


@pytest.mark.parametrize(
    ("limits", "count", "size"), [({"lag_bytes": 20_000}, 30, 1500), ({"lag_events": 20}, 40, 500)], ids=["bytes", "events"]
)  # fmt: skip
async def test_who_falls_far_behind_gets_the_state_when_it_acknowledges_again(
    serve_with: Serve, limits: dict[str, Any], count: int, size: int
) -> None:
    async with serve_with(realtime={"ack_window_bytes": 4096, "ack_timeout_s": 20, **limits}) as server:
        async with server.sign_up() as account, server.join(account) as lazy:
            task = await task_of(account)
            await lazy.sub("tasks", since={"seq": -1})
            for _ in range(count):
                head = await publish(server, account, task, count=1, size=size)
            await paused(server, lazy)
            log = lazy.logs["tasks"]
            assert 0 < log.last < head
            assert not [frame for frame in lazy.seen if frame["t"] == "snap"], "not before it acknowledges"

            await lazy.send("ack", a={"tasks": log.last})
            snap = await lazy.until("snap")
            assert (snap["seq"], snap["state"]["items"]) == (head, [task])
            assert (await lazy.until("live"))["seq"] == head
            # And it goes on from there.
            await lazy.send("ack", a={"tasks": head})
            after = await publish(server, account, task, count=1, size=10)
            assert (await lazy.until("ev"))["seq"] == after == head + 1


async def test_who_falls_a_little_behind_gets_every_event(serve_with: Serve) -> None:
    async with serve_with(realtime={"ack_window_bytes": 4096, "ack_timeout_s": 20, "lag_bytes": 200_000}) as server:
        async with server.sign_up() as account, server.join(account) as lazy:
            task = await task_of(account)
            await lazy.sub("tasks", since={"seq": -1})
            head = await publish(server, account, task, count=60, size=1500)
            await paused(server, lazy)
            assert lazy.logs["tasks"].last < head
            lazy.acks = True
            await lazy.send("ack", a={"tasks": lazy.logs["tasks"].last})
            while lazy.logs["tasks"].last < head:
                assert (await lazy.read())["t"] in {"ev", "hb"}


async def test_what_is_replayed_is_not_lag(serve_with: Serve) -> None:
    """A replay has bounds of its own: what was there before the client came does not count against it."""
    async with serve_with(realtime={"lag_bytes": 8000, "ack_window_bytes": 4096}) as server:
        async with server.sign_up() as account, server.join(account) as peer:
            task = await task_of(account)
            head = await publish(server, account, task, count=30, size=1500)
            peer.acks = True
            subbed = await peer.sub("tasks", since={"seq": 0})
            assert (subbed["why"], peer.logs["tasks"].last) == ("ok", head)
            assert not [frame for frame in peer.seen if frame["t"] == "snap"]


async def test_a_send_that_is_not_taken_closes_with_4002(serve_with: Serve, caplog: pytest.LogCaptureFixture) -> None:
    limits = {"send_timeout_s": 0.5, "ack_window_bytes": 64 * MIB, "lag_bytes": 64 * MIB, "lag_events": 10_000}
    async with serve_with(realtime=limits) as server, server.sign_up() as account:
        task = await task_of(account)
        async with deaf(server, account) as connection:
            with caplog.at_level("INFO"):
                for _ in range(40):
                    if connection not in server.realtime.connections:
                        break
                    await publish(server, account, task, count=8, size=30_000)
                await poll(lambda: connection not in server.realtime.connections)
        closed = [record for record in caplog.records if record.getMessage() == "socket closed"]
        assert [(record.__dict__["code"], record.__dict__["reason"]) for record in closed] == [(4002, "does not read")]


@asynccontextmanager
async def deaf(server: LiveServer, account: Account, *, bytes_per_s: int = 0) -> AsyncIterator[Connection]:
    """Subscribe to the tasks and read nothing, or so little."""
    before = set(server.realtime.connections)
    with socket.socket() as raw:
        # Before it connects: the window is agreed on then.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", server.settings.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
        writer.write(
            b"GET /api/v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Protocol: parley.v1\r\n\r\n"
        )
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        subs = [{"ch": "tasks", "since": {"seq": -1}}]
        hello = {"t": "hello", "v": 1, "auth": {"token": account.access_token}, "subs": subs}
        writer.write(masked(1, json.dumps(hello).encode()))
        await poll(lambda: any(c._out.subscriptions for c in server.realtime.connections - before))
        (connection,) = server.realtime.connections - before
        task = asyncio.create_task(_sip(reader, bytes_per_s)) if bytes_per_s else None
        try:
            yield connection
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            writer.transport.abort()


async def _sip(reader: asyncio.StreamReader, bytes_per_s: int) -> None:
    with suppress(OSError):
        while await reader.read(bytes_per_s // 10):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # - the pace is what is tested


async def test_slow_readers_cost_little_and_the_others_nothing(
    serve_with: Serve, protocols: WeakSet[SocketProtocol]
) -> None:
    """12 MB go to one who keeps up, beside one who reads nothing, one who sips and a tab that is frozen."""
    async with serve_with(realtime={"ack_timeout_s": 2, "send_timeout_s": 2}) as server, server.sign_up() as account:
        task = await task_of(account)
        async with deaf(server, account) as silent, deaf(server, account, bytes_per_s=1024) as sipping:
            async with server.join(account) as frozen, server.join(account) as normal:
                normal.acks = True
                await frozen.sub("tasks", since={"seq": -1})
                await normal.sub("tasks", since={"seq": -1})
                slow = {silent, sipping, connection_of(server, frozen)}
                thawing = asyncio.create_task(frozen.code(within_s=20))
                for _ in range(50):
                    head = await publish(server, account, task, count=8, size=30_000)
                    while normal.logs["tasks"].last < head:
                        assert (await normal.read())["t"] in {"ev", "hb"}, "who keeps up misses nothing"
                    for connection in slow & server.realtime.connections:
                        assert connection._out.buffered < MIB
                        assert connection._out.unacked < 256 * 1024 + 64 * 1024
                    for protocol in protocols:
                        assert protocol.transport.get_write_buffer_size() < 256 * 1024
                assert await thawing == 4002
                await poll(lambda: not slow & server.realtime.connections)
                await normal.alive()


async def test_a_busy_channel_leaves_room_for_the_others(serve_with: Serve) -> None:
    """Turns of 32 KiB: of two channels that both have much, neither waits for the other to be done."""
    async with serve_with(realtime={"ack_window_bytes": 40_000, "ack_timeout_s": 20}) as server:
        async with server.sign_up() as account, server.join(account) as peer:
            task = await task_of(account)
            await peer.sub("tasks", since={"seq": -1})
            await peer.sub("user:me", since={"seq": -1})
            made = json.loads((await account.http.post("/api/v1/conversations", json={})).text)["data"]
            await peer.event("conversation.created")
            await publish_both(server, account, task, made)
            await paused(server, peer)
            peer.acks = True
            await peer.send("ack", a={ch: log.last for ch, log in peer.logs.items()})
            events = [frame["ch"] for frame in peer.seen if frame["t"] == "ev"][1:]
            while min(events.count("tasks"), events.count("user:me")) < 60:
                frame = await peer.read()
                events += [frame["ch"]] if frame["t"] == "ev" else []
            runs = [(ch, len(list(run))) for ch, run in itertools.groupby(events)]
            # The last run is what one had left when the other was done.
            assert len(runs) >= 6, runs
            assert all(length * 2200 <= 32 * 1024 + 2200 for _, length in runs[:-1]), runs


async def publish_both(server: LiveServer, account: Account, task: dict[str, Any], made: dict[str, Any]) -> None:
    """Tell 120 KB on two channels in one transaction."""
    tasks, inbox = await channel_of(server, account, "tasks"), await channel_of(server, account, "user:me")
    events = [NewEvent(tasks, "task.updated", {**task, "description": "x" * 2000}) for _ in range(60)]
    events += [NewEvent(inbox, "conversation.updated", {**made, "title": "x" * 2000}) for _ in range(60)]
    async with server.app.state.database.unit_of_work(scope_of(account)) as unit:
        await append(unit, server.realtime.bus, events)


@pytest.mark.parametrize("text", ["x" * 900, "語" * 300, "😀" * 220])
async def test_a_merged_event_is_at_most_32_kib(text: str) -> None:
    reply, events = "0193c0de-0000-7000-8000-000000000001", []
    for number in range(200):
        d = {"reply": reply, "part": 0, "off": number * len(text), "x": text}
        events.append(LoggedEvent(number + 1, "reply.delta", json.dumps(d, ensure_ascii=False), 1))
    found = list(merged(events))
    assert 2 < len(found) < 20
    assert all(len(event.data.encode()) <= 32 * 1024 for event in found)
    assert "".join(event.d["x"] for event in found) == text * 200
    assert [event.first for event in found] == [1, *(event.seq + 1 for event in found[:-1])]
