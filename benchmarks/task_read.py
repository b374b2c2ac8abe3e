"""`task-read`: requests a second of one process, a task by its id, against a bare application with the same query."""

import asyncio
import random
import time
from contextlib import ExitStack
from typing import Any, cast

from benchmarks.figures import Figure, Measurement, median, percentile
from benchmarks.processes import ask, cpu_s, environment, running
from benchmarks.servers import free_port, parley, scratch, wait_for

_TASKS = 100
_CONNECTIONS = 24
_ROUND_S = 2.5


def measure(*, full: bool) -> list[Measurement]:
    """Load both in turns."""
    rounds = 10 if full else 5
    with ExitStack() as stack:
        server = stack.enter_context(parley())
        account = server.sign_up()
        description = "Two litres, the one in the blue carton."
        ids = [
            server.post("tasks", account, {"title": f"Buy milk {number}", "description": description})["id"]
            for number in range(_TASKS)
        ]
        folder = stack.enter_context(scratch())
        port, log = free_port(), folder / "bare.log"
        arguments = (str(port), server.database_url("parley_app"), account.workspace_id, account.user_id)
        bare = stack.enter_context(
            running("-m", "benchmarks.bare_app", *arguments, env=environment(), cwd=folder, output=log)
        )
        wait_for(bare, f"http://127.0.0.1:{port}/tasks/{ids[0]}", log)
        found = ask(
            "task_read",
            {
                "rounds": rounds,
                "targets": [
                    {"port": server.port, "pid": server.pid, "paths": [f"/api/v1/tasks/{id}" for id in ids]},
                    {"port": port, "pid": bare.pid, "paths": [f"/tasks/{id}" for id in ids]},
                ],
                "token": account.token,
            },
            timeout_s=60 + rounds * 4 * _ROUND_S,
        )
    ours, theirs = found["targets"]
    ratios = [100 * a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True)]
    spread = f"rounds {min(ratios):.0f}-{max(ratios):.0f} %"
    figures = [
        Figure(name="of the bare application's rate, median of rounds", value=median(ratios), unit="%", least=25,
               note=spread),
        Figure(name="Parley", value=median(ours["rates"]), unit="requests/s", note=f"p95 {ours['p95_ms']:.1f} ms"),
        Figure(name="bare application", value=median(theirs["rates"]), unit="requests/s",
               note=f"p95 {theirs['p95_ms']:.1f} ms"),
        Figure(name="Parley, CPU of its process", value=median(ours["cpu_us"]), unit="µs/request"),
        Figure(name="bare application, CPU of its process", value=median(theirs["cpu_us"]), unit="µs/request"),
        Figure(name="answers that were not 200", value=ours["wrong"] + theirs["wrong"], unit="answers", most=0),
    ]  # fmt: skip
    method = (
        f"GET of one of {_TASKS} tasks over {_CONNECTIONS} kept-alive connections, one process each, {rounds} rounds of "
        f"{_ROUND_S:g} s in turns, after one that is not counted. The bare application is plain ASGI on uvicorn (uvloop, "
        "httptools) and an asyncpg pool of the same size: BEGIN, set_config, the same SELECT, COMMIT, on the same PostgreSQL "
        "as the same role under row-level security; no token, no routing, no pool reset."
    )
    return [Measurement(name="task-read", method=method, figures=figures)]


class _Load(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, requests: list[bytes]) -> None:
        self._requests = requests
        self._received = b""
        self._sent_at = 0.0
        self.took: list[float] = []
        self.wrong = 0
        self.idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stopped = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.idle.done():
            self.idle.set_exception(exc or ConnectionError("closed"))

    def start(self) -> None:
        self._ask()

    def close(self) -> None:
        self._transport.close()

    def _ask(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(random.choice(self._requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        at = self._received.lower().find(b"content-length:", 0, end)
        length = int(self._received[at + 15 : self._received.find(b"\r\n", at)])
        if len(self._received) < end + 4 + length:
            return
        self.took.append(time.perf_counter() - self._sent_at)
        if not self._received.startswith(b"HTTP/1.1 200"):
            self.wrong += 1
        self._received = b""
        if self.stopped:
            self.idle.set_result(None)
        else:
            self._ask()


async def _round(port: int, requests: list[bytes], seconds: float) -> tuple[list[float], int, float]:
    """Load one target; return how long each answer took, how many were wrong, and the length of the round."""
    loop = asyncio.get_running_loop()
    loads = []
    # New connections each round: servers close those that have been idle.
    for _ in range(_CONNECTIONS):
        _, load = await loop.create_connection(lambda: _Load(requests), "127.0.0.1", port)
        loads.append(load)
    began = time.perf_counter()
    for load in loads:
        load.start()
    await asyncio.sleep(seconds)
    for load in loads:
        load.stopped = True
    await asyncio.gather(*(load.idle for load in loads))
    took = time.perf_counter() - began
    for load in loads:
        load.close()
    return [one for load in loads for one in load.took], sum(load.wrong for load in loads), took


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Load the targets in turns."""
    found: list[dict[str, Any]] = []
    for _ in specification["targets"]:
        found.append({"rates": [], "cpu_us": [], "took": [], "wrong": 0})
    for number in range(specification["rounds"] + 1):
        for target, result in zip(specification["targets"], found, strict=True):
            token = target.get("token", specification["token"])
            head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nAccept: application/json\r\n\r\n"
            requests = [f"GET {path} HTTP/1.1\r\n{head}".encode() for path in target["paths"]]
            before = cpu_s(target["pid"])
            took, wrong, seconds = await _round(target["port"], requests, _ROUND_S)
            result["wrong"] += wrong
            if number:
                result["rates"].append(len(took) / seconds)
                result["cpu_us"].append((cpu_s(target["pid"]) - before) / len(took) * 1e6)
                result["took"] += took
    for result in found:
        result["p95_ms"] = percentile(result.pop("took"), 0.95) * 1e3
    return {"targets": found}
