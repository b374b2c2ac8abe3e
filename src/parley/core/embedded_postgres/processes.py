"""Which PostgreSQL processes are still at work on a data directory.

Its children do not name the directory, but all of them carry `cluster_name` in their command line, and that is
readable whoever they belong to. A zombie has no command line, so it counts as gone.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from parley.core.embedded_postgres.errors import DataDirectoryInUse


@dataclass(frozen=True)
class Process:
    """A running process, with its arguments."""

    pid: int
    arguments: tuple[str, ...]

    @property
    def is_postgres(self) -> bool:
        """Whether it is a PostgreSQL server process."""
        return Path(self.arguments[0]).name == "postgres" or self.arguments[0].startswith("postgres: ")

    def is_postmaster_of(self, cluster_name: str) -> bool:
        """Whether it is the server itself, or about to become it."""
        return f"cluster_name={cluster_name}" in self.arguments

    def belongs_to(self, cluster_name: str) -> bool:
        """Whether it is the server or one of its children."""
        return self.is_postmaster_of(cluster_name) or self.arguments[0].startswith(f"postgres: {cluster_name}: ")


def running() -> list[Process]:
    """List the processes of this machine, without zombies."""
    if sys.platform != "linux":
        return _running_by_ps()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                raw = Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if raw:
                arguments = tuple(part.decode(errors="replace") for part in raw.rstrip(b"\0 ").split(b"\0"))
                found.append(Process(int(entry.name), arguments))
    return found


def _running_by_ps() -> list[Process]:
    listing = subprocess.run(
        ["ps", "-axww", "-o", "pid=,stat=,command="],  # noqa: S607 - wherever this system has it
        capture_output=True,
        check=True,
        text=True,
        errors="replace",
    ).stdout
    found = []
    for line in listing.splitlines():
        pid, state, command = line.split(maxsplit=2)
        if not state.startswith("Z"):
            # The title of a child has spaces of its own: it stays one argument.
            arguments = (command,) if command.startswith("postgres: ") else tuple(command.split())
            found.append(Process(int(pid), arguments))
    return found


def wait_until_gone(cluster_name: str, data: Path, *, grace_s: float, timeout_s: float) -> None:
    """Wait for an earlier server of this directory to end; end it after `grace_s`. Raises `DataDirectoryInUse`.

    The caller holds the directory's lock, so whoever started that server is gone, and what is left is an orphan
    on its way out.
    """
    begun = time.monotonic()
    asked = False
    while left := [process for process in running() if process.belongs_to(cluster_name)]:
        waited = time.monotonic() - begun
        if waited > timeout_s:
            pids = ", ".join(str(process.pid) for process in left)
            raise DataDirectoryInUse(
                f"PostgreSQL is still running on {data} (process {pids}) and did not end within {timeout_s:.0f} s. "
                "Stop it, then start again."
            )
        if waited > grace_s and not asked:
            asked = True
            _end(left, cluster_name)
        time.sleep(0.02)


def _end(left: list[Process], cluster_name: str) -> None:
    """Ask for a fast shutdown; children that lost their server are told to leave at once."""
    servers = [process for process in left if process.is_postmaster_of(cluster_name)]
    for process in servers or left:
        try:
            os.kill(process.pid, signal.SIGINT if servers else signal.SIGQUIT)
        except ProcessLookupError:
            continue
        except PermissionError as error:
            raise DataDirectoryInUse(f"PostgreSQL (process {process.pid}) belongs to another user.") from error


def forget_stale_pid(data: Path) -> None:
    """Remove a `postmaster.pid` whose number now belongs to something else. Raises `DataDirectoryInUse`.

    PostgreSQL only looks whether a process of that number lives, which after a restart of a machine or a container
    is often so. A server that was started by hand is respected.
    """
    pid_file = data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split(maxsplit=1)[0])
    except (FileNotFoundError, ValueError, IndexError):
        return
    process = next((process for process in running() if process.pid == pid), None)
    if process and process.is_postgres and not _works_elsewhere(process, data):
        raise DataDirectoryInUse(
            f"A PostgreSQL that Parley did not start (process {pid}) is running on {data}. Stop it, then start again."
        )
    if process or _is_zombie(pid):
        pid_file.unlink(missing_ok=True)


def _works_elsewhere(process: Process, data: Path) -> bool:
    """Whether a PostgreSQL process, not of our cluster, surely has another data directory."""
    if any(argument.startswith("cluster_name=parley-") for argument in process.arguments):
        return True
    if process.arguments[0].startswith("postgres: parley-"):
        return True
    try:
        return not Path(f"/proc/{process.pid}/cwd").samefile(data)
    except OSError:
        return False


def _is_zombie(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not any(process.pid == pid for process in running())
