"""The server as its users start it: a process of its own, with its own PostgreSQL."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.canaries import secrets_in_files


@dataclass
class ServerProcess:
    """A running `parley serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/v1/realtime"

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        """Ask it to stop; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start_server(data_dir: Path, **environment: str) -> ServerProcess:
    """Start a server and return once it answers."""
    log = data_dir.parent / f"{data_dir.name}-{time.monotonic_ns()}.log"
    ours = ("PARLEY_", "OPENAI_", "ANTHROPIC_", "LOCAL_LLM_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "parley.cli", "serve", "--port", "0"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**clean, "PARLEY_DATA_DIR": str(data_dir), **environment},
            cwd=data_dir.parent,
        )
    deadline = time.monotonic() + 60
    while True:
        text = log.read_text()
        if found := re.search(r"Parley is ready at http://localhost:(\d+)", text):
            return ServerProcess(process, int(found.group(1)), log)
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not start:\n{text}")
        time.sleep(0.02)


@contextmanager
def server_process(data_dir: Path, **environment: str) -> Iterator[ServerProcess]:
    """Run a server for the length of the block."""
    server = start_server(data_dir, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
    # Whatever was done with it: nothing that lets anyone in stands in what it wrote.
    assert secrets_in_files(server.log, data_dir / "logs") == []
