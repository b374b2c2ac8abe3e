"""Who gets in and how fast: the line, its end, and who may not even stand in it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from parley.core.errors import Unauthenticated
from parley.core.scope import Credential
from parley.core.settings import RealtimeSettings
from parley.realtime.admission import Admission, Busy
from tests.conftest import Account
from tests.realtime.conftest import LiveServer, Peer, Serve, conversation_of, poll
from tests.realtime.raw import masked, raw_handshake, resident_bytes
from tests.realtime.steps import Events, SlowAuthenticator, fill, slow, within


async def hello(stack: AsyncExitStack, server: LiveServer, account: Account) -> Peer:
    peer = await stack.enter_async_context(server.open())
    await peer.send("hello", v=1, auth={"token": account.access_token})
    return peer


async def test_the_line_moves_in_order_and_a_few_at_a_time(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_at_once": 2}) as server, server.sign_up() as account:
        verifying = slow(server)
        async with AsyncExitStack() as stack:
            peers = [await hello(stack, server, account) for _ in range(12)]
            await poll(lambda: server.realtime.admission.waiting == 10)
            assert (verifying.asked, verifying.at_once) == (2, 2)
            # Requests do not wait behind them.
            assert (await account.http.get("/api/v1/me")).status_code == 200
            verifying.open.set()
            for peer in peers:
                assert (await peer.read())["t"] == "welcome"
            assert verifying.most == 2
            assert server.realtime.admission.waiting == 0


async def test_a_full_line_is_busy_and_1013(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_at_once": 1, "hello_waiting": 1}) as server, server.sign_up() as account:
        verifying = slow(server)
        async with AsyncExitStack() as stack:
            first = await hello(stack, server, account)
            await poll(lambda: verifying.asked == 1)
            second = await hello(stack, server, account)
            await poll(lambda: server.realtime.admission.waiting == 1)
            third = await hello(stack, server, account)
            answer = await third.read()
            assert (answer["t"], answer["code"], answer["retry"]) == ("err", "busy", "backoff")
            assert 500 <= answer["retry_after_ms"] <= 10_000
            assert await third.code() == 1013
            answers = await asyncio.gather(*(account.http.get("/api/v1/tasks") for _ in range(10)))
            assert {answer.status_code for answer in answers} == {200}
            verifying.open.set()
            for peer in (first, second):
                assert (await peer.read())["t"] == "welcome"
            # There is room again.
            again = await hello(stack, server, account)
            assert (await again.read())["t"] == "welcome"


async def test_who_waited_too_long_is_told_to_come_back(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_at_once": 1, "hello_wait_s": 0.2}) as server, server.sign_up() as account:
        verifying = slow(server)
        async with AsyncExitStack() as stack:
            first = await hello(stack, server, account)
            await poll(lambda: verifying.asked == 1)
            second = await hello(stack, server, account)
            assert (await second.read())["code"] == "busy"
            assert await second.code() == 1013
            verifying.open.set()
            assert (await first.read())["t"] == "welcome"


async def test_who_is_refused_and_who_leaves_give_their_turn_back(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_at_once": 1}) as server, server.sign_up() as account:
        for _ in range(3):
            async with server.open() as peer:
                await peer.send("hello", v=1, auth={"token": "x"})
                assert await peer.code() == 4401
        verifying = slow(server)
        async with server.open() as peer:
            await peer.send("hello", v=1, auth={"token": account.access_token})
            await poll(lambda: verifying.asked == 1)
            peer.socket.transport.abort()
        verifying.open.set()
        async with server.join(account) as peer:
            await peer.alive()
        assert server.realtime.admission._turns._value == 1


async def test_who_has_gone_while_waiting_is_not_looked_at(serve_with: Serve) -> None:
    """After a storm the line would be full of them, and those who came again would wait behind their former selves."""
    async with serve_with(realtime={"hello_at_once": 1}) as server, server.sign_up() as account:
        verifying = slow(server)
        async with AsyncExitStack() as stack:
            first = await hello(stack, server, account)
            await poll(lambda: verifying.asked == 1)
            gone = [await hello(stack, server, account) for _ in range(10)]
            await poll(lambda: server.realtime.admission.waiting == 10)
            for peer in gone:
                peer.socket.transport.abort()
            last = await hello(stack, server, account)
            await poll(lambda: server.realtime.admission.waiting == 11)
            verifying.open.set()
            assert (await first.read())["t"] == "welcome"
            assert (await last.read())["t"] == "welcome"
        assert verifying.asked == 2


async def test_a_newcomer_who_does_not_read_holds_up_nobody(serve_with: Serve) -> None:
    async with serve_with(realtime={"hello_at_once": 1}) as server, server.sign_up() as account:
        channels = [await conversation_of(account) for _ in range(4)]
        for channel in channels:
            await fill(server, account, channel, 50, json.dumps([{"type": "text", "text": "x" * 32_000}]))
        async with AsyncExitStack() as stack:
            for _ in range(3):
                _, writer = await stack.enter_async_context(raw_handshake(server))
                subs = [{"ch": channel} for channel in channels]
                text = json.dumps({"t": "hello", "v": 1, "auth": {"token": account.access_token}, "subs": subs})
                writer.write(masked(1, text.encode()))
            await poll(lambda: len(server.realtime.connections) == 3)
            async with server.join(account) as peer:
                await peer.sub("tasks")
            assert len(server.realtime.connections) >= 3


async def test_streams_count_as_connections_of_a_user(serve_with: Serve) -> None:
    async with serve_with(realtime={"connections_per_user": 3}) as server, AsyncExitStack() as stack:
        account = await stack.enter_async_context(server.sign_up())
        other = await stack.enter_async_context(server.sign_up())
        path = "/api/v1/channels/tasks/events"
        # Held: a reader that is forgotten closes its response.
        held = [Events(await stack.enter_async_context(account.http.stream("GET", path))) for _ in range(2)]
        for events in held:
            await within(events.next())
        async with server.join(account) as peer:
            refused = await within(account.http.get(path))
            assert (refused.status_code, refused.json()["error"]) == (429, "rate_limited")
            assert int(refused.headers["retry-after"]) > 0
            async with server.open() as fourth:
                await fourth.send("hello", v=1, auth={"token": account.access_token})
                assert (await fourth.read())["code"] == "rate_limited"
                assert await fourth.code() == 4429
            async with other.http.stream("GET", path) as response:
                await within(Events(response).next())
            await peer.alive()
        # What ends is counted no more, whatever it was.
        await stack.aclose()
        await poll(lambda: not server.realtime.per_user)
        assert server.realtime.admission.places == 0


async def test_a_stream_that_is_not_found_or_not_read_is_not_counted(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account:
        assert (await account.http.get("/api/v1/channels/conversation:x/events")).status_code == 404
        async with httpx.AsyncClient(base_url=server.base, headers=account.http.headers) as client:
            async with client.stream("GET", "/api/v1/channels/tasks/events"):
                assert server.realtime.per_user == {account.user_id: 1}
        await poll(lambda: not server.realtime.per_user)
        # One that goes before it is answered.
        async with server.bytes() as (_, writer):
            bearer = f"Authorization: Bearer {account.access_token}\r\n\r\n"
            writer.write(f"GET /api/v1/channels/tasks/events HTTP/1.1\r\nHost: x\r\n{bearer}".encode())
            await writer.drain()
        await poll(lambda: not server.realtime.per_user)
        await poll(lambda: not server.realtime.streams)


async def test_a_full_process_refuses_streams_with_503_and_nothing_else(serve_with: Serve) -> None:
    async with serve_with(realtime={"connections": 1}) as server, server.sign_up() as account:
        async with server.join(account):
            answer = await within(account.http.get("/api/v1/channels/tasks/events"))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert (await account.http.get("/api/v1/me")).status_code == 200
            async with server.open() as peer:
                await peer.send("hello", v=1, auth={"token": account.access_token})
                assert (await peer.read())["code"] == "busy"
                assert await peer.code() == 1013


async def test_an_empty_line_needs_no_waiting() -> None:
    admission = Admission(RealtimeSettings(hello_at_once=1, hello_waiting=0))
    turn = await admission.wait()
    with pytest.raises(Busy):
        await admission.wait()
    turn.release()
    turn.release()
    await admission.wait()
    with pytest.raises(Busy):
        await admission.wait()


async def test_2000_clients_that_are_cut_at_once_all_come_back_and_requests_go_on(serve_with: Serve) -> None:
    count = 2000
    async with serve_with(realtime={"connections_per_user": count + 10}) as server, server.sign_up() as account:
        async with server.join(account):
            # What the first connection costs is not to be counted.
            before = resident_bytes()
        async with crowd(server, account, count) as (ask, tell):
            assert (await ask())["here"] == count
            assert len(server.realtime.connections) == count
            assert (resident_bytes() - before) / count < 60_000, "what an idle connection may cost"
            requests = asyncio.create_task(_ask_until_cancelled(account))
            tell()
            # How soon is measured by `benchmarks/storm.py`: a test has no quiet machine for it.
            assert (await ask())["here"] == count
            requests.cancel()
            codes = await requests
            assert set(codes) == {200}, "requests go on meanwhile"
            assert len(codes) >= 10
        await poll(lambda: not server.realtime.connections)


@asynccontextmanager
async def crowd(
    server: LiveServer, account: Account, count: int
) -> AsyncIterator[tuple[Callable[[], Awaitable[dict[str, Any]]], Callable[[], None]]]:
    """Run many clients in a process of their own; yields how to hear of them and how to cut them."""
    program = str(Path(__file__).with_name("crowd.py"))
    arguments = [str(server.settings.port), account.access_token, str(count)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    heard, told = process.stdout, process.stdin

    async def ask() -> dict[str, Any]:
        async with asyncio.timeout(180):
            found: dict[str, Any] = json.loads(await heard.readline())
        return found

    try:
        yield ask, lambda: told.write(b"\n")
    finally:
        process.kill()
        await process.wait()
        # Its pipe is closed in the loop's next turns; the loop may end before.
        process._transport.close()  # type: ignore[attr-defined]  # there is no public way


async def _ask_until_cancelled(account: Account) -> list[int]:
    codes: list[int] = []
    try:
        while True:
            codes.append((await account.http.get("/api/v1/tasks")).status_code)
    except asyncio.CancelledError:
        return codes


async def test_who_signs_out_while_being_let_in_does_not_stay(serve_with: Serve) -> None:
    """The news of a revocation finds only those who are in; who was verified just before it is looked at again."""
    async with serve_with() as server, server.sign_up() as account:
        inner = server.realtime.authenticator

        class SignsOutAfterwards(SlowAuthenticator):
            async def authenticate(self, token: str) -> Credential:
                found: Credential = await inner.authenticate(token)
                assert (await account.http.post("/api/v1/auth/signout")).status_code == 204
                with pytest.raises(Unauthenticated):
                    await inner.authenticate(token)
                return found

        server.realtime.authenticator = SignsOutAfterwards(inner)
        async with server.open() as peer:
            await peer.send("hello", v=1, auth={"token": account.access_token})
            assert await peer.code() == 4403
