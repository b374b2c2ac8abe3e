"""Servers that are wrong on purpose: a copy of the tree is changed and the fault tests must turn red.

    python -m tests.faults.mutants [--only NAME] [--directory DIR]

Each change is a piece of text that must stand in its file as often as it says, so a change that has gone out of date is
told and not passed over. Exit code 1 when a mutant survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("src", "tests", "migrations", "prompts", "benchmarks", "docs", "pyproject.toml", "alembic.ini", "llm_registry.yaml", ".env.example")  # fmt: skip
_TICK = "migrations/versions/2026_11_21_0110_several_processes.py"


@dataclass(frozen=True)
class Change:
    """Text to be replaced in a file, so many times from the first on."""

    path: str
    old: str
    new: str
    times: int = 1


@dataclass(frozen=True)
class Mutant:
    """A wrong server, the tests that must find it, and what one of them must say."""

    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]
    says: str


MUTANTS = (
    Mutant(
        "visible before it is committed",
        (
            Change(
                "src/parley/realtime/tick.py",
                "                return list(await connection.fetch(_TICK, *arguments, timeout=10))\n",
                "                await connection.execute('BEGIN')\n"
                "                rows = list(await connection.fetch(_TICK, *arguments, timeout=10))\n"
                "                for row in rows:\n"
                "                    events = enumerate(batch.events[row['ix'] - 1], 1)\n"
                "                    told = [LoggedEvent(row['base'] + n, e, d, timestamp_ms(row['at'])) for n, (e, d) in events]\n"
                "                    if told:\n"
                "                        self._bus.publish(batch.runs[row['ix'] - 1].channel.address, told)\n"
                "                await asyncio.sleep(0.02)\n"
                "                await connection.execute('COMMIT')\n"
                "                return rows\n",
            ),
        ),
        ("tests/faults/test_kills.py::test_killed_the_moment_its_text_is_seen",),
        r"not in the log|not what the log has|took text|waited in vain",
    ),
    Mutant(
        "no fence",
        (
            Change(
                _TICK,
                "AND r.owner = p_owner AND r.fence = i.fence\n          AND r.appended = i.appended AND",
                "AND",
            ),
        ),
        ("tests/faults/test_kills.py::test_a_process_that_was_stopped_beyond_its_lease_appends_nothing",),
        r"completed with|vouches for|lets its provider go|does not fit|waited in vain|no beginning",
    ),
    Mutant(
        "numbers from a sequence",
        (
            Change(
                _TICK,
                "        UPDATE channel_heads c SET seq = c.seq + h.n\n",
                "        UPDATE channel_heads c SET seq = nextval('mutant') * 10 + h.n\n",
            ),
            Change(
                _TICK,
                '    op.execute("DROP FUNCTION realtime_tick")\n    op.execute(TICK)\n',
                '    op.execute("DROP FUNCTION realtime_tick")\n    op.execute(TICK)\n'
                '    op.execute("CREATE SEQUENCE mutant START 10")\n'
                '    op.execute("GRANT USAGE ON SEQUENCE mutant TO PUBLIC")\n',
            ),
        ),
        ("tests/faults/test_clients.py::test_ten_devices_join_at_random_times",),
        r"holes or doubles|waited in vain|was applied after",
    ),
    Mutant(
        "the tenant of a session, not of a transaction",
        (Change("src/parley/core/unit_of_work.py", "'{workspace}', true)", "'{workspace}', false)"),),
        ("tests/core/test_isolation_soak.py", "tests/core/test_row_level_security.py", "tests/core/test_db.py"),
        r"assert|Error",
    ),
    Mutant(
        "a snapshot of two instants",
        (Change("src/parley/realtime/channels.py", "self._database.unit_of_work(scope, snapshot=True)", "self._database.unit_of_work(scope)"),),
        (
            "tests/faults/test_clients.py::test_subscribing_at_the_instant_of_an_event",
            "tests/faults/test_clients.py::test_ten_devices_join_at_random_times",
        ),
        r"differs from the fold|does not fit|waited in vain|times the text was not",
    ),
)  # fmt: skip


def _copy(directory: Path) -> None:
    for name in _COPIED:
        source, target = ROOT / name, directory / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)


def _apply(directory: Path, change: Change) -> None:
    path = directory / change.path
    text = path.read_text()
    found = text.count(change.old)
    if found < change.times:
        raise SystemExit(f"{change.path} has changed: the text to replace stands there {found} times\n{change.old}")
    path.write_text(text.replace(change.old, change.new, change.times))


def _run(directory: Path, mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Run tests in the copy; return whether they were green, and what was said."""
    path = os.pathsep.join([str(directory / "src"), str(directory)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=directory, env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode not in {0, 1} or "did not start" in said:
        name = mutant.name if mutant else "the tree as it is"
        raise SystemExit(f"{name}: the tests could not be run\n{said[-4000:]}")
    return done.returncode == 0, said


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutants", description=__doc__)
    parser.add_argument("--only", help="only mutants with this in their name")
    parser.add_argument("--directory", type=Path, help="where the copies go; left there")
    given = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not given.only or given.only in mutant.name]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="parley-mutants-") as spare:
        base = given.directory or Path(spare)
        for number, mutant in enumerate(chosen):
            directory = base / f"mutant-{number}"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            _copy(directory)
            for change in mutant.changes:
                _apply(directory, change)
            began = time.monotonic()
            green, said = _run(directory, mutant, mutant.tests)
            found = next(
                (line.strip() for line in said.splitlines() if re.search(r"^E .*(" + (mutant.says or ".") + ")", line)),
                "",
            )
            dead = not green and bool(found)
            print(
                f"{'dead    ' if dead else 'SURVIVED'} {mutant.name} ({time.monotonic() - began:.0f} s): {found[:150]}",
                flush=True,
            )
            if not dead:
                survivors.append(mutant.name)
                if not green:
                    print(said[-3000:])
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
