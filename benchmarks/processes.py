"""Processes of a measurement: started here, ended by their pid, and asked what they used."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_FILES = 65_536
_TICKS = os.sysconf("SC_CLK_TCK")
_NOT_HANDED_ON = ("PARLEY_", "OPENAI_", "ANTHROPIC_", "LOCAL_LLM_", "PG")


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without anyone's settings, keys and addresses."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_ON)}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, **more}


@contextmanager
def running(
    *arguments: str, env: Mapping[str, str], cwd: Path, output: Path, stop: signal.Signals = signal.SIGTERM
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program for the length of the block; what it says goes to a file."""
    with output.open("wb") as sink:
        process = subprocess.Popen([sys.executable, *arguments], env=dict(env), cwd=cwd, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        end(process, stop)


def end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """End a process of ours, and wait until it has."""
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=15)


def ask(name: str, specification: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Run `benchmarks.<name>.client(specification)` in a process of its own and return what it found."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.client", name],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        answer, _ = process.communicate(json.dumps(specification).encode(), timeout=timeout_s)
    finally:
        end(process, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"the measuring process of {name} failed; its own lines are above")
    found: dict[str, Any] = json.loads(answer)
    return found


def raise_file_limit() -> int:
    """Allow as many open files as this user may have, here and in the processes that are started; return the number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Whoever may allow more than that does: each connection is a file of the client, of the server, and of a balancer.
    for limit in (max(hard, _FILES), hard):
        with suppress(ValueError, PermissionError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return limit
    return hard


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, which may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process with all its threads, user and system."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def postmaster_of(server: int) -> int:
    """Return the PostgreSQL that a server process has started."""
    for pid in children(server):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "postgres":
            return pid
    raise LookupError("the server has no PostgreSQL of its own")


def postgres_cpu_s(postmaster: int) -> float:
    """Return the CPU time of a PostgreSQL server: its processes of now, and those that have ended."""
    fields = _stat(postmaster)
    total = sum(map(int, fields[11:15])) / _TICKS
    for pid in children(postmaster):
        try:
            total += cpu_s(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def machine_cpu_s() -> float:
    """Return the CPU time that the whole machine has been busy."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS


def resident_bytes(pid: int) -> int:
    """Return the memory of a process that is in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LookupError("no VmRSS")
