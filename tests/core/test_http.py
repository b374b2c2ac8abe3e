import asyncio
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.core.http import chunk_reader, create_http_client

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """Serve each connection with `answer`, which has the head of the request before it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def replying(head: str) -> tuple[Answer, list[str]]:
    seen: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        writer.write(f"{head}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())

    return answer, seen


async def test_more_streams_than_aiohttps_hundred_run_at_once() -> None:
    async with FakeProvider() as provider, create_http_client() as http:
        body = {"stream": True, "messages": [{"role": "user", "content": "deltas=1000 fail=stall_at:1"}]}

        async def opened() -> httpx.Response:
            request = http.build_request("POST", f"{provider.url}/v1/chat/completions", json=body)
            response = await http.send(request, stream=True)
            assert await chunk_reader(response)()
            return response

        async with asyncio.timeout(10):
            responses = await asyncio.gather(*(opened() for _ in range(400)))
        assert len(provider.connections) == 400
        for response in responses:
            await response.aclose()


async def test_redirects_are_not_followed() -> None:
    answer, seen = replying("HTTP/1.1 302 Found\r\nlocation: /elsewhere")
    async with serving(answer) as url, create_http_client() as http:
        assert (await http.get(url)).status_code == 302
    assert len(seen) == 1


async def test_no_cookie_is_kept() -> None:
    answer, seen = replying("HTTP/1.1 200 OK\r\nset-cookie: session=secret; path=/")
    async with serving(answer) as url, create_http_client() as http:
        await http.get(url)
        await http.get(url)
    assert len(seen) == 2
    assert not any("secret" in head for head in seen)


async def test_a_dropped_connection_is_not_called_a_timeout() -> None:
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with serving(drop) as url, create_http_client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(url)


@pytest.mark.parametrize("head", ["nonsense", "HTTP/1.1 200 OK\r\ncontent-length: x"])
async def test_an_answer_that_is_not_http_is_an_httpx_error(head: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{head}\r\n\r\n".encode())

    async with serving(answer) as url, create_http_client() as http:
        with pytest.raises(httpx.HTTPError):
            await http.get(url)


async def test_a_body_that_breaks_off_is_a_read_error_in_both_ways_of_reading() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
        await writer.drain()

    async with serving(answer) as url, create_http_client() as http:
        with pytest.raises(httpx.ReadError):
            await http.get(url)
        async with http.stream("GET", url) as response:
            read = chunk_reader(response)
            assert await read() == b"abc"
            with pytest.raises(httpx.ReadError):
                await read()


async def test_a_closed_port_is_a_connect_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with create_http_client() as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"http://127.0.0.1:{closed.getsockname()[1]}")


async def test_silence_is_a_read_timeout() -> None:
    release = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await release.wait()

    async with serving(wait) as url, create_http_client(read_timeout_s=0.1) as http:
        with pytest.raises(httpx.TimeoutException):
            await http.get(url)
        release.set()


async def test_closing_leaves_nothing_open() -> None:
    answer, _ = replying("HTTP/1.1 200 OK")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with serving(answer) as url:
            http = create_http_client()
            await http.get(url)
            await http.aclose()
            unused = create_http_client()
            await unused.aclose()
        del http, unused
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


async def test_a_large_body_arrives_whole_and_in_pieces() -> None:
    body, arrived = bytes(range(256)) * 12_000, bytearray()  # 3 MB

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert f"content-length: {len(body)}\r\n" in head
        assert "transfer-encoding" not in head
        arrived.extend(await reader.readexactly(len(body)))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    async with serving(answer) as url, create_http_client() as http:
        # aiohttp warns of a large body in one piece, and warnings are errors here.
        assert (await http.post(url, content=body)).status_code == 200
    assert arrived == body
