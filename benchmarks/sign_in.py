"""`sign-in`: how many sign-ins a second, and how long the event loop is held up by them."""

import asyncio
import time
from typing import Any

import httpx

from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask, cpu_s
from benchmarks.servers import parley

_TOGETHER = 16
_PROBE_S = 0.005
_PASSWORD = "a long walk 1842"


def measure(*, full: bool) -> list[Measurement]:
    """Sign in as fast as the server takes it, and ask for something trivial all the while."""
    count = 1000 if full else 200
    with parley() as server:
        names = [f"user{number}" for number in range(_TOGETHER)]
        for name in names:
            server.sign_up(name)
        found = ask("sign_in", {"port": server.port, "pid": server.pid, "names": names, "count": count}, timeout_s=300)
    figures = [
        Figure(name="sign-ins", value=found["rate"], unit="sign-ins/s", note=f"p95 {found['p95_ms']:.0f} ms each"),
        Figure(name="CPU of the process", value=found["cpu_ms"], unit="ms/sign-in"),
        Figure(name="event loop held up, p99", value=found["lag_p99_ms"], unit="ms", most=50,
               note=f"p50 {found['lag_p50_ms']:.1f} ms, idle p50 {found['idle_p50_ms']:.1f} ms"),
        Figure(name="sign-ins that were not 200", value=found["wrong"], unit="answers", most=0),
    ]  # fmt: skip
    method = (
        f"{count} POSTs to auth/signin by {_TOGETHER} at once, argon2id (19 MiB, t=2, p=1), one process. The loop's lag: "
        f"how long GET /health/live takes on a connection of its own, asked every {_PROBE_S * 1000:g} ms meanwhile."
    )
    return [Measurement(name="sign-in", method=method, figures=figures)]


async def _probe(http: httpx.AsyncClient, done: asyncio.Event) -> list[float]:
    took = []
    while not done.is_set():
        began = time.perf_counter()
        await http.get("/health/live")
        took.append(time.perf_counter() - began)
        await asyncio.sleep(_PROBE_S)
    return took


async def _work(http: httpx.AsyncClient, name: str, left: list[int]) -> tuple[list[float], int]:
    took, wrong = [], 0
    while left[0] > 0:
        left[0] -= 1
        began = time.perf_counter()
        answer = await http.post("/api/v1/auth/signin", json={"email": f"{name}@example.com", "password": _PASSWORD})
        took.append(time.perf_counter() - began)
        wrong += answer.status_code != 200
    return took, wrong


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Load the server and watch it."""
    base, left = f"http://127.0.0.1:{specification['port']}", [specification["count"]]
    async with (
        httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as http,
        httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as watch,
    ):
        quiet = asyncio.Event()
        asyncio.get_running_loop().call_later(1, quiet.set)
        idle = await _probe(watch, quiet)
        done = asyncio.Event()
        probing = asyncio.create_task(_probe(watch, done))
        before, began = cpu_s(specification["pid"]), time.perf_counter()
        worked = await asyncio.gather(*(_work(http, name, left) for name in specification["names"]))
        seconds = time.perf_counter() - began
        done.set()
        lag = await probing
    took = [one for found, _ in worked for one in found]
    return {
        "rate": len(took) / seconds,
        "p95_ms": percentile(took, 0.95) * 1e3,
        "cpu_ms": (cpu_s(specification["pid"]) - before) / len(took) * 1e3,
        "lag_p50_ms": percentile(lag, 0.5) * 1e3,
        "lag_p99_ms": percentile(lag, 0.99) * 1e3,
        "idle_p50_ms": percentile(idle, 0.5) * 1e3,
        "wrong": sum(wrong for _, wrong in worked),
    }
