"""`deploy`: two processes are replaced one after the other while clients are connected and replies run."""

import asyncio
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.channels import TERMINAL, Channel, Wrong
from benchmarks.cluster import cluster, is_gone, pid_of
from benchmarks.fake_plan import script
from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.probes import Probes
from benchmarks.processes import ask, environment, running
from benchmarks.roaming import Roamer, close_all, open_all, until
from benchmarks.servers import free_port, provider, wait_for

_RATE = 25
_SIZE = 4
_NAMES = ("one", "two")
_DRAIN_S = 10
_GONE_WITHIN_S = 90.0
_SENDS_PER_S = 50
# Longer than the whole restart: they are cancelled after it.
_DELTAS = _RATE * 240


def measure(*, full: bool) -> list[Measurement]:
    """Restart both, once; with `full` twice."""
    return [_one(sockets=1000, replies=50, restarts=2 if full else 1)]


def _one(*, sockets: int, replies: int, restarts: int) -> Measurement:
    with (
        ThreadPoolExecutor(1) as pool,
        provider() as source,
        cluster(provider_port=source.port, own_models=True, PARLEY_REALTIME_DRAIN_S=str(_DRAIN_S)) as made,
    ):
        backends = [str(made.add(name, "all").port) for name in _NAMES]
        port, log, stop = free_port(), made.folder / "balancer.log", made.folder / "restarts-are-over"
        arguments = ("-m", "benchmarks.balancer", str(port), *backends)
        with (
            running(*arguments, env=environment(), cwd=made.folder, output=log) as balancer,
            made.api(_NAMES[0]) as api,
        ):
            wait_for(balancer, f"http://127.0.0.1:{port}/health/ready", log)
            prober = api.sign_up("prober")
            conversations = api.conversations_of_many(sockets - replies, each=25)
            probing = pool.submit(
                ask, "probes", {"port": port, "token": prober.token, "stop": str(stop)}, timeout_s=700
            )
            try:
                with made.kept():
                    found = ask(
                        "deploy",
                        {
                            "port": port,
                            "folder": str(made.folder),
                            "conversations": conversations,
                            "replies": replies,
                            "restarts": restarts,
                        },
                        timeout_s=200 + restarts * 2 * (_GONE_WITHIN_S + 10),
                    )
            finally:
                stop.touch()
            probed = Probes(probing.result(), found["began"], found["ended"])
    wrong, gaps = Wrong(**found["wrong"]), found["longest_gap_s"]
    drains = found["drain_s"]
    return Measurement(
        name=f"deploy under {sockets:,} sockets and {replies} replies",
        method=(
            f"Two processes on one PostgreSQL behind a TCP balancer that passes connections on in turns, looks at "
            f"/health/ready every 0.1 s and takes out who answers 503. {sockets:,} sockets, one conversation each; {replies} "
            f"replies at {_RATE} deltas/s of a model that goes on from a beginning, each watched by two of the sockets. "
            "SIGTERM to one, until it is gone and its successor on the same port ready, then to the other"
            f"{f', {restarts} times over' if restarts > 1 else ''}. Replies may go on for {_DRAIN_S} s after the signal "
            "(PARLEY_REALTIME_DRAIN_S; the default is 60) and are then handed over. Every text is checked by offset, len and "
            "sha256, and against what the provider was to say. The gap: the longest time between two events of a running "
            "reply at a watcher during the whole restart. Requests: 20 a second through the balancer."
        ),
        figures=[
            Figure(name="longest gap of each watcher p50", value=percentile(gaps, 0.5), unit="s"),
            Figure(name="longest gap of each watcher p99", value=percentile(gaps, 0.99), unit="s", most=2,
                   note=f"{len(gaps)} watchers, the longest of all {max(gaps):.2f} s; all gaps p99 {found['gap_p99_ms']:.0f} ms"),
            Figure(name="lost, doubled, reordered, wrong", value=wrong.total, unit="events", most=0,
                   note=f"of {found['deltas']:,} deltas; {wrong}"),
            Figure(name="signal to the end of the process, the longest", value=max(drains), unit="s",
                   note="each " + ", ".join(f"{one:.1f} s" for one in drains)),
            Figure(name="replies that were handed over", value=found["handed_over"], unit="times",
                   note=f"{found['attempts']} connections made anew, {found['closed']} of them because the one before was closed "
                   f"or broke, {found['snapshots']} snapshots"),
            Figure(name="requests answered 5xx or not at all", value=probed.failed, unit="requests", most=0,
                   note=f"of {probed.count}; p99 {probed.percentile_ms(0.99):.0f} ms"),
        ],
    )  # fmt: skip


class _Watcher:
    """A client of a conversation in which a reply runs."""

    def __init__(self, token: str, channel: str, port: int, wrong: Wrong) -> None:
        self.client = Roamer(lambda: port, token, [channel], wrong, self._heard)
        self.channel = channel
        self.deltas = 0
        self.resumed = 0
        self.gaps: list[int] = []
        self.measuring = False
        self.reply = ""
        self.ended = ""
        self._heard_at = 0

    def _heard(self, _: Channel, name: str, d: dict[str, Any], now: int) -> None:
        if name == "reply.delta":
            self.deltas += 1
            self.reply = d["reply"]
        elif name == "reply.resumed":
            self.resumed += 1
        elif name in TERMINAL:
            self.ended = name
        if self.measuring and self._heard_at and not self.ended:
            self.gaps.append(now - self._heard_at)
        self._heard_at = now

    def stop_measuring(self, now: int) -> None:
        """Take what it has not heard anything for as a gap too."""
        self.measuring = False
        if not self.ended:
            self.gaps.append(now - self._heard_at)

    def right(self, seed: int) -> bool:
        """Whether it has the beginning of what the provider was to say, up to where the reply was cancelled."""
        text = self.client.channels[self.channel].texts[self.reply].whole
        return self.ended == "reply.cancelled" and "".join(script(seed, _DELTAS, _SIZE)).startswith(text)


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Restart both while all are connected."""
    port, folder, wrong = specification["port"], Path(specification["folder"]), Wrong()
    conversations: list[tuple[str, str]] = specification["conversations"]
    watched = conversations[: specification["replies"]]
    watchers = [_Watcher(token, f"conversation:{id}", port, wrong) for _ in range(2) for token, id in watched]
    idle = [Roamer(lambda: port, token, [f"conversation:{id}"], wrong) for token, id in conversations[len(watched) :]]
    clients = [*(one.client for one in watchers), *idle]
    random.shuffle(clients)
    await open_all(clients)
    for seed, one in enumerate(watchers[: len(watched)], 1):
        plan = f"rate={_RATE} deltas={_DELTAS} size={_SIZE} seed={seed} ttft={random.random() / _RATE:.4f}"
        one.client.send(one.channel, plan, model="prefilled")
        await asyncio.sleep(1 / _SENDS_PER_S)
    if not await until(lambda: all(one.deltas >= _RATE for one in watchers), within_s=30):
        raise RuntimeError("the replies do not run")
    attempts = sum(one.attempts for one in clients)
    began = time.monotonic_ns()
    for one in watchers:
        one.measuring = True
    drains = [await _restart(folder, name) for _ in range(specification["restarts"]) for name in _NAMES]
    await asyncio.sleep(3)
    ended = time.monotonic_ns()
    for one in watchers:
        one.stop_measuring(ended)
    attempts = sum(one.attempts for one in clients) - attempts
    early = sum(bool(one.ended) for one in watchers)
    for one in watchers[: len(watched)]:
        one.client.say({"t": "reply.cancel", "id": 2, "reply": one.reply})
    await until(lambda: all(one.ended for one in watchers), within_s=30)
    for number, one in enumerate(watchers):
        wrong.left_open += not one.ended
        wrong.mismatched += bool(one.ended) and not one.right(number % len(watched) + 1)
    wrong.mismatched += early
    await close_all(clients)
    gaps = [gap for one in watchers for gap in one.gaps]
    return {
        "wrong": asdict(wrong),
        "began": began,
        "ended": ended,
        "drain_s": drains,
        "longest_gap_s": [max(one.gaps, default=ended - began) / 1e9 for one in watchers],
        "gap_p99_ms": percentile(gaps, 0.99) / 1e6,
        "deltas": sum(one.deltas for one in watchers),
        "handed_over": sum(one.resumed for one in watchers[: len(watched)]),
        "attempts": attempts,
        "closed": sum(one.losses for one in clients),
        "snapshots": sum(channel.snapshots for one in clients for channel in one.channels.values()),
    }


async def _restart(folder: Path, name: str) -> float:
    """Ask a process to leave; return, once its successor is ready, how long it took to be gone."""
    pid = pid_of(folder, name)
    assert pid is not None
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    if not await until(lambda: is_gone(pid), within_s=_GONE_WITHIN_S):
        raise RuntimeError(f"{name} does not end")
    took = time.monotonic() - began
    if not await until(lambda: pid_of(folder, name) not in {None, pid}, within_s=60):
        raise RuntimeError(f"{name} does not come back")
    # The balancer has seen it by then.
    await asyncio.sleep(1)
    return took
