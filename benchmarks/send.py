"""`send`: how soon `chat.send` is acknowledged, with the question, the reply and its run durable."""

import asyncio
import random
import time
from dataclasses import asdict
from typing import Any

from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask
from benchmarks.replies import Faults, open_followers
from benchmarks.servers import parley, provider

_SENDS_PER_S = 50
_CONVERSATIONS = 100
_DELTAS = 10


def measure(*, full: bool) -> list[Measurement]:
    """Send at an even pace, each answered by a short reply."""
    seconds = 30 if full else 10
    with provider() as source, parley(provider_port=source.port) as server:
        conversations = server.conversations_of_many(_CONVERSATIONS, each=10)
        found = ask(
            "send", {"port": server.port, "conversations": conversations, "seconds": seconds}, timeout_s=seconds + 60
        )
    oks = found["ok_ms"]
    faults = Faults(**found["faults"])
    return [
        Measurement(
            name=f"send, {_SENDS_PER_S} a second",
            method=(
                f"{len(oks)} sends at {_SENDS_PER_S}/s over {_CONVERSATIONS} sockets of as many conversations, 10 to a user; "
                f"from the frame's writing to its ok. Each is answered with {_DELTAS} deltas at 25/s, so that about 20 "
                "replies run at any time."
            ),
            figures=[
                Figure(name="chat.send acknowledged p50", value=percentile(oks, 0.5), unit="ms"),
                Figure(name="chat.send acknowledged p95", value=percentile(oks, 0.95), unit="ms", most=20),
                Figure(name="chat.send acknowledged p99", value=percentile(oks, 0.99), unit="ms"),
                Figure(name="lost, doubled, reordered, wrong", value=faults.total, unit="events", most=0),
            ],
        )
    ]


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Send at an even pace."""
    faults = Faults()
    followers = await open_followers(specification["port"], specification["conversations"], faults)
    oks = []
    began = time.monotonic()
    count = specification["seconds"] * _SENDS_PER_S
    # The first second is not counted.
    for number in range(count + _SENDS_PER_S):
        await asyncio.sleep(began + number / _SENDS_PER_S - time.monotonic())
        follower = followers[number % len(followers)]
        if number >= len(followers):
            await follower.ended
        follower.send(f"rate=25 ttft={random.random() / 25:.4f}", deltas=_DELTAS)
        if number >= _SENDS_PER_S:
            oks.append(follower.ok)
    async with asyncio.timeout(20):
        await asyncio.gather(*(one.ended for one in followers))
        took = await asyncio.gather(*oks)
    counted = asdict(faults)
    for follower in followers:
        follower.close()
    return {"faults": counted, "ok_ms": [one / 1e6 for one in took]}
