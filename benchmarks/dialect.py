"""`dialect`: what it costs to carry a delta over OpenAI's dialect, and how long it takes, beside the provider itself."""

import asyncio
import random
import time
from dataclasses import asdict
from typing import Any

from benchmarks.completions import open_completions
from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask
from benchmarks.relay import RATE, Latencies, direct, window
from benchmarks.replies import Faults
from benchmarks.servers import parley, provider

_ASKED_PER_S = 50
_PER_USER = 20
_WINDOW_S = 8.0


def measure(*, full: bool) -> list[Measurement]:
    """Run each number of streams on a fresh server."""
    return [_one(streams) for streams in ((1, 50, 200, 400, 800) if full else (50, 200, 400))]


def _one(streams: int) -> Measurement:
    with provider() as source, parley(provider_port=source.port) as server:
        found = ask(
            "dialect",
            {
                "port": server.port,
                "provider": source.port,
                "pids": {"server": server.pid, "postmaster": server.postmaster, "provider": source.pid},
                "keys": server.keys_of_many(streams, each=_PER_USER),
            },
            timeout_s=120,
        )
    faults = Faults(**found["faults"])
    cpu, name = found["cpu_us"], f"{streams} streams"
    return Measurement(
        name=f"dialect, {streams} streams at {RATE} deltas/s",
        method=(
            f"One connection per stream, {_PER_USER} to a user, asked at {_ASKED_PER_S}/s, then {_WINDOW_S:g} s with all "
            "of them running. CPU: utime + stime of the server's process, and of all of PostgreSQL's, by the deltas that "
            "came in the window. Latency: the provider's stamp in a delta to its event read by the client. Nothing is "
            "kept of these answers but their row in the ledger."
        ),
        figures=[
            Figure(name=f"{name}: server CPU per delta", value=cpu["server"], unit="µs",
                   note=f"{found['busy']['server']:.2f} cores, {found['frames_per_delta']:.2f} writes per delta"),
            Figure(name=f"{name}: PostgreSQL CPU per delta", value=cpu["postmaster"], unit="µs"),
            Figure(name=f"{name}: provider to client p50", value=found["p50_ms"], unit="ms",
                   note=f"direct {found['direct_p50_ms']:.2f} ms"),
            Figure(name=f"{name}: provider to client p99", value=found["p99_ms"], unit="ms",
                   note=f"direct {found['direct_p99_ms']:.2f} ms"),
            Figure(name=f"{name}: lost, doubled, reordered, wrong", value=faults.total, unit="events", most=0,
                   note=f"of {found['deltas']:,} deltas; {faults}"),
            Figure(name=f"{name}: machine, others in the window", value=found["busy"]["others"], unit="cores",
                   note="client {client:.2f}, provider {provider:.2f}, PostgreSQL {postmaster:.2f} cores".format(
                       **found["busy"])),
        ],
    )  # fmt: skip


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Run all streams and look at a window in which all run."""
    faults, latencies = Faults(), Latencies()
    followers = await open_completions(specification["port"], specification["keys"], faults, latencies.arrived)
    deltas = int(RATE * (len(followers) / _ASKED_PER_S + _WINDOW_S + 2))
    began = time.monotonic()
    for number, follower in enumerate(followers):
        await asyncio.sleep(began + number / _ASKED_PER_S - time.monotonic())
        follower.send(f"rate={RATE} ttft={random.random() / RATE:.4f}", deltas=deltas)
    async with asyncio.timeout(30):
        await asyncio.gather(*(one.first for one in followers))

    seen = await window(followers, specification["pids"], latencies, seconds=_WINDOW_S)
    counted = asdict(faults)
    for one in followers:
        one.close()
    straight = await direct(specification["provider"], len(followers))
    return {
        "faults": counted,
        "deltas": deltas * len(followers),
        **seen,
        "direct_p50_ms": percentile(straight, 0.5),
        "direct_p99_ms": percentile(straight, 0.99),
    }
