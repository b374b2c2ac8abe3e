"""`slow-client`: what a client that does not keep up costs the others in time, and the server in memory."""

import asyncio
import random
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.channels import Channel, Wrong
from benchmarks.figures import Figure, Measurement, median, percentile
from benchmarks.processes import ask, cpu_s, resident_bytes
from benchmarks.roaming import Roamer, close_all, open_all, until
from benchmarks.servers import parley, provider
from benchmarks.sockets import Socket, hello

_RATE = 25
_PAUSE_S = 1.0
_MEMORY_S = 8.0
_SENDS_PER_S = 50
_RECEIVE_BYTES = 4096
_KINDS = ("unread", "unacked")


def measure(*, full: bool) -> list[Measurement]:
    """Watch with and without a slow client, in turns."""
    rounds = (12, 8.0) if full else (6, 4.0)
    return [_one(replies=50, watchers=10, slow=20, rounds=rounds[0], round_s=rounds[1])]


def _one(*, replies: int, watchers: int, slow: int, rounds: int, round_s: float) -> Measurement:
    with provider() as source, parley(provider_port=source.port) as server:
        account = server.sign_up()
        found = ask(
            "slow_client",
            {
                "port": server.port,
                "pid": server.pid,
                "token": account.token,
                "conversations": server.conversations(account, replies),
                "watchers": watchers,
                "slow": slow,
                "rounds": rounds,
                "round_s": round_s,
            },
            timeout_s=120 + rounds * 4 * (round_s + _PAUSE_S),
        )
    wrong = Wrong(**found["wrong"])
    figures = [
        Figure(name="provider to client p99, alone", value=median(found["p99_ms"]["alone"]), unit="ms",
               note=f"median of rounds; p50 {median(found['p50_ms']['alone']):.1f} ms"),
    ]  # fmt: skip
    for kind, words in zip(_KINDS, ("never reads", "reads and never acknowledges"), strict=True):
        ratios = found["ratios"][kind]
        figures.append(
            Figure(name=f"p99 with one that {words}, change", value=(median(ratios) - 1) * 100, unit="%", most=10,
                   note=f"median of {len(ratios)} pairs of rounds, {(min(ratios) - 1) * 100:.0f} to "
                   f"{(max(ratios) - 1) * 100:.0f} %; p99 {median(found['p99_ms'][kind]):.1f} ms")
        )  # fmt: skip
    memory = found["memory"]
    figures += [
        Figure(name="server memory per client that never reads", value=memory["each"] / 2**20, unit="MiB", most=1,
               note=f"{slow} at once; in as long without them it grew by {memory['alone'] / 2**20:.2f} MiB in all"),
        Figure(name="server CPU", value=found["cpu"], unit="cores", note=f"{found['frames_per_s']:,.0f} frames/s read by the others"),
        Figure(name="lost, doubled, reordered among the others", value=wrong.total, unit="events", most=0, note=str(wrong)),
    ]  # fmt: skip
    return Measurement(
        name=f"slow-client beside {replies * watchers} others",
        method=(
            f"{replies} replies at {_RATE} deltas/s, {watchers} watchers each, all on one process. Rounds of {round_s:g} s in "
            f"turns: without, and with one client more that follows all {replies} channels, its receive buffer "
            f"{_RECEIVE_BYTES} bytes, and either never reads or reads and never acknowledges; {_PAUSE_S:g} s after each change "
            "is not counted. Latency: the provider's stamp in a delta to its frame read, over all watchers; each round with "
            f"is divided by the one before it without. Memory: growth of the resident memory in {_MEMORY_S:g} s after {slow} "
            "clients that never read have come, by their number; the kernel's buffers are not in it."
        ),
        figures=figures,
    )


class _Slow(Socket):
    """A client that follows and does not keep up: `unread` stops reading once it has subscribed, `unacked` goes on."""

    def __init__(self, hello: dict[str, Any], kind: str) -> None:
        super().__init__(hello, self._heard)
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kind = kind
        self._left = len(hello["subs"])

    def _heard(self, frame: dict[str, Any], _: int) -> None:
        # Not `live`: that waits for the events before it, which this client holds up.
        if frame["t"] == "subbed":
            self._left -= 1
            if self._left == 0:
                self.subscribed.set_result(None)
                if self._kind == "unread":
                    self._transport.pause_reading()

    @classmethod
    async def follow(cls, port: int, token: str, channels: list[str], kind: str) -> "_Slow":
        """Connect with a small receive buffer; return when all channels are subscribed."""
        # Before the connect: the window is agreed on with it.
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", port))
        _, made = await loop.create_connection(lambda: cls(hello(token, *channels), kind), sock=raw)
        async with asyncio.timeout(20):
            await made.subscribed
        return made


class _Latencies:
    """The latencies of the round that runs."""

    def __init__(self) -> None:
        self.now: list[int] | None = None
        self.deltas = 0
        self.frames = 0

    def heard(self, _: Channel, name: str, d: dict[str, Any], now: int) -> None:
        if name == "reply.delta":
            self.deltas += 1
            if self.now is not None:
                self.frames += 1
                self.now.extend([now - int(stamp) for stamp in d["x"].split("|")[:-1]])

    async def take(self, seconds: float) -> list[int]:
        """Collect for so long."""
        taken: list[int] = []
        self.now = taken
        await asyncio.sleep(seconds)
        self.now = None
        return taken


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Watch in turns, then look at the memory."""
    port, token, rounds = specification["port"], specification["token"], specification["rounds"]
    round_s: float = specification["round_s"]
    names = [f"conversation:{id}" for id in specification["conversations"]]
    wrong, latencies = Wrong(), _Latencies()
    watchers = [
        # The texts would grow in memory all the while, and stamps are text enough.
        Roamer(lambda: port, token, [name], wrong, latencies.heard, keep=False)
        for _ in range(specification["watchers"])
        for name in names
    ]
    await open_all(watchers)
    lasts_s = 2 * len(_KINDS) * rounds * (round_s + _PAUSE_S) + 2 * _MEMORY_S
    deltas = int(_RATE * (lasts_s + len(names) / _SENDS_PER_S + 15))
    for one, name in zip(watchers, names, strict=False):
        one.send(name, f"rate={_RATE} ttft={random.random() / _RATE:.4f} stamp=1 deltas={deltas}")
        await asyncio.sleep(1 / _SENDS_PER_S)
    if not await until(lambda: latencies.deltas >= len(watchers) * _RATE, within_s=30):
        raise RuntimeError("the replies do not run")

    async def come(kind: str, count: int) -> list[_Slow]:
        return await asyncio.gather(*(_Slow.follow(port, token, names, kind) for _ in range(count)))

    p99: dict[str, list[float]] = {kind: [] for kind in ("alone", *_KINDS)}
    p50: dict[str, list[float]] = {kind: [] for kind in ("alone", *_KINDS)}
    ratios: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    cpu, began = cpu_s(specification["pid"]), time.monotonic()
    for _ in range(rounds):
        for kind in _KINDS:
            for turn in ("alone", kind):
                slow = await come(kind, 1) if turn == kind else []
                await asyncio.sleep(_PAUSE_S)
                taken = await latencies.take(round_s)
                p99[turn].append(percentile(taken, 0.99) / 1e6)
                p50[turn].append(percentile(taken, 0.5) / 1e6)
                for each in slow:
                    each.drop()
            ratios[kind].append(p99[kind][-1] / p99["alone"][-1])
    cpu, wall = cpu_s(specification["pid"]) - cpu, time.monotonic() - began
    memory = await _memory(specification["pid"], lambda: come("unread", specification["slow"]), specification["slow"])
    wrong.refused += sum(one.attempts - 1 for one in watchers)
    await close_all(watchers)
    return {
        "wrong": asdict(wrong),
        "p99_ms": p99,
        "p50_ms": p50,
        "ratios": ratios,
        "memory": memory,
        "cpu": cpu / wall,
        "frames_per_s": latencies.frames / (2 * len(_KINDS) * rounds * round_s),
    }


async def _memory(pid: int, come: Callable[[], Any], count: int) -> dict[str, float]:
    """Return how much memory each slow client takes, and how much the server took by itself in as long."""
    start = resident_bytes(pid)
    await asyncio.sleep(_MEMORY_S)
    before = resident_bytes(pid)
    slow = await come()
    await asyncio.sleep(_MEMORY_S)
    grown = resident_bytes(pid) - before
    for one in slow:
        one.drop()
    return {"alone": before - start, "each": grown / count}
