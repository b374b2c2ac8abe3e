"""A long run: people talk without a pause, processes die without a pause, and every conversation is judged."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.bench import Talk, talk
from tests.faults.cluster import Account, Cluster, Member
from tests.faults.recorder import Device
from tests.faults.shown import TERMINAL, Frame
from tests.faults.verdict import Verdict, settled

_OWNED = """
    SELECT r.id::text FROM replies r
    JOIN pg_locks l ON l.locktype = 'advisory' AND l.objid = r.owner::oid AND l.objsubid = 2 AND l.granted
    JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE r.status = 'streaming' AND a.application_name = $1
"""
_TAKEN_OVER = frozenset({"reply.resumed", "reply.started"}) | TERMINAL
_REPLIES_EACH = 5


@dataclass
class Wanted:
    """How much is to happen."""

    kills_gen: int
    kills_web: int
    drops: int
    seconds: float
    talkers: int = 6
    seed: int = 1


@dataclass
class Outcome:
    """What happened, and what was found."""

    kills_gen: int = 0
    kills_web: int = 0
    drops: int = 0
    conversations: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    strategies: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    take_over_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    interrupted_replies: int = 0

    def take(self, verdict: Verdict) -> None:
        """Add a conversation's verdict."""
        self.conversations += 1
        self.counts += verdict.counts
        self.problems += verdict.problems


class Soak:
    """One run on one cluster."""

    def __init__(self, cluster: Cluster, wanted: Wanted) -> None:
        self.cluster = cluster
        self.wanted = wanted
        self.outcome = Outcome()
        self._began = time.monotonic()
        self._choose = random.Random(wanted.seed)
        self._killed_at: dict[str, float] = {}
        self._talks: set[Talk] = set()
        self._restarting: set[str] = set()
        self._enough = asyncio.Event()
        self._numbers = iter(range(1, 10**9))

    @property
    def _over(self) -> bool:
        return time.monotonic() - self._began > self.wanted.seconds

    async def run(self) -> Outcome:
        """Run until everything that was wanted has happened, or the time is over."""
        accounts = [await self.cluster.sign_up(f"talker{n}@example.com") for n in range(2)]
        async with asyncio.TaskGroup() as group:
            talkers = [
                group.create_task(self._talker(n, accounts[n % len(accounts)])) for n in range(self.wanted.talkers)
            ]
            async with asyncio.TaskGroup() as faults:
                faults.create_task(self._kill("gen", self.wanted.kills_gen))
                faults.create_task(self._kill("web", self.wanted.kills_web))
                faults.create_task(self._drop())
            self._enough.set()
            await asyncio.wait(talkers)
        self.outcome.seconds = time.monotonic() - self._began
        self.outcome.start_s = self.cluster.start_times_s
        await self._look_at_the_end()
        return self.outcome

    # -- people --------------------------------------------------------------------------------------------------

    async def _talker(self, number: int, account: Account) -> None:
        choose = random.Random(f"{self.wanted.seed}-{number}")
        while not self._enough.is_set():
            async with talk(self.cluster, account, seed=choose.randrange(10**6)) as chat:
                self._talks.add(chat)
                try:
                    await self._conversation(chat, choose)
                except (AssertionError, TimeoutError) as error:
                    self.outcome.problems.append(f"conversation {chat.id}: {type(error).__name__}: {str(error)[:600]}")
                finally:
                    self._talks.discard(chat)

    async def _conversation(self, chat: Talk, choose: random.Random) -> None:
        devices = [await chat.device(stall_s=1.0) for _ in range(2)]
        for device in devices:
            device.on_frame = self._hear
        await asyncio.gather(*(device.live(timeout_s=60) for device in devices))
        for _ in range(_REPLIES_EACH):
            text = (
                f"seed={next(self._numbers) + self.wanted.seed * 10**6} deltas={choose.randint(10, 120)} "
                f"rate={choose.choice((40, 60, 100))} ttft={choose.choice((0, 0, 0.2))}"
            )
            model = choose.choice(("plain", "prefill", "reattach"))
            if choose.random() < 0.15 and model != "reattach":
                text += " tool=add_task"
            if choose.random() < 0.2:
                text += " reasoning=3"
            reply = await chat.send(choose.choice(devices), text, opts={"model": model}, timeout_s=60)
            if choose.random() < 0.2:
                await chat.device(stall_s=1.0)
            for device in devices:
                status = await device.until_ended(reply, timeout_s=60)
            end = devices[0].ended(reply) if status == "failed" else None
            self.outcome.ends[f"{status} {end['error']['code']}" if end else status] += 1
        verdict = await chat.verdict(timeout_s=60)
        for device in chat.devices:
            self.outcome.resumed_s += device.resumed_s
        for step in devices[0].steps:
            if step.e == "reply.resumed":
                self.outcome.strategies[step.d["strategy"]] += 1
        self.outcome.take(verdict)

    def _hear(self, frame: Frame) -> None:
        if frame["t"] == "ev" and frame["e"] in _TAKEN_OVER:
            killed = self._killed_at.pop(frame["d"]["reply"], None)
            if killed is not None:
                self.outcome.take_over_s.append(time.monotonic() - killed)

    # -- faults --------------------------------------------------------------------------------------------------

    def _members(self, role: str) -> list[Member]:
        return [m for m in self.cluster.members.values() if m.role in {role, "all"}]

    async def _kill(self, role: str, times: int) -> None:
        choose = random.Random(f"{self.wanted.seed}-{role}")
        done = 0
        while done < times and not self._over:
            await asyncio.sleep(choose.uniform(0, 0.25))
            alive = [m for m in self._members(role) if m.alive and m.name not in self._restarting]
            if len(alive) < 2:
                continue
            # The one that has just started has nothing to lose yet: mostly the other.
            busy = [(len(await self._owned(m)) if role == "gen" else choose.random(), m.name, m) for m in alive]
            victim = max(busy)[2] if choose.random() < 0.7 else choose.choice(alive)
            if victim.name in self._restarting:
                continue
            self._restarting.add(victim.name)
            done += 1
            if role == "gen":
                for reply in await self._owned(victim):
                    self._killed_at[reply] = time.monotonic()
                    self.outcome.interrupted_replies += 1
            await self.cluster.kill(victim)
            if role == "gen":
                self.outcome.kills_gen += 1
            else:
                self.outcome.kills_web += 1
            await self.cluster.start(victim)
            self._restarting.discard(victim.name)

    async def _owned(self, member: Member) -> list[str]:
        return [row["id"] for row in await self.cluster.admin.fetch(_OWNED, member.name)]

    async def _drop(self) -> None:
        choose = random.Random(f"{self.wanted.seed}-drops")
        while self.outcome.drops < self.wanted.drops and not self._over:
            await asyncio.sleep(choose.uniform(0, 0.1))
            devices: Sequence[Device] = [device for chat in list(self._talks) for device in chat.devices]
            if devices:
                choose.choice(devices).drop()
                self.outcome.drops += 1

    # -- the end -------------------------------------------------------------------------------------------------

    async def _look_at_the_end(self) -> None:
        channels = [row["channel"] for row in await self.cluster.admin.fetch("SELECT channel FROM channel_heads")]
        self.outcome.problems += await settled(self.cluster.admin, None, channels)
        running = self.cluster.provider.running()
        if running:
            self.outcome.problems.append(f"{len(running)} calls of the provider still run")
        unfit = [call for call in self.cluster.provider.calls if not call.fits]
        if unfit:
            self.outcome.problems.append(f"{len(unfit)} continuations were asked for with text that was never said")
        self.outcome.errors = errors_in(self.cluster.directory)


def errors_in(directory: Path) -> Counter[str]:
    """Count the errors that the processes wrote to their logs."""
    found: Counter[str] = Counter()
    for path in directory.glob("*.log"):
        for line in path.read_text(errors="replace").splitlines():
            if '"level": "ERROR"' in line:
                match = re.search(r'"message": "([^"]{0,80})', line)
                cause = re.search(r'([A-Za-z_.]+(?:Error|Exception|Exists|Violation))\b[^"]{0,60}\\n"', line)
                found[f"{match[1] if match else line[:80]} {cause[1] if cause else ''}".strip()] += 1
    return found
