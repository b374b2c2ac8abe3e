"""Clients that take their time before they have asked for anything."""

import asyncio
from typing import Any

import pytest

from parley.core.http_protocol import RequestProtocol
from tests.realtime.conftest import Serve, serve_with

__all__ = ["serve_with"]

HEAD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
UPGRADE = b"GET /api/v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestProtocol, "headers_timeout_s", 0.4)


async def dribble(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write a few bytes, again and again, and never the end."""
    try:
        while True:
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.01)  # the pace is what is tested
    except OSError:
        pass


@pytest.mark.parametrize("head", [HEAD, UPGRADE], ids=["a request", "a socket"])
async def test_headers_that_never_end_are_408(serve_with: Serve, head: bytes) -> None:
    async with serve_with() as server, server.bytes() as (reader, writer):
        writer.write(head)
        task = asyncio.create_task(dribble(writer, b"X-Slow: y\r\n"))
        async with asyncio.timeout(10):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"request_timeout"' in answer
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_never_says_a_word_is_cut_off(serve_with: Serve) -> None:
    async with serve_with() as server, server.bytes() as (reader, _):
        async with asyncio.timeout(10):
            assert await reader.read() == b""


async def test_the_next_request_has_its_own_time(serve_with: Serve) -> None:
    async with serve_with() as server, server.bytes() as (reader, writer):
        for _ in range(3):
            writer.write(HEAD + b"\r\n")
            async with asyncio.timeout(10):
                answer = await reader.readuntil(b'"live"')
            assert b" 200 " in answer
            await asyncio.sleep(0.25)  # idle between requests is no fault
        writer.write(HEAD)
        async with asyncio.timeout(10):
            assert b" 408 " in await reader.read()


async def test_an_answer_and_a_socket_may_take_longer(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account, server.join(account) as peer:
        async with account.http.stream("GET", "/api/v1/channels/tasks/events") as response:
            lines: Any = response.aiter_lines()
            async with asyncio.timeout(5):
                assert await anext(lines) == ": parley.v1"
            await asyncio.sleep(0.6)  # longer than headers may
            await peer.alive()
            await account.http.post("/api/v1/tasks", json={"title": "milk"})
            async with asyncio.timeout(5):
                while "task.created" not in await anext(lines):
                    pass
