"""The connection itself (sections 2 and 5 of the protocol), against a real server on a real connection."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from parley.core import clock
from tests.conftest import Account
from tests.realtime.conftest import (
    LiveServer,
    Serve,
    poll,
)


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


async def test_the_server_says_1012_when_it_stops(serve_with: Serve) -> None:
    async with AsyncExitStack() as stack:
        async with serve_with() as server:
            account = await stack.enter_async_context(server.sign_up())
            peer = await stack.enter_async_context(server.join(account))
            task = asyncio.create_task(peer.code(within_s=20))
        assert await task == 1012
