"""`first-token`: how much later the first token comes through Parley than from the provider itself."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from benchmarks.completions import CompletionFollower, open_completions
from benchmarks.figures import Figure, Measurement, median, percentile
from benchmarks.processes import ask
from benchmarks.replies import Faults, Follower, open_followers
from benchmarks.servers import parley, provider
from benchmarks.sockets import ProviderStream

RATE = 25
_TTFT_S = 0.03
_LANES = 2
_CONVERSATIONS_PER_LANE = 8

Way = Literal["socket", "dialect"]
# What it is called, and what is timed.
_WAYS: dict[Way, tuple[str, str]] = {
    "socket": ("the socket", "chat.send to the first reply.delta"),
    "dialect": ("OpenAI's dialect", "POST /v1/chat/completions to the first chunk with text"),
}


def measure(*, full: bool) -> list[Measurement]:
    """Probe a server that streams nothing else, then ones that stream 50 and 200, both ways."""
    pairs = 400 if full else 120
    return [_one(way, replies, pairs) for replies in (1, 50, 200) for way in _WAYS]


def _one(way: Way, replies: int, pairs: int) -> Measurement:
    background = replies - _LANES if replies > 1 else 0
    with provider() as source, parley(provider_port=source.port) as server:
        readers = server.conversations_of_many if way == "socket" else server.keys_of_many
        found = ask(
            "first_token",
            {
                "way": way,
                "port": server.port,
                "provider": source.port,
                "probes": readers(_LANES * _CONVERSATIONS_PER_LANE, each=_CONVERSATIONS_PER_LANE),
                "background": readers(background, each=12, name="other") if background else [],
                "pairs": pairs,
            },
            timeout_s=240,
        )
    name = f"{way}, {replies} repl{'y' if replies == 1 else 'ies'}"
    target = 12 if replies == 50 else None
    added = found["added_ms"]
    after, sent = found["after_ms"], found["before_ms"]
    return Measurement(
        name=f"first-token over {_WAYS[way][0]}, {f'{replies} streaming' if background else 'one at a time'}",
        method=(
            f"{len(added)} probes: from {_WAYS[way][1]} at the client, in turns with as many requests "
            f"straight to the provider (both told to wait {_TTFT_S * 1000:.0f} ms); added is a probe less the median of the "
            "requests. By stamps: from the provider's sending of the first delta to its frame at the client."
            + (f" Beside {background} that come the same way at {RATE} deltas/s." if background else "")
        ),
        figures=[
            Figure(name=f"{name}: added to the first token p50", value=percentile(added, 0.5), unit="ms",
                   note=f"straight to the provider p50 {found['direct_p50_ms']:.1f} ms"),
            Figure(name=f"{name}: added to the first token p95", value=percentile(added, 0.95), unit="ms", most=target,
                   note=f"straight to the provider p95 {found['direct_p95_ms']:.1f} ms"),
            Figure(name=f"{name}: by stamps, provider to client p50", value=percentile(after, 0.5), unit="ms",
                   note=f"before it, asking to the provider's answer: {median(sent):.1f} ms"),
            Figure(name=f"{name}: by stamps, provider to client p95", value=percentile(after, 0.95), unit="ms",
                   most=target, note=f"before it: {percentile(sent, 0.95):.1f} ms"),
            Figure(name=f"{name}: lost, doubled, reordered, wrong", value=Faults(**found["faults"]).total,
                   unit="events", most=0),
        ],
    )  # fmt: skip


async def _lane(
    probes: Sequence[Follower | CompletionFollower], direct: ProviderStream, pairs: int
) -> list[tuple[int, int, int]]:
    """Probe in turns; returns for each pair: through Parley, of it after the provider's stamp, straight (ns)."""
    found = []
    plan = f"ttft={_TTFT_S} rate={RATE}"
    for number in range(pairs):
        probe = probes[number % len(probes)]
        probe.send(plan, deltas=2)
        async with asyncio.timeout(10):
            came, stamp = await probe.first
        await asyncio.sleep(random.uniform(0.01, 0.05))
        began = time.monotonic_ns()
        first, end = direct.ask(f"{plan} stamp=1 deltas=2")
        async with asyncio.timeout(10):
            straight = await first - began
            await end
            await probe.ended
        found.append((came - probe.sent_at, came - stamp, straight))
        # At no fixed distance, so that probes do not fall into step with the writer's ticks.
        await asyncio.sleep(random.uniform(0.01, 0.05))
    return found


async def _open(way: Way, port: int, readers: list[Any], faults: Faults) -> Sequence[Follower | CompletionFollower]:
    if way == "dialect":
        return await open_completions(port, readers, faults)
    return await open_followers(port, readers, faults)


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Start the replies beside it, then probe in two lanes."""
    faults = Faults()
    port, pairs = specification["port"], specification["pairs"]
    others = await _open(specification["way"], port, specification["background"], faults)
    probes = await _open(specification["way"], port, specification["probes"], faults)
    lanes = _LANES if others else 1
    # Each pair takes about 0.2 s; what still runs at the end is dropped.
    deltas = int(RATE * (pairs / lanes * 0.4 + 10))
    for follower in others:
        follower.send(f"rate={RATE} ttft={random.random() / RATE:.4f}", deltas=deltas)
        await asyncio.sleep(0.02)
    await asyncio.gather(*(one.first for one in others))
    directs = [await ProviderStream.open(specification["provider"]) for _ in range(lanes)]
    for lane in range(lanes):  # the first of each connection is not counted
        await _lane(probes[lane::lanes], directs[lane], 5)
    rows = await asyncio.gather(*(_lane(probes[lane::lanes], directs[lane], pairs // lanes) for lane in range(lanes)))
    still_running = sum(not one.ended.done() for one in others)
    if still_running < len(others):
        raise RuntimeError("the replies beside it ended before the probes did")
    counted = asdict(faults)
    for follower in (*probes, *others):
        follower.close()
    through = [row[0] / 1e6 for lane in rows for row in lane]
    after = [row[1] / 1e6 for lane in rows for row in lane]
    direct = [row[2] / 1e6 for lane in rows for row in lane]
    return {
        "faults": counted,
        "added_ms": [one - median(direct) for one in through],
        "after_ms": after,
        "before_ms": [one - later - _TTFT_S * 1000 for one, later in zip(through, after, strict=True)],
        "direct_p50_ms": median(direct),
        "direct_p95_ms": percentile(direct, 0.95),
    }
