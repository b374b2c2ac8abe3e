"""`idle`: the memory that a connection costs the server while nothing happens on it."""

import asyncio
import time
from typing import Any

from benchmarks.figures import Figure, Measurement
from benchmarks.processes import ask, cpu_s, raise_file_limit, resident_bytes
from benchmarks.servers import parley
from benchmarks.sockets import Socket, hello

_WARM_UP = 100
_SETTLE_S = 3.0


def measure(*, full: bool) -> list[Measurement]:
    """Open connections, each with one subscription to a conversation of its own."""
    # Some files are left for the rest of a process.
    count = min(10_000 if full else 2_000, raise_file_limit() - _WARM_UP - 500)
    with parley() as server:
        conversations = server.conversations_of_many(count + _WARM_UP, each=100)
        found = ask(
            "idle", {"port": server.port, "pid": server.pid, "conversations": conversations}, timeout_s=120 + count / 50
        )
    return [
        Measurement(
            name=f"idle, {count:,} connections",
            method=(
                f"Growth of the server process's resident memory from {_WARM_UP} connections to {count:,} more, by their "
                "number; each has said hello and follows one conversation of its own, 100 to a user. The kernel's buffers are "
                "not in it."
            ),
            figures=[
                Figure(name="memory per idle connection", value=found["bytes"] / 1024, unit="KB", most=50),
                Figure(name="time to connect them", value=found["seconds"], unit="s",
                       note=f"{count / found['seconds']:.0f} connections/s from one client"),
                Figure(name="server CPU while idle", value=found["cpu"] * 100, unit="% of a core"),
                Figure(name="connections that were closed", value=found["closed"], unit="connections", most=0),
            ],
        )
    ]  # fmt: skip


async def _open(port: int, conversations: list[tuple[str, str]]) -> list[Socket]:
    async def one(token: str, id: str) -> Socket:
        live: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def heard(frame: dict[str, Any], _: int) -> None:
            if frame["t"] in {"live", "err"} and not live.done():
                live.set_result(None)

        socket = await Socket.open(port, hello(token, f"conversation:{id}"), heard)
        async with asyncio.timeout(30):
            await socket.welcome
            await live
        return socket

    made: list[Socket] = []
    for start in range(0, len(conversations), 50):
        made += await asyncio.gather(*(one(*each) for each in conversations[start : start + 50]))
    return made


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Connect, wait, look."""
    port, pid, conversations = specification["port"], specification["pid"], specification["conversations"]
    sockets = await _open(port, conversations[:_WARM_UP])
    await asyncio.sleep(_SETTLE_S)
    before = resident_bytes(pid)
    began = time.monotonic()
    sockets += await _open(port, conversations[_WARM_UP:])
    seconds = time.monotonic() - began
    cpu = cpu_s(pid)
    await asyncio.sleep(_SETTLE_S)
    grown = resident_bytes(pid) - before
    busy = (cpu_s(pid) - cpu) / _SETTLE_S
    closed = sum(socket.closed.done() for socket in sockets)
    for socket in sockets:
        socket.drop()
    return {"bytes": grown / (len(sockets) - _WARM_UP), "seconds": seconds, "cpu": busy, "closed": closed}
