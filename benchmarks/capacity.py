"""`capacity`: how many replies one generating process carries before their readers wait too long."""

import subprocess
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster import Role, cluster
from benchmarks.figures import Figure, Measurement
from benchmarks.processes import ask
from benchmarks.relay import RATE
from benchmarks.replies import Faults
from benchmarks.servers import provider

_HOLDS_MS = 150.0
_PER_USER = 20
_STEPS = (200, 400)
_ALL_STEPS = (100, 200, 400, 800, 1600)


@dataclass(frozen=True)
class _Arrangement:
    name: str
    roles: tuple[Role, ...]
    """Clients connect to the first one."""


_APART = _Arrangement("one web and one gen process", ("web", "gen"))
_TOGETHER = _Arrangement("one process for both", ("all",))


def measure(*, full: bool) -> list[Measurement]:
    """Try more and more replies, each number on fresh processes, until one does not hold."""
    return [_ladder(arrangement, _ALL_STEPS if full else _STEPS, full=full) for arrangement in (_APART, _TOGETHER)]


def _ladder(arrangement: _Arrangement, steps: tuple[int, ...], *, full: bool) -> Measurement:
    figures: list[Figure] = []
    last, ended = 0, "no step was too much"
    for replies in steps:
        try:
            found = _run(arrangement, replies)
        except (RuntimeError, subprocess.TimeoutExpired) as problem:
            ended = f"{replies} did not come to an end ({type(problem).__name__})"
            break
        faults = Faults(**found["faults"])
        busy = ", ".join(
            f"{name} {found['busy'][name]:.2f}"
            for name in (*arrangement.roles, "postmaster", "client", "provider", "others")
        )
        figures += [
            Figure(name=f"{replies} replies: provider to client p99", value=found["p99_ms"], unit="ms",
                   most=100 if replies == 800 else None, note=f"p50 {found['p50_ms']:.0f} ms, direct {found['direct_p99_ms']:.0f} ms"),
            Figure(name=f"{replies} replies: lost, doubled, reordered, wrong", value=faults.total, unit="events", most=0,
                   note=f"of {found['deltas']:,} deltas; cores: {busy}"),
        ]  # fmt: skip
        if found["p99_ms"] > _HOLDS_MS or faults.total:
            ended = f"{replies} had p99 {found['p99_ms']:.0f} ms"
            break
        last = replies
    figures.append(
        Figure(name=f"the most with p99 ≤ {_HOLDS_MS:g} ms", value=last, unit="replies", least=800 if full else None, note=ended)
    )  # fmt: skip
    return Measurement(
        name=f"capacity, {arrangement.name}",
        method=(
            f"Replies at {RATE} deltas/s each, one socket and one conversation per reply, {_PER_USER} to a user, as in "
            f"`relay`; {arrangement.name} on one PostgreSQL, fresh for each number. Latency: the provider's stamp in a delta to "
            "its frame read by the client, over 8 s with all of them running. Provider and client are processes on the same "
            "machine; `cores` says what each used."
        ),
        figures=figures,
    )


def _run(arrangement: _Arrangement, replies: int) -> dict[str, Any]:
    with provider() as source, cluster(provider_port=source.port) as made:
        members = {role: made.add(role, role) for role in arrangement.roles}
        with made.api(arrangement.roles[0]) as api:
            conversations = api.conversations_of_many(replies, each=_PER_USER)
        pids = {role: member.pid for role, member in members.items()}
        return ask(
            "relay",
            {
                "port": members[arrangement.roles[0]].port,
                "provider": source.port,
                "pids": {**pids, "postmaster": made.postmaster, "provider": source.pid},
                "conversations": conversations,
            },
            timeout_s=120 + replies / 10,
        )
