"""Moving clients away before a process stops: asked one by one, served until they have left, closed at the end."""

import asyncio
import time

import pytest

from parley.realtime import drain as drain_module
from parley.realtime.drain import drain
from tests.conftest import Account
from tests.realtime.conftest import Frame, LiveServer, Peer, Serve, poll
from tests.realtime.steps import Events, publish, slow, task_of, within


async def goaway(peer: Peer) -> tuple[Frame, float]:
    """Return what asks a peer to move, and when it came."""
    frame = await peer.until("goaway")
    return frame, time.monotonic()


async def refused(server: LiveServer, account: Account) -> tuple[Frame, int]:
    """Say hello to a server that stops."""
    async with server.open() as peer:
        await peer.send("hello", v=1, auth={"token": account.access_token})
        return await peer.read(), await peer.code()


async def test_each_is_asked_and_serves_on_until_it_has_left(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        task = await task_of(account)
        async with server.join(account) as first, server.join(account) as second:
            await first.sub("tasks")
            draining = asyncio.create_task(drain(server.realtime, window_s=20, deadline_s=10))
            for peer in (first, second):
                frame, _ = await goaway(peer)
                assert frame["reason"] == "deploy"
                assert 0 <= frame["reconnect_after_ms"] < frame["deadline_ms"] <= 10_000
            answer, code = await refused(server, account)
            assert (answer["t"], answer["code"], answer["retry"], code) == ("err", "unavailable", "backoff", 1012)
            assert answer["retry_after_ms"] > 0
            # Make before break: the old connection carries events until the new one stands.
            seq = await publish(server, account, task, count=1, size=10)
            assert (await first.until("ev"))["seq"] == seq
            await first.socket.close()
            await poll(lambda: len(server.realtime.connections) == 1)
            assert not draining.done()
            await second.socket.close()
            # Nobody is left: no need to wait for the window.
            await within(asyncio.wait({draining}))
            draining.result()


async def test_who_stays_is_closed_at_the_deadline(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:
        began = time.monotonic()
        draining = asyncio.create_task(drain(server.realtime, window_s=20, deadline_s=0.5))
        frame, _ = await goaway(peer)
        assert frame["deadline_ms"] <= 500
        closed = await peer.closed()
        assert (closed.code, closed.reason) == (1012, "restart")
        assert time.monotonic() - began >= 0.45
        await within(asyncio.wait({draining}))


async def test_the_window_is_the_end_of_it(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:
        closing = asyncio.create_task(peer.closed())
        began = time.monotonic()
        await drain(server.realtime, window_s=0.5, deadline_s=60)
        assert 0.4 <= time.monotonic() - began < 5
        assert (await closing).code == 1012
        assert next(frame for frame in peer.seen if frame["t"] == "goaway")["deadline_ms"] <= 500


async def test_they_are_asked_one_after_the_other(serve_with: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "PER_SECOND", 10)
    async with serve_with() as server, server.sign_up() as account:
        async with (
            server.join(account) as a,
            server.join(account) as b,
            server.join(account) as c,
            server.join(account) as d,
        ):
            peers = (a, b, c, d)
            asked = [asyncio.create_task(goaway(peer)) for peer in peers]
            draining = asyncio.create_task(drain(server.realtime, window_s=20, deadline_s=5))
            moments = sorted(moment for _, moment in await asyncio.gather(*asked))
            # A tenth of a second apart; a busy machine may join two of them, not all.
            assert moments[-1] - moments[0] >= 0.25
            for peer in peers:
                await peer.socket.close()
            await within(asyncio.wait({draining}))


async def test_few_are_not_kept_for_the_whole_window(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        async with server.join(account) as a, server.join(account) as b, server.join(account) as c:
            draining = asyncio.create_task(drain(server.realtime, window_s=60, deadline_s=5))
            began = time.monotonic()
            await asyncio.gather(*(goaway(peer) for peer in (a, b, c)))
            assert time.monotonic() - began < 2
            for peer in (a, b, c):
                await peer.socket.close()
            await within(asyncio.wait({draining}))


async def test_nobody_here_is_nothing_to_wait_for(serve_with: Serve) -> None:
    async with serve_with() as server:
        await within(asyncio.wait({asyncio.create_task(drain(server.realtime, window_s=60, deadline_s=5))}))


async def test_a_turn_that_is_not_over_says_to_come_back(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        made = await account.http.post("/api/v1/conversations", json={})
        path = f"/api/v1/conversations/{made.json()['data']['id']}/messages"
        accept = {"Accept": "text/event-stream"}
        async with account.http.stream("POST", path, json={"text": "repeat 500 word"}, headers=accept) as response:
            events = Events(response)
            await within(events.next())
            draining = asyncio.create_task(drain(server.realtime, window_s=20, deadline_s=0.3))
            rest = await within(events.rest())
            name, _, frame = rest[-1]
            assert (name, frame["code"], frame["retry"]) == ("unsubbed", "unavailable", "now")
            assert not any(name.startswith("reply.completed") for name, _, _ in rest)
        await within(asyncio.wait({draining}))
        server.app.state.chat.generator.stop()


async def test_a_stream_ends_and_says_to_come_back(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        async with account.http.stream("GET", "/api/v1/channels/tasks/events") as response:
            events = Events(response)
            await within(events.next())
            draining = asyncio.create_task(drain(server.realtime, window_s=20, deadline_s=0.3))
            rest = await within(events.rest())
            assert [(name, frame["t"], frame["code"], frame["retry"]) for name, _, frame in rest] == [
                ("unsubbed", "unsubbed", "unavailable", "now")
            ]
            await within(asyncio.wait({draining}))
        answer = await within(account.http.get("/api/v1/channels/tasks/events"))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        # Requests are still served: what runs may end.
        assert (await account.http.get("/api/v1/tasks")).status_code == 200


async def test_who_waits_in_line_when_it_begins_is_sent_away(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_at_once": 1}) as server, server.sign_up() as account:
        turn = await server.realtime.admission.wait()
        waiting = asyncio.create_task(refused(server, account))
        await poll(lambda: server.realtime.admission.waiting == 1)
        await drain(server.realtime, window_s=5, deadline_s=1)
        turn.release()
        answer, code = await waiting
        assert (answer["code"], code) == ("unavailable", 1012)


async def test_who_is_being_verified_when_it_begins_is_sent_away_too(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        verifying = slow(server)
        coming = asyncio.create_task(refused(server, account))
        await poll(lambda: verifying.asked == 1)
        await drain(server.realtime, window_s=5, deadline_s=1)
        verifying.open.set()
        answer, code = await coming
        assert (answer["code"], code) == ("unavailable", 1012)


async def test_a_process_that_stops_is_not_ready(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        assert (await account.http.get("/health/ready")).status_code == 200
        server.app.state.draining = True
        answer = await account.http.get("/health/ready")
        assert (answer.status_code, answer.json()["data"]["status"]) == (503, "not_ready")
        assert "draining" in answer.json()["data"]["checks"]
        assert (await account.http.get("/health/live")).status_code == 200
