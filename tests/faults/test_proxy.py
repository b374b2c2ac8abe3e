"""The network that fails on purpose fails in the way it says, and only then."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults.proxy import FaultProxy, fault_proxy

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except OSError:
        writer.transport.abort()
    finally:
        writer.close()


@asynccontextmanager
async def echo(path: Path | None = None) -> AsyncIterator[FaultProxy]:
    """A proxy before something that says what it hears."""
    if path is None:
        server = await asyncio.start_server(_echo, "127.0.0.1", 0)
        far: int | Path = server.sockets[0].getsockname()[1]
    else:
        server = await asyncio.start_unix_server(_echo, path)
        far = path
    async with fault_proxy(far) as proxy:
        yield proxy
    server.close()


@asynccontextmanager
async def through(proxy: FaultProxy) -> AsyncIterator[Ends]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def said(ends: Ends, text: bytes) -> bytes:
    """Say something; return as much of what comes back."""
    ends[1].write(text)
    async with asyncio.timeout(5):
        return await ends[0].readexactly(len(text))


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_nothing_is_done_to_what_goes_through(unix: bool, tmp_path: Path) -> None:
    async with echo(tmp_path / "far" if unix else None) as proxy, through(proxy) as one, through(proxy) as two:
        assert await said(one, b"a" * 100_000) == b"a" * 100_000
        assert await said(two, b"hello") == b"hello"
        assert (proxy.open, proxy.accepted) == (2, 2)
        assert proxy.passed("up") == proxy.passed("down") == 100_005
        one[1].write_eof()
        assert await one[0].read() == b"", "an end goes through too"


async def test_a_reset_and_an_end() -> None:
    async with echo() as proxy, through(proxy) as one:
        assert await said(one, b"hello") == b"hello"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await one[0].readexactly(1)
        async with through(proxy) as two:
            assert await said(two, b"hello") == b"hello"
            proxy.finish("down")
            assert await two[0].read() == b""


async def test_a_cut_after_so_many_bytes() -> None:
    async with echo() as proxy, through(proxy) as one:
        proxy.down.cut_after = 7
        one[1].write(b"0123456789")
        got = b""
        with pytest.raises(ConnectionResetError):
            while True:
                got += await one[0].readexactly(1)
        assert len(got) <= 7
        assert b"0123456789".startswith(got)
        proxy.heal()
        async with through(proxy) as two:
            assert await said(two, b"0123456789") == b"0123456789"


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_black_hole_holds_everything_and_gives_it_back(direction: str) -> None:
    async with echo() as proxy, through(proxy) as one:
        assert await said(one, b"hello") == b"hello"
        faults = proxy.up if direction == "up" else proxy.down
        faults.black_hole()
        one[1].write(b"again")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await one[0].readexactly(1)
        faults.heal()
        assert await one[0].readexactly(5) == b"again"


async def test_delay_and_width() -> None:
    async with echo() as proxy, through(proxy) as one:
        proxy.up.delay_s = proxy.down.delay_s = 0.1
        began = time.monotonic()
        await said(one, b"hello")
        assert time.monotonic() - began >= 0.2
        proxy.heal()
        proxy.down.bytes_per_s = 50_000
        began = time.monotonic()
        await said(one, b"x" * 20_000)
        assert time.monotonic() - began >= 0.35
        proxy.heal()
        proxy.refuse = True
        async with through(proxy) as two:
            with pytest.raises(ConnectionResetError):
                await said(two, b"hello")
                await two[0].readexactly(1)
