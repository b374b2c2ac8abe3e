"""`storm`: all clients of a process lose their connections at once, and how soon they are live again."""

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from benchmarks.channels import Wrong
from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.probes import Probes
from benchmarks.processes import ask, cpu_s
from benchmarks.roaming import Roamer, close_all, open_all
from benchmarks.servers import parley

_PER_USER = 20
_LIVE_WITHIN_S = 120.0
_CALM_S = 3.0


def measure(*, full: bool) -> list[Measurement]:
    """Cut all clients, let them come back, and once more."""
    return [_one(5000 if full else 2000, storms=2)]


def _one(count: int, *, storms: int) -> Measurement:
    with parley() as server, ThreadPoolExecutor(1) as pool:
        prober = server.sign_up("prober")
        stop = server.folder / "storms-are-over"
        conversations = server.conversations_of_many(count, each=_PER_USER)
        probing = pool.submit(
            ask,
            "probes",
            {"port": server.port, "token": prober.token, "stop": str(stop)},
            timeout_s=700,
        )
        try:
            found = ask(
                "storm",
                {"port": server.port, "pid": server.pid, "conversations": conversations, "storms": storms},
                timeout_s=120 + count / 50 + storms * _LIVE_WITHIN_S,
            )
        finally:
            stop.touch()
        probed = probing.result()
    wrong = Wrong(**found["wrong"])
    took = [seconds for one in found["storms"] for seconds in one["took_s"]]
    during = [Probes(probed, one["began"], one["ended"]) for one in found["storms"]]
    calm = Probes(probed, found["storms"][0]["began"] - int(_CALM_S * 1e9), found["storms"][0]["began"])
    attempts = sum(one["attempts"] for one in found["storms"]) / len(took)
    answered = [ms for one in during for ms in (one.percentile_ms(0.5), one.percentile_ms(0.99))]
    return Measurement(
        name=f"storm of {count:,} clients",
        method=(
            f"{count:,} clients of one process, {_PER_USER} to a user, each with user:me and a conversation of its own. All "
            "are cut at once by a reset from their side and come back by the protocol's rule: a random wait that doubles, "
            f"resuming from their positions. From the cut to `live` on both channels, {storms} storms. Meanwhile 20 requests a "
            "second, a list of tasks and a new task in turns, each on a connection of its own."
        ),
        figures=[
            Figure(name="cut to live again p50", value=percentile(took, 0.5), unit="s",
                   note=f"meanwhile busy: server {found['cores'][0]:.2f}, client {found['cores'][1]:.2f} cores"),
            Figure(name="cut to live again p99", value=percentile(took, 0.99), unit="s"),
            Figure(name="cut to live again, the last one", value=max(took), unit="s", most=30,
                   note=f"{attempts:.2f} attempts each; told no: {found['refusals'] or 'nobody'}"),
            Figure(name="not live in time, resumed with a loss", value=found["missing"] + found["not_recovered"],
                   unit="clients", most=0, note=f"{found['missing']} and {found['not_recovered']}"),
            Figure(name="requests answered 5xx or not at all", value=sum(one.failed for one in during), unit="requests", most=0,
                   note=f"of {sum(one.count for one in during)} in the storms; other refusals {sum(one.refused for one in during)}"),
            Figure(name="requests in the storm p50", value=max(answered[::2]), unit="ms",
                   note=f"the worse storm; before {calm.percentile_ms(0.5):.1f} ms"),
            Figure(name="requests in the storm p99", value=max(answered[1::2]), unit="ms",
                   note=f"the worse storm; before {calm.percentile_ms(0.99):.1f} ms"),
            Figure(name="lost, doubled, reordered, turned away", value=wrong.total, unit="events", most=0, note=str(wrong)),
        ],
    )  # fmt: skip


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Cut, and wait until all are live."""
    port, wrong = specification["port"], Wrong()
    clients = [
        Roamer(lambda: port, token, ["user:me", f"conversation:{id}"], wrong)
        for token, id in specification["conversations"]
    ]
    await open_all(clients)
    await asyncio.sleep(_CALM_S)
    storms: list[dict[str, Any]] = []
    refusals: Counter[str] = Counter()
    missing = not_recovered = 0
    server_s = client_s = 0.0
    for _ in range(specification["storms"]):
        before = sum(one.attempts for one in clients)
        for one in clients:
            one.recovered = 0
            one.refusals.clear()
        began, cpu = time.monotonic_ns(), (cpu_s(specification["pid"]), time.process_time())
        for one in clients:
            one.cut()
        _, late = await asyncio.wait([asyncio.ensure_future(one.live()) for one in clients], timeout=_LIVE_WITHIN_S)
        for waiting in late:
            waiting.cancel()
        ended = time.monotonic_ns()
        server_s += cpu_s(specification["pid"]) - cpu[0]
        client_s += time.process_time() - cpu[1]
        # Who was not live in time counts with the time that was waited.
        took = [((one.live_at if one.live_at > began else ended) - began) / 1e9 for one in clients]
        missing += len(late)
        not_recovered += sum(one.recovered < len(one.channels) for one in clients) - len(late)
        for one in clients:
            refusals.update(one.refusals)
        attempts = sum(one.attempts for one in clients) - before
        storms.append({"began": began, "ended": ended, "took_s": took, "attempts": attempts})
        await asyncio.sleep(_CALM_S)
    await close_all(clients)
    wall = sum(one["ended"] - one["began"] for one in storms) / 1e9
    return {
        "cores": (server_s / wall, client_s / wall),
        "wrong": asdict(wrong),
        "storms": storms,
        "missing": missing,
        "not_recovered": not_recovered,
        "refusals": ", ".join(f"{count} {code}" for code, count in refusals.most_common()),
    }
