"""All oracles over one conversation and the devices that followed it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import orjson

from tests.faults import oracles
from tests.faults.oracles import Event, Problems
from tests.faults.recorder import Device, Received

_EVENTS = "SELECT seq, e, d::text AS d FROM channel_events WHERE workspace_id = $1::uuid AND channel = $2 ORDER BY seq"
_HEAD = "SELECT seq, epoch, floor FROM channel_heads WHERE workspace_id = $1::uuid AND channel = $2"
_OPEN = """
    SELECT id, status, coalesce(lease_until > now(), false) AS leased FROM replies
    WHERE status IN ('queued', 'streaming') AND ($1::uuid IS NULL OR workspace_id = $1::uuid) AND channel = ANY($2::text[])
"""


@dataclass
class Verdict:
    """What was looked at, and what is wrong."""

    problems: Problems = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, problems: Problems) -> None:
        """Note the findings of an oracle."""
        self.problems += problems
        self.counts[kind] += len(problems)

    def assert_clean(self) -> None:
        """Fail with the first findings."""
        assert not self.problems, f"{len(self.problems)} findings, the first: " + "\n".join(self.problems[:12])


async def table_of(admin: asyncpg.Pool, workspace: str, channel: str) -> tuple[list[Event], int, str]:
    """Return a channel's log, its head and its epoch."""
    rows = await admin.fetch(_EVENTS, workspace, channel)
    head = await admin.fetchrow(_HEAD, workspace, channel)
    events = [Event(row["seq"], row["e"], orjson.loads(row["d"])) for row in rows]
    return events, (0 if head is None else head["seq"]), ("" if head is None else head["epoch"])


def judge(
    devices: Sequence[Device],
    table: Sequence[Event],
    *,
    head: int,
    epoch: str,
    scripted: bool = True,
    validate: Callable[[str, Sequence[Received]], Problems] = oracles.frames_are_valid,
) -> Verdict:
    """Look at everything. `scripted`: every reply's text is to be the provider's."""
    verdict = Verdict()
    by_seq = {event.seq: event for event in table}
    verdict.add("reordered", oracles.table_is_dense(table, head))
    verdict.add("left_open", oracles.ends_once((event.seq, event.e, event.d) for event in table))
    for reply in oracles.replies_of(table).values():
        verdict.counts["replies"] += 1
        verdict.add("lost_or_doubled", oracles.end_is_what_was_said(reply))
        if scripted:
            verdict.add("lost_or_doubled", oracles.text_is_the_script(reply))
    for device in devices:
        name, steps = device.name, device.steps
        verdict.counts["frames"] += len(device.received)
        verdict.counts["connections"] += device.connections
        verdict.counts["snapshots"] += sum(step.kind == "snap" for step in steps)
        verdict.add("reordered", oracles.ranges_are_dense(name, steps))
        verdict.add("reordered", oracles.wire_is_dense(name, device.channel, device.received))
        verdict.add("lost_or_doubled", oracles.text_never_shrinks(name, steps))
        verdict.add("uncommitted", oracles.agrees_with_table(name, steps, by_seq, epoch=epoch))
        verdict.add(
            "left_open",
            oracles.ends_once(((s.seq, s.e, s.d) for s in steps if s.kind == "ev"), all_ended=False),
        )
        verdict.add("invalid_frames", validate(name, device.received))
        for step in steps:
            if step.kind == "snap" and step.ep == epoch and (not table or table[0].seq == 1):
                verdict.add("snapshots_wrong", oracles.snapshot_is_the_fold(name, step, table))
        if device.integrity_failures:
            verdict.add(
                "lost_or_doubled", [f"{name}: {device.integrity_failures} times the text was not the vouched one"]
            )
        if device.last is not None and device.epoch == epoch and device.last < head and device.unsubbed is None:
            verdict.add("lost_or_doubled", [f"{name}: stopped at {device.last}, the head is {head}"])
    verdict.add("disagree", oracles.agree({device.name: device.steps for device in devices}))
    return verdict


async def settled(admin: asyncpg.Pool, workspace: str | None, channels: Sequence[str]) -> Problems:
    """Return what is still open in the database."""
    rows: Any = await admin.fetch(_OPEN, workspace, list(channels))
    return oracles.none_left_open(rows)
