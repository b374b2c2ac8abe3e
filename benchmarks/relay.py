"""`relay`: what it costs to carry a delta from the provider's socket to the client's, durably, and how long it takes."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.completions import CompletionFollower
from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask, cpu_s, machine_cpu_s, postgres_cpu_s
from benchmarks.replies import Faults, Follower, open_followers
from benchmarks.servers import parley, provider
from benchmarks.sockets import ProviderStream

RATE = 25
_SENDS_PER_S = 50
_REPLIES_PER_USER = 20
_WINDOW_S = 8.0
_DIRECT_S = 3.0


def measure(*, full: bool) -> list[Measurement]:
    """Run each number of replies on a fresh server."""
    return [_one(replies) for replies in ((50, 100, 200, 400, 800) if full else (100, 400))]


def _one(replies: int) -> Measurement:
    with provider() as source, parley(provider_port=source.port) as server:
        found = ask(
            "relay",
            {
                "port": server.port,
                "provider": source.port,
                "pids": {"server": server.pid, "postmaster": server.postmaster, "provider": source.pid},
                "conversations": server.conversations_of_many(replies, each=_REPLIES_PER_USER),
            },
            timeout_s=120,
        )
    faults = Faults(**found["faults"])
    cpu = found["cpu_us"]
    name, million = f"{replies} replies", replies == 400
    wide = replies == 800
    return Measurement(
        name=f"relay, {replies} replies at {RATE} deltas/s",
        method=(
            f"One socket and one conversation per reply, {_REPLIES_PER_USER} to a user, sends at {_SENDS_PER_S}/s, then "
            f"{_WINDOW_S:g} s with all of them running. CPU: utime + stime of the server's process, and of all of "
            "PostgreSQL's, by the deltas that came in the window. Latency: the provider's stamp in a delta to its frame "
            "read by the client. Every reply is checked by seq, offset, len and sha256."
        ),
        figures=[
            Figure(name=f"{name}: server CPU per delta", value=cpu["server"], unit="µs", most=45 if million else None,
                   note=f"{found['busy']['server']:.2f} cores, {found['frames_per_delta']:.2f} frames per delta"),
            Figure(name=f"{name}: PostgreSQL CPU per delta", value=cpu["postmaster"], unit="µs"),
            Figure(name=f"{name}: provider to client p50", value=found["p50_ms"], unit="ms",
                   note=f"direct {found['direct_p50_ms']:.2f} ms"),
            Figure(name=f"{name}: provider to client p99", value=found["p99_ms"], unit="ms", most=100 if wide else None,
                   note=f"direct {found['direct_p99_ms']:.2f} ms"),
            Figure(name=f"{name}: chat.send acknowledged p95", value=found["ok_p95_ms"], unit="ms",
                   note=f"p50 {found['ok_p50_ms']:.1f} ms, while replies run"),
            Figure(name=f"{name}: lost, doubled, reordered, wrong", value=faults.total, unit="events", most=0,
                   note=f"of {found['deltas']:,} deltas; {faults}"),
            Figure(name=f"{name}: machine, others in the window", value=found["busy"]["others"], unit="cores",
                   note="client {client:.2f}, provider {provider:.2f}, PostgreSQL {postmaster:.2f} cores".format(
                       **found["busy"])),
        ],
    )  # fmt: skip


class Clock:
    """CPU times of all that takes part."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.before = self._read()

    def _read(self) -> dict[str, float]:
        readings = {name: (postgres_cpu_s if name == "postmaster" else cpu_s)(pid) for name, pid in self._pids.items()}
        return {**readings, "client": time.process_time(), "machine": machine_cpu_s(), "wall": time.monotonic()}

    def spent(self) -> dict[str, float]:
        after = self._read()
        return {name: after[name] - before for name, before in self.before.items()}


class Latencies:
    """How old deltas are when they arrive while somebody looks, in nanoseconds."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.counting = False

    def arrived(self, stamps: list[int], now: int) -> None:
        """Take the stamps of what has come."""
        if self.counting:
            self.values.extend([now - stamp for stamp in stamps])


async def window(
    streams: Sequence[Follower | CompletionFollower], pids: dict[str, int], latencies: Latencies, *, seconds: float
) -> dict[str, Any]:
    """Look at a time in which all streams run, then wait for their ends; return what it cost and how long it took."""
    clock = Clock(pids)
    before, frames = sum(one.deltas for one in streams), sum(one.frames for one in streams)
    latencies.counting = True
    await asyncio.sleep(seconds)
    latencies.counting = False
    spent = clock.spent()
    in_window = sum(one.deltas for one in streams) - before
    frames = sum(one.frames for one in streams) - frames
    wall = spent.pop("wall")
    others = spent.pop("machine") - sum(spent.values())
    async with asyncio.timeout(30):
        await asyncio.gather(*(one.ended for one in streams))
    return {
        "cpu_us": {name: value / in_window * 1e6 for name, value in spent.items()},
        "busy": {name: value / wall for name, value in {**spent, "others": max(0.0, others)}.items()},
        "frames_per_delta": frames / in_window,
        "p50_ms": percentile(latencies.values, 0.5) / 1e6,
        "p99_ms": percentile(latencies.values, 0.99) / 1e6,
    }


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Stream all replies and look at a window in which all run."""
    faults, latencies = Faults(), Latencies()
    followers = await open_followers(specification["port"], specification["conversations"], faults, latencies.arrived)
    ramp_s = len(followers) / _SENDS_PER_S
    deltas = int(RATE * (ramp_s + _WINDOW_S + 2))
    began = time.monotonic()
    for number, follower in enumerate(followers):
        await asyncio.sleep(began + number / _SENDS_PER_S - time.monotonic())
        # Sent at an even pace, so without this the streams would move in step.
        follower.send(f"rate={RATE} ttft={random.random() / RATE:.4f}", deltas=deltas)
    await asyncio.gather(*(one.first for one in followers))
    oks = [one.ok.result() / 1e6 for one in followers]

    seen = await window(followers, specification["pids"], latencies, seconds=_WINDOW_S)
    for one in followers:
        one.close()
    straight = await direct(specification["provider"], len(followers))
    return {
        "faults": asdict(faults),
        "deltas": deltas * len(followers),
        **seen,
        "direct_p50_ms": percentile(straight, 0.5),
        "direct_p99_ms": percentile(straight, 0.99),
        "ok_p50_ms": percentile(oks, 0.5),
        "ok_p95_ms": percentile(oks, 0.95),
    }


async def direct(port: int, count: int) -> list[float]:
    """Read as many streams from the provider itself."""
    streams = [await ProviderStream.open(port) for _ in range(count)]
    ends = []
    for stream in streams:
        plan = f"rate={RATE} ttft={random.random():.4f} stamp=1 deltas={int(RATE * _DIRECT_S)}"
        ends.append(stream.ask(plan)[1])
    async with asyncio.timeout(30):
        await asyncio.gather(*ends)
    for stream in streams:
        stream.close()
    return [(now - stamp) / 1e6 for stream in streams for stamp, now in stream.stamps]
