"""The long fault run: `python -m tests.faults --kills-gen 500 --kills-web 500 --drops 1000 --seed 7`.

Half of it is run with a Valkey between the processes, which is killed and comes back empty meanwhile, and half without. Prints what was done, what was found and how
long take-overs and reconnects took. Exit code 1 when anything was lost, doubled, reordered or left open.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.faults.cluster import Zygote, cluster, zygote
from tests.faults.postgres import FaultyPostgres, faulty_postgres
from tests.faults.soak import Outcome, Soak, Wanted
from tests.valkey import Valkey, run_valkey

_KINDS = ("lost_or_doubled", "reordered", "left_open", "uncommitted", "snapshots_wrong", "disagree", "invalid_frames")


def _percentile(values: Sequence[float], share: float) -> str:
    if not values:
        return "none"
    return f"{sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000:.0f} ms"


class _Store:
    """A Valkey that is killed and comes back empty, again and again."""

    def __init__(self, valkey: Valkey, seed: int) -> None:
        self._valkey = valkey
        self._choose = random.Random(seed)
        self.kills = 0

    async def come_and_go(self) -> None:
        while True:
            await asyncio.sleep(self._choose.uniform(2, 8))
            await asyncio.to_thread(self._valkey.kill)
            self.kills += 1
            await asyncio.sleep(self._choose.uniform(0, 4))
            await asyncio.to_thread(self._valkey.start)


async def _run(
    parent: Zygote, postgres: FaultyPostgres, directory: Path, wanted: Wanted, valkey: Valkey | None
) -> tuple[Outcome, int]:
    redis_url = valkey.url if valkey else None
    store = _Store(valkey, wanted.seed) if valkey else None
    urls = await postgres.create()
    # Sockets and generation in one process and in two: what is told within a process and what is told between them.
    roles = ("all", "all", "web", "gen")
    async with cluster(
        parent, directory, urls, postgres.server.admin_url(urls.name), redis_url=redis_url,
        PARLEY_REALTIME_HEARTBEAT_S="5",
    ) as made:  # fmt: skip
        for number, role in enumerate(roles, 1):
            made.fork(made.add(f"{role}{number}", role=role))
        for member in made.members.values():
            await made.ready(member)
        coming = asyncio.create_task(store.come_and_go()) if store else None
        outcome = await Soak(made, wanted).run()
        if coming:
            coming.cancel()
            await asyncio.wait({coming})
    await postgres.drop(urls)
    return outcome, store.kills if store else 0


def _report(title: str, outcome: Outcome) -> None:
    print(f"\n{title}: {outcome.seconds:.0f} s")
    print(
        f"  done       {outcome.kills_gen} kills of generating processes ({outcome.interrupted_replies} replies hit), "
        f"{outcome.kills_web} of processes with sockets, {outcome.drops} dropped connections"
    )
    print(
        f"  over       {outcome.conversations} conversations, {outcome.counts['replies']} replies "
        f"({_counted(outcome.ends)}), {outcome.counts['frames']} frames on {outcome.counts['connections']} connections, "
        f"{outcome.counts['snapshots']} snapshots"
    )
    print(f"  resumed    {_counted(outcome.strategies) or 'nothing'}")
    print(f"  verdict    {', '.join(f'{kind} {outcome.counts[kind]}' for kind in _KINDS)}")
    for name, values in (
        ("take-over", outcome.take_over_s), ("reconnect", outcome.resumed_s), ("restart", outcome.start_s),
    ):  # fmt: skip
        print(
            f"  {name:<10} p50 {_percentile(values, 0.5)}, p99 {_percentile(values, 0.99)}, "
            f"longest {_percentile(values, 1)}, {len(values)} times"
        )
    for message, count in outcome.errors.most_common(8):
        print(f"  logged     {count} × {message}")
    for problem in outcome.problems[:20]:
        print(f"  FOUND      {problem}")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills-gen", type=int, default=500, help="processes that generate, killed")
    parser.add_argument("--kills-web", type=int, default=500, help="processes that hold sockets, killed")
    parser.add_argument("--drops", type=int, default=1000, help="connections dropped")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument("--minutes", type=float, default=30, help="stop after so long, whatever was reached")
    parser.add_argument("--talkers", type=int, default=6, help="conversations at once")
    parser.add_argument("--valkey", choices=("both", "with", "without"), default="both")
    parser.add_argument("--keep", type=Path, help="keep the logs of the processes below this directory")
    given = parser.parse_args()
    modes = {"both": (False, True), "with": (True,), "without": (False,)}[given.valkey]
    print(f"seed {given.seed}", flush=True)
    bad = 0
    with ExitStack() as stack:
        directory = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parley-faults-")))
        parent = stack.enter_context(zygote())
        postgres = stack.enter_context(faulty_postgres(directory / "postgres"))
        for mode in modes:
            share = len(modes)
            wanted = Wanted(
                -(-given.kills_gen // share), -(-given.kills_web // share), -(-given.drops // share),
                given.minutes * 60 / share, given.talkers, given.seed,
            )  # fmt: skip
            name = "with Valkey" if mode else "without Valkey"
            with ExitStack() as around:
                valkey = around.enter_context(run_valkey(directory)) if mode else None
                place = directory / name.replace(" ", "-")
                outcome, stores = asyncio.run(_run(parent, postgres, place, wanted, valkey))
            _report(f"{name}, killed and restarted {stores} times" if mode else name, outcome)
            sys.stdout.flush()
            bad += len(outcome.problems)
    print(f"\n{'nothing lost, doubled, reordered or left open' if not bad else f'{bad} findings'}; seed {given.seed}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
