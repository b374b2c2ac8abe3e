"""The measuring client of the dialect notices what is missing, out of order, or broken off."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict

import pytest

from benchmarks.completions import CompletionFollower, open_completions
from benchmarks.replies import Faults

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def delta(stamp: int) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%d|"}}]}\n\n' % stamp


def chunked(*pieces: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@asynccontextmanager
async def follower(answer: bytes, faults: Faults, *, split: int = 0) -> AsyncIterator[CompletionFollower]:
    """Connect to a server that answers so, in two parts if there is a split."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"stamp=1")
        writer.write(answer[: split or None])
        await writer.drain()
        if split:
            writer.write(answer[split:])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        (made,) = await open_completions(server.sockets[0].getsockname()[1], ["a key"], faults)
        made.send("rate=25", deltas=3)
        yield made


@pytest.mark.parametrize("split", [*range(1, 400, 13)])
async def test_a_whole_answer_has_no_fault_wherever_it_is_cut(split: int) -> None:
    faults = Faults()
    async with follower(chunked(delta(1), delta(2) + delta(3), DONE), faults, split=split) as one:
        async with asyncio.timeout(30):
            await one.ended

        assert (one.deltas, one.frames, faults.total) == (3, 3, 0)
        assert one.first.result()[1] == 1


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda: chunked(delta(1), delta(2), DONE), "lost"),
        (lambda: chunked(delta(1), delta(3), delta(2), DONE), "reordered"),
        (lambda: chunked(delta(1), b'data: {"error":{}}\n\n'), "failed"),
        (lambda: chunked(delta(1)), "failed"),
        (lambda: b"HTTP/1.1 429 Too Many Requests\r\n\r\n", "failed"),
    ],
)
async def test_faults_are_counted(answer: Callable[[], bytes], fault: str) -> None:
    faults = Faults()
    async with follower(answer(), faults) as one:
        await asyncio.wait([one.ended], timeout=30)

    assert {name: count for name, count in asdict(faults).items() if count} == {fault: 1}
