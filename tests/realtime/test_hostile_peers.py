"""Clients that flood, leave or never read: they are ended in time, cost little and disturb nobody."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from functools import partial
from weakref import WeakSet

import pytest
from websockets.exceptions import ConnectionClosed

from parley.realtime import handshake
from parley.realtime.connection import Connection
from parley.realtime.flow import Subscription
from parley.realtime.protocol import SocketProtocol
from tests.conftest import Account
from tests.realtime.conftest import LiveServer, Peer, Serve, conversation_of, poll
from tests.realtime.raw import close_code, masked, raw_handshake, resident_bytes
from tests.realtime.steps import fill


@pytest.fixture
async def peer(live_server: LiveServer, ada: Account) -> AsyncIterator[Peer]:
    """A connection that is welcome."""
    async with live_server.join(ada) as joined:
        yield joined


async def test_who_leaves_in_the_middle_leaves_no_trace(
    live_server: LiveServer, ada: Account, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that goes away while it is being answered is no error of the server."""
    hello = masked(1, json.dumps({"t": "hello", "v": 1, "auth": {"token": ada.access_token}}).encode())
    unsub = masked(1, b'{"t":"unsub","id":1,"ch":"x"}')

    async def leave(frames: int, *, politely: bool) -> None:
        async with raw_handshake(live_server) as (reader, writer):
            writer.write(hello + unsub * frames + (masked(8, b"\x03\xe8") if politely else b""))
            await writer.drain()
            await reader.read(100)

    with caplog.at_level(logging.ERROR):
        for politely in (True, False):
            await asyncio.gather(*(leave(n, politely=politely) for n in range(0, 120, 3)))
        await poll(lambda: not any(c.scope.user_id == ada.user_id for c in live_server.realtime.connections))
    assert not [record.getMessage() for record in caplog.records]


async def test_a_ping_flood_costs_nobody(live_server: LiveServer, ada: Account, peer: Peer) -> None:
    async with raw_handshake(live_server) as (_, writer):
        for _ in range(200):
            writer.write(masked(9, b"x" * 100) * 50)
            # It may be cut off in the middle.
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.05):
                    await writer.drain()
        await peer.alive()


@pytest.mark.parametrize("flood", [masked(9, b"x" * 125), masked(10, b""), masked(0, b"", fin=False)],
                         ids=["pings", "pongs", "pieces of nothing"])  # fmt: skip
async def test_what_never_reaches_the_application_is_bounded_too(
    live_server: LiveServer, peer: Peer, protocols: WeakSet[SocketProtocol], flood: bytes
) -> None:
    async with raw_handshake(live_server) as (reader, writer):
        (protocol,) = protocols
        if flood[0] & 0x0F == 0:
            writer.write(masked(1, b"{", fin=False))
        # As many as nobody minds.
        writer.write(flood * 50)
        await writer.drain()
        await peer.alive()
        assert not protocol.close_sent
        # It does not read: what answers it would wait in memory for ever.
        writer.write(flood * 500)
        await poll(lambda: protocol.close_sent)
        assert await close_code(reader) == 4429
        assert len(protocol.frames) <= 1


async def test_frames_that_come_in_one_read_are_bounded(serve_with: Serve, protocols: WeakSet[SocketProtocol]) -> None:
    """Thousands of frames fit into one read, and each is many times its size once it is here."""
    async with serve_with(realtime={"hello_at_once": 1}) as server, server.sign_up() as account:
        # Nobody is let in meanwhile, so that nothing is read from this one either.
        turn = await server.realtime.admission.wait()
        async with raw_handshake(server) as (reader, writer):
            (protocol,) = protocols
            hello = {"t": "hello", "v": 1, "auth": {"token": account.access_token}}
            writer.write(masked(1, json.dumps(hello).encode()))
            await poll(lambda: server.realtime.admission.waiting == 1)
            writer.write(masked(1, b"{}") * 8000)
            await poll(lambda: protocol.close_sent)
            assert protocol.queue.qsize() <= 2
            assert await close_code(reader) == 4429
        turn.release()
        await poll(lambda: not server.realtime.admission.waiting)


async def test_one_byte_at_a_time_is_joined_as_it_comes(
    live_server: LiveServer, peer: Peer, protocols: WeakSet[SocketProtocol]
) -> None:
    async with raw_handshake(live_server) as (reader, writer):
        (protocol,) = protocols
        writer.write(masked(1, b"x", fin=False))
        for _ in range(60):
            writer.write(masked(0, b"x", fin=False) * 100)
            await writer.drain()
            assert len(protocol.frames) <= 513
        await poll(lambda: sum(map(len, protocol.frames)) == 6001)
        await peer.alive()
        writer.write(masked(0, b"x" * 3000, fin=True))
        assert await close_code(reader) == 1009


def answered(connection: Connection, channel: str, before: Subscription | None) -> bool:
    """Whether a channel has been subscribed anew, and all of the answer has gone out."""
    held = connection._out.subscriptions.get(channel)
    return held is not None and held is not before and held.live_sent and not connection._out.buffered


async def test_who_says_goodbye_and_never_reads_is_gone_all_the_same(
    serve_with: Serve, protocols: WeakSet[SocketProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waits for its last bytes to be taken. Nobody takes them, and the descriptor would stay open."""
    monkeypatch.setattr(handshake, "_LINGER_S", 0.3)
    async with serve_with() as server, server.sign_up() as account:
        channel = await conversation_of(account)
        await fill(server, account, channel, 1, json.dumps([{"type": "text", "text": "x" * 30_000}]))
        async with raw_handshake(server) as (_, writer):
            assert isinstance(writer.transport, asyncio.Transport)
            writer.transport.pause_reading()
            (protocol,) = protocols
            hello = {"t": "hello", "v": 1, "auth": {"token": account.access_token}}
            writer.write(masked(1, json.dumps(hello).encode()))
            await poll(lambda: server.realtime.connections)
            (connection,) = server.realtime.connections
            held: Subscription | None = None
            # Until the kernel takes no more, and not so much that the application would notice.
            while not protocol.transport.get_write_buffer_size():
                writer.write(masked(1, json.dumps({"t": "sub", "id": 1, "ch": channel}).encode()))
                await poll(partial(answered, connection, channel, held))
                held = connection._out.subscriptions[channel]
            assert protocol.writable.is_set()
            writer.write(masked(8, b"\x03\xe8"))
            await poll(lambda: not server.realtime.connections)
            assert not protocol.disconnected
            await poll(lambda: protocol.disconnected)


async def test_ten_thousand_subscriptions_end_at_200(live_server: LiveServer, ada: Account, peer: Peer) -> None:
    answer = await ada.http.post("/api/v1/conversations", json={})
    one = f"conversation:{answer.json()['data']['id']}"
    # In groups: all at once is more than the pool has to answer on a slow machine.
    made = [name for _ in range(20) for name in await asyncio.gather(*(conversation_of(ada) for _ in range(10)))]
    for name in made:
        await peer.send("sub", id=name, ch=name, since={"seq": -1})
    for name in made:
        assert (await peer.until(id=name))["t"] == "subbed"
    answers = [await peer.ask("sub", ch=one) for _ in range(3)]
    assert [(frame["t"], frame["code"], frame["ch"]) for frame in answers] == [("err", "limit_subs", one)] * 3
    # One that is held may be subscribed again, and a place that is given up can be taken.
    assert (await peer.ask("sub", ch=made[0], since={"seq": -1}))["t"] == "subbed"
    assert (await peer.ask("unsub", ch=made[1]))["t"] == "ok"
    assert (await peer.ask("sub", ch=one, since={"seq": -1}))["t"] == "subbed"


async def test_a_flooder_is_told_to_wait_and_then_closed_with_4429(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:
        for number in range(70):
            await peer.send("unsub", id=number, ch="x")
        answers = [await peer.until(id=number) for number in range(70)]
        refused = [frame for frame in answers if frame["code"] == "rate_limited"]
        assert {frame["code"] for frame in answers[:60]} == {"not_found"}
        assert 5 <= len(refused) <= 10
        assert all(frame["retry"] == "backoff" and 0 < frame["retry_after_ms"] <= 1000 for frame in refused)
        # Whoever waits as told goes on.
        await asyncio.sleep(refused[-1]["retry_after_ms"] / 1000)
        await peer.alive()
        with suppress(ConnectionClosed):
            for number in range(5000):
                await peer.send("unsub", id=number, ch="x")
        assert await peer.code() == 4429


async def test_a_steady_flood_is_closed_with_4429_too(serve_with: Serve) -> None:
    """Ten times the allowed rate, without end: each second some frames get through, and it is a flood all the same."""
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:

        async def flood() -> None:
            for number in range(2000):
                await peer.send("unsub", id=number, ch="x")
                await asyncio.sleep(0.005)

        task = asyncio.create_task(flood())
        assert await peer.code(within_s=15) == 4429
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_flood_of_acks_is_closed_with_4429(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:
        with suppress(ConnectionClosed):
            for number in range(5000):
                await peer.send("ack", a={"tasks": number})
        assert await peer.code() == 4429


async def test_one_who_asks_and_never_reads_is_closed_and_costs_little(serve_with: Serve) -> None:
    """W-11: answers are not events, so no acknowledgement bounds them; the connection must end all the same."""
    limits = {"ack_timeout_s": 1, "silence_timeout_s": 4, "frames_per_s": 10_000, "frames_burst": 20_000}
    async with serve_with(realtime=limits) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        rows = 50
        parts = json.dumps([{"type": "text", "text": "x" * 32_000}])
        await fill(server, account, channel, rows, parts)
        before = resident_bytes()
        async with raw_handshake(server) as (_, writer):
            hello = {"t": "hello", "v": 1, "auth": {"token": account.access_token}}
            writer.write(masked(1, json.dumps(hello).encode()))
            await poll(lambda: server.realtime.connections)
            for number in range(100):
                writer.write(masked(1, json.dumps({"t": "sub", "id": number, "ch": channel}).encode()))
            await poll(lambda: not server.realtime.connections, within_s=8)
        assert resident_bytes() - before < 60 * 1024 * 1024
        async with server.join(account) as peer:
            await peer.alive()


async def test_one_who_streams_and_never_reads_is_dropped(serve_with: Serve) -> None:
    """W-11 over HTTP: a stream that takes nothing for as long as a socket may leave all unacknowledged is ended."""
    async with serve_with(realtime={"ack_timeout_s": 1}) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        await fill(server, account, channel, 50, json.dumps([{"type": "text", "text": "x" * 32_000}]))
        head = f"GET /api/v1/channels/{channel}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {account.access_token}\r\n\r\n"
        before = resident_bytes()

        def readers() -> int:
            return sum(len(ring.subscribers) for ring in server.realtime.bus._rings.values())

        async with AsyncExitStack() as stack:
            for _ in range(20):
                _, writer = await stack.enter_async_context(server.bytes())
                # With room for the whole answer in the kernel nobody would be slow.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                writer.write(head.encode())
            await poll(lambda: readers() == 20)
            assert resident_bytes() - before < 100 * 1024 * 1024
            await poll(lambda: readers() == 0, within_s=6)
        assert (await account.http.get("/api/v1/me")).status_code == 200
