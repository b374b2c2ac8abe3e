"""Several processes of Parley on one PostgreSQL, killed and started again while clients are measured."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.processes import end, environment, postmaster_of
from benchmarks.servers import RAISED, Parley, free_port, scratch, wait_for
from parley.core.embedded_postgres import EmbeddedPostgres

Role = Literal["all", "web", "gen"]

# One model that goes on from a given beginning, one that a background response is read again of, one with neither.
_REGISTRY = """
providers:
  fake: {{kind: openai, base_url: "http://127.0.0.1:{port}/v1", api_key: bench}}
  background: {{kind: openai_responses, base_url: "http://127.0.0.1:{port}/v1", api_key: bench}}
models:
  plain: {{provider: fake, name: plain, retries: 0}}
  prefilled: {{provider: fake, name: prefilled, prefill: prefix, retries: 0}}
  reattached: {{provider: background, name: reattached, retries: 0}}
aliases:
  default: [plain]
"""
_LOOK_S = 0.01
_CONNECTIONS = 200


@dataclass
class Member:
    """A process and what it is started with. Its port stays the same over its restarts."""

    name: str
    port: int
    env: dict[str, str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        """Start it; return when it is ready. Its number is then in its file, for those who end it."""
        self.starts += 1
        log = self.folder / f"{self.name}-{self.starts}.log"
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "parley.cli", "serve"], env=self.env, cwd=self.folder, stdout=sink, stderr=sink
            )
        wait_for(self.process, f"http://127.0.0.1:{self.port}/health/ready", log)
        pid_file = _pid_file(self.folder, self.name)
        fresh = pid_file.with_suffix(".new")
        fresh.write_text(str(self.process.pid))
        fresh.rename(pid_file)

    @property
    def pid(self) -> int:
        """The number of the process that runs."""
        assert self.process is not None
        return self.process.pid


def pid_of(folder: Path, name: str) -> int | None:
    """Return the number of a member's process, or None while there is none that is ready."""
    try:
        return int(_pid_file(folder, name).read_text())
    except FileNotFoundError:
        return None


def _pid_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.pid"


@dataclass
class Cluster:
    """The processes. Whichever ends is started again, until the block is left."""

    folder: Path
    postgres: EmbeddedPostgres
    settings: dict[str, str]
    members: dict[str, Member] = field(default_factory=dict)
    problems: list[Exception] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, role: Role) -> Member:
        """Start a process more."""
        url = self.postgres.url
        port = free_port()
        own = {
            "PARLEY_ROLE": role,
            "PARLEY_PORT": str(port),
            "PARLEY_DATA_DIR": str(self.folder / name),
            "PARLEY_DATABASE_URL": url("parley_app"),
            "PARLEY_DATABASE_SYSTEM_URL": url("parley_system"),
            "PARLEY_DATABASE_OWNER_URL": url("parley_owner"),
            "PARLEY_SECRET_KEY": "one key for all processes of a measurement",
        }
        made = Member(name, port, environment(**{**RAISED, **own, **self.settings}), self.folder)
        self.members[name] = made
        made.start()
        return made

    def api(self, name: str) -> Parley:
        """Return the API of a process."""
        process = self.members[name].process
        assert process is not None
        return Parley(process, self.members[name].port, self.folder)

    @property
    def postmaster(self) -> int:
        """The number of PostgreSQL's first process."""
        return postmaster_of(os.getpid())

    def _keep(self) -> None:
        """Start again what has ended."""
        while not self._stopping.wait(_LOOK_S):
            for member in list(self.members.values()):
                if member.process is not None and member.starts and member.process.poll() is not None:
                    _pid_file(self.folder, member.name).unlink(missing_ok=True)
                    try:
                        member.start()
                    except (RuntimeError, OSError) as problem:
                        if self._stopping.is_set():
                            return
                        self.problems.append(problem)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Start what ends again for the length of the block. Raises what went wrong with that."""
        keeper = threading.Thread(target=self._keep, name="keeper")
        keeper.start()
        try:
            yield
        finally:
            self._stopping.set()
            keeper.join()
        if self.problems:
            raise self.problems[0]

    def stop(self) -> None:
        """End all processes."""
        for member in self.members.values():
            if member.process is not None and member.process.poll() is None:
                # Nobody's reply matters now: what leaves in order would take its time for those that run.
                member.process.kill()
        for member in self.members.values():
            if member.process is not None:
                end(member.process)


@contextmanager
def cluster(*, provider_port: int, own_models: bool = False, **settings: str) -> Iterator[Cluster]:
    """Run a PostgreSQL for processes that are added. Call it from the main thread.

    `own_models`: models `plain`, `prefilled` and `reattached`, instead of those of the repository's registry.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        keys = {"OPENAI_API_KEY": "bench", "OPENAI_BASE_URL": f"http://127.0.0.1:{provider_port}/v1"}
        if own_models:
            registry = folder / "registry.yaml"
            registry.write_text(_REGISTRY.format(port=provider_port))
            settings["PARLEY_LLM_REGISTRY"] = str(registry)
        postgres = stack.enter_context(EmbeddedPostgres(folder / "database", max_connections=_CONNECTIONS))
        made = Cluster(folder, postgres, {**keys, **settings})
        stack.callback(made.stop)
        yield made


def is_gone(pid: int) -> bool:
    """Tell whether a process that somebody else has started is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
