"""Reaching the embedded server of another process, which holds the data directory."""

import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from parley.core.embedded_postgres.directory import short_hash
from parley.core.embedded_postgres.errors import StartFailed

_DATABASE = "parley"
_READY_LINE = 7


def running_server(
    data_dir: Path, *, nobody_root: Path = Path("/var/lib/parley"), timeout_s: float = 10.0
) -> Callable[[str], str]:
    """Return a function from role to DSN for the server that another process runs; waits until it is ready.

    The server says itself where its socket is. Raises `StartFailed` if there is none after `timeout_s` seconds.
    """
    data_dir = data_dir.resolve()
    roots = (data_dir / "postgres", nobody_root / short_hash(data_dir))
    deadline = time.monotonic() + timeout_s
    while True:
        for root in roots:
            lines = _lines(root / "data" / "postmaster.pid")
            if len(lines) > _READY_LINE and lines[_READY_LINE].strip() == "ready":
                port, socket_dir = lines[3].strip(), quote(lines[4].strip(), safe="/")
                return lambda role: f"postgresql://{quote(role, safe='')}@/{_DATABASE}?host={socket_dir}&port={port}"
        if time.monotonic() > deadline:
            raise StartFailed(f"Another Parley holds {data_dir}, and its PostgreSQL does not answer.")
        time.sleep(0.05)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, PermissionError):
        return []
