"""`resume`: how long after it begins to connect a client has the first event that it had missed."""

import asyncio
import random
import time
from dataclasses import asdict
from typing import Any

import orjson

from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask
from benchmarks.replies import Faults, open_followers
from benchmarks.servers import parley, provider
from benchmarks.sockets import Socket, hello

_RUNNING = 50
_DELTAS = 40
_PAUSE_S = 0.03


def measure(*, full: bool) -> list[Measurement]:
    """Resume finished replies from memory and from PostgreSQL while others stream."""
    count = 400 if full else 120
    with provider() as source, parley(provider_port=source.port) as server:
        found = ask(
            "resume",
            {
                "port": server.port,
                "watched": server.conversations_of_many(count, each=20, name="watched"),
                "unwatched": server.conversations_of_many(count, each=20, name="unwatched"),
                "running": server.conversations_of_many(_RUNNING, each=10, name="running"),
            },
            timeout_s=240,
        )
    memory, database = found["memory_ms"], found["database_ms"]
    faults = Faults(**found["faults"])
    return [
        Measurement(
            name=f"resume, beside {_RUNNING} replies at 25 deltas/s",
            method=(
                f"{count} reconnections each, one after the other: from the TCP connect, over the upgrade and a hello with "
                "token and position, to the first replayed event. From memory: the channel was watched a moment ago. From "
                "PostgreSQL: nobody had ever subscribed to it."
            ),
            figures=[
                Figure(name="from memory p50", value=percentile(memory, 0.5), unit="ms"),
                Figure(name="from memory p95", value=percentile(memory, 0.95), unit="ms", most=50),
                Figure(name="from PostgreSQL p50", value=percentile(database, 0.5), unit="ms"),
                Figure(name="from PostgreSQL p95", value=percentile(database, 0.95), unit="ms", most=50),
                Figure(name="lost, doubled, reordered, wrong", value=faults.total, unit="events", most=0,
                       note=f"{found['wrong']} resumes did not begin with the event after the position"),
            ],
        )
    ]  # fmt: skip


_SINCE = 4


async def _resume(port: int, token: str, conversation: str) -> tuple[float, bool]:
    """Reconnect; returns how long it took in ms and whether the first event was the one after the position."""
    loop = asyncio.get_running_loop()
    first: asyncio.Future[tuple[int, dict[str, Any]]] = loop.create_future()

    def heard(frame: dict[str, Any], now: int) -> None:
        if frame["t"] in {"ev", "snap", "err"} and not first.done():
            first.set_result((now, frame))

    began = time.monotonic_ns()
    socket = await Socket.open(port, hello(token, f"conversation:{conversation}", since=_SINCE), heard)
    async with asyncio.timeout(10):
        now, frame = await first
    socket.drop()
    return (now - began) / 1e6, frame["t"] == "ev" and frame.get("from", frame["seq"]) == _SINCE + 1


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Make replies, watched and unwatched, then come back to them."""
    faults = Faults()
    port = specification["port"]
    await _make_unwatched(port, specification["unwatched"])
    watchers = await open_followers(port, specification["watched"], faults)
    for follower in watchers:
        follower.send("rate=200", deltas=_DELTAS)
        await asyncio.sleep(0.02)
    async with asyncio.timeout(30):
        await asyncio.gather(*(one.ended for one in watchers))
    for follower in watchers:
        follower.close()
    running = await open_followers(port, specification["running"], faults)
    pairs = len(watchers)
    for follower in running:
        follower.send(f"rate=25 ttft={random.random() / 25:.4f}", deltas=int(25 * (pairs * 0.3 + 10)))
        await asyncio.sleep(0.02)
    await asyncio.gather(*(one.first for one in running))
    took: dict[str, list[float]] = {"watched": [], "unwatched": []}
    wrong = 0
    for number in range(pairs):
        for kind, times in took.items():
            milliseconds, right = await _resume(port, *specification[kind][number])
            times.append(milliseconds)
            wrong += not right
            await asyncio.sleep(random.uniform(0, 2 * _PAUSE_S))
    faults.failed += sum(one.ended.done() for one in running) + wrong
    counted = asdict(faults)
    for follower in running:
        follower.close()
    return {"faults": counted, "wrong": wrong, "memory_ms": took["watched"], "database_ms": took["unwatched"]}


async def _make_unwatched(port: int, conversations: list[tuple[str, str]]) -> None:
    """Have replies written in channels that nobody subscribes to; returns when the last one has ended."""
    for number, (token, id) in enumerate(conversations):
        status = await _post(
            port, token, f"conversations/{id}/messages", {"text": f"rate=200 deltas={_DELTAS}"}, number
        )
        if status != 202:
            raise RuntimeError(f"a message was answered with {status}")
        await asyncio.sleep(0.01)
    await asyncio.sleep(_DELTAS / 200 + 2)


async def _post(port: int, token: str, path: str, body: dict[str, Any], key: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = orjson.dumps(body)
    writer.write(
        f"POST /api/v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n"
        f"Idempotency-Key: 00000000-0000-4000-8000-{key:012}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1])
