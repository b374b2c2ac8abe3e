"""`take-over`: how soon a reader hears that its reply goes on, or has failed, after `kill -9` of what wrote it."""

import asyncio
import os
import random
import signal
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.channels import TERMINAL, Channel, Wrong
from benchmarks.cluster import cluster, pid_of
from benchmarks.fake_plan import script
from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask
from benchmarks.roaming import Roamer, close_all, open_all, until
from benchmarks.servers import provider, valkey

_RATE = 25
_DELTAS = 125
_SIZE = 4
_GENERATING = ("gen1", "gen2")
_MODELS = ("prefilled", "plain", "reattached")
_SENDS_PER_S = 100
_VISIBLE = 2
_MOST_ROUNDS = 40


def measure(*, full: bool) -> list[Measurement]:
    """Kill, once with PostgreSQL's notifications between the processes and once with Valkey."""
    hits, replies = (600, 90) if full else (210, 45)
    return [_one(hits, replies, with_valkey=False), _one(hits, replies, with_valkey=True)]


def _one(hits: int, replies: int, *, with_valkey: bool) -> Measurement:
    with ExitStack() as stack:
        settings = {"PARLEY_REDIS_URL": stack.enter_context(valkey())} if with_valkey else {}
        source = stack.enter_context(provider())
        made = stack.enter_context(cluster(provider_port=source.port, own_models=True, **settings))
        web = made.add("web", "web")
        for name in _GENERATING:
            made.add(name, "gen")
        with made.api("web") as api:
            conversations = api.conversations_of_many(replies, each=15)
        with made.kept():
            found = ask(
                "take_over",
                {"port": web.port, "folder": str(made.folder), "conversations": conversations, "hits": hits},
                timeout_s=600,
            )
    wrong = Wrong(**found["wrong"])
    took = [ms for one in found["took_ms"].values() for ms in one]
    wire = "Valkey" if with_valkey else "NOTIFY"
    each = [
        Figure(name=f"of those, {kind}, p99", value=percentile(one, 0.99), unit="ms",
               note=f"{len(one)} times, p50 {percentile(one, 0.5):.0f} ms")
        for kind, one in sorted(found["took_ms"].items())
    ]  # fmt: skip
    return Measurement(
        name=f"take-over after kill -9, {wire}",
        method=(
            f"One `web` and two `gen` processes on one PostgreSQL, {wire} between them. {replies} replies at {_RATE} "
            f"deltas/s run, a third of models that go on from a beginning, a third that are read again (background "
            "responses), a third that can do neither; one of the generating processes is killed at a random moment "
            f"(it is started again, the other one is next), {found['kills']} kills. From before the signal is sent to the "
            "frame with reply.resumed or reply.failed read at the client. Every text is checked by offset, len and sha256, "
            "and character by character against what the provider was to say."
        ),
        figures=[
            Figure(name="kill to resumed or failed p50", value=percentile(took, 0.5), unit="ms", note=f"{len(took)} replies"),
            Figure(name="kill to resumed or failed p99", value=percentile(took, 0.99), unit="ms", most=3000),
            Figure(name="kill to resumed or failed, longest", value=max(took), unit="ms"),
            *each,
            Figure(name="lost, doubled, wrong, left open", value=wrong.total, unit="events", most=0, note=str(wrong)),
        ],
    )  # fmt: skip


class _Reply:
    """What became of the reply of a round in one conversation."""

    def __init__(self, seed: int, model: str) -> None:
        self.seed = seed
        self.model = model
        self.deltas = 0
        self.taken_at = 0
        self.how = ""
        self.end = ""
        self.text = ""

    @property
    def is_right(self) -> bool:
        """Whether a reader has what the provider was to say, or the beginning of it when it had to fail."""
        said = "".join(script(self.seed, _DELTAS, _SIZE))
        if self.end == "reply.completed":
            return self.text == said
        return self.end == "reply.failed" and self.how == "failed" and said.startswith(self.text)


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Kill until enough replies were hit."""
    folder, wrong = Path(specification["folder"]), Wrong()
    replies: dict[str, _Reply] = {}
    took: dict[str, list[float]] = defaultdict(list)

    def heard(channel: Channel, name: str, d: dict[str, Any], now: int) -> None:
        reply = replies.get(channel.name)
        if reply is None:
            return
        if name == "reply.delta":
            reply.deltas += 1
        elif name == "reply.resumed" and not reply.taken_at:
            reply.taken_at, reply.how = now, d["strategy"]
        elif name in TERMINAL:
            if name == "reply.failed" and not reply.taken_at:
                reply.taken_at, reply.how = now, "failed"
            reply.end, reply.text = name, channel.texts[d["reply"]].whole

    port = specification["port"]
    clients = [
        Roamer(lambda: port, token, [f"conversation:{id}"], wrong, heard)
        for token, id in specification["conversations"]
    ]
    await open_all(clients)
    kills = 0
    while sum(map(len, took.values())) < specification["hits"] and kills < _MOST_ROUNDS:
        began = time.monotonic()
        for number, one in enumerate(clients):
            (name,) = one.channels
            reply = replies[name] = _Reply(kills * len(clients) + number + 1, _MODELS[number % len(_MODELS)])
            await asyncio.sleep(began + number / _SENDS_PER_S - time.monotonic())
            plan = f"rate={_RATE} deltas={_DELTAS} size={_SIZE} seed={reply.seed} ttft={random.random() / _RATE:.4f}"
            one.send(name, plan, model=reply.model)
        await until(lambda: all(reply.deltas >= _VISIBLE for reply in replies.values()), within_s=30)
        # Whoever looks for lost replies does so twice a second: at any moment between.
        await asyncio.sleep(random.uniform(0, 0.5))
        victim = _GENERATING[kills % 2]
        pid = pid_of(folder, victim)
        assert pid is not None
        killed_at = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        kills += 1
        await until(lambda: all(reply.end for reply in replies.values()), within_s=30)
        for reply in replies.values():
            wrong.left_open += not reply.end
            # Nothing else ends or interrupts a reply here: what did so before the kill is wrong too.
            too_early = 0 < reply.taken_at < killed_at
            wrong.mismatched += bool(reply.end) and (too_early or not reply.is_right)
            if reply.taken_at:
                took[reply.how].append((reply.taken_at - killed_at) / 1e6)
        if not all(reply.end for reply in replies.values()):
            break
        await until(partial(_is_back, folder, victim, pid), within_s=60)
    await close_all(clients)
    return {"wrong": asdict(wrong), "took_ms": took, "kills": kills}


def _is_back(folder: Path, name: str, pid: int) -> bool:
    return pid_of(folder, name) not in {None, pid}
