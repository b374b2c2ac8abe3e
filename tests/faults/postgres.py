"""A PostgreSQL of the fault tests' own, and what is done to it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from parley.core.db import DatabaseUrls
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.core.embedded_postgres.processes import running
from parley.core.migrate import upgrade


@dataclass
class FaultyPostgres:
    """A server that can be frozen, and killed and started again."""

    server: EmbeddedPostgres
    made: int = 0
    _frozen: list[int] = field(default_factory=list)

    def urls(self, name: str) -> DatabaseUrls:
        """Return the addresses of a database."""
        system = self.server.url("parley_system", name)
        return DatabaseUrls(
            app=self.server.url("parley_app", name), system=system, owner=self.server.url("parley_owner", name),
            direct=system,
        )  # fmt: skip

    @property
    def socket(self) -> Path:
        """The socket that clients connect to."""
        address = self.server.admin_url()
        directory = address.split("host=")[1].split("&")[0]
        return Path(directory) / f".s.PGSQL.{address.split('port=')[1]}"

    async def create(self) -> DatabaseUrls:
        """Make a migrated database."""
        self.made += 1
        name = f"faults_{self.made}_{os.getpid()}"
        admin = await asyncpg.connect(self.server.admin_url())
        try:
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE parley OWNER parley_owner")
        finally:
            await admin.close()
        return self.urls(name)

    async def drop(self, urls: DatabaseUrls) -> None:
        """Remove a database."""
        admin = await asyncpg.connect(self.server.admin_url())
        try:
            await admin.execute(f"DROP DATABASE IF EXISTS {urls.name} WITH (FORCE)")
        finally:
            await admin.close()

    def _postmaster(self) -> int:
        path = self.server.data_dir / "postgres" / "data" / "postmaster.pid"
        return int(path.read_text().split(maxsplit=1)[0])

    def _processes(self) -> list[int]:
        main = self._postmaster()
        arguments = next(process.arguments for process in running() if process.pid == main)
        name = next(a.removeprefix("cluster_name=") for a in arguments if a.startswith("cluster_name="))
        # The server first: it may start no new ones meanwhile.
        return [main, *(p.pid for p in running() if p.belongs_to(name) and p.pid != main)]

    def freeze(self) -> None:
        """Stop every process of the server: as a disk that hangs, or a host that is suspended."""
        for pid in self._processes():
            try:
                os.kill(pid, signal.SIGSTOP)
                self._frozen.append(pid)
            except ProcessLookupError:
                continue

    def thaw(self) -> None:
        """Let them go on."""
        for pid in self._frozen:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        self._frozen.clear()

    def crash(self) -> None:
        """End the server at once, without a checkpoint: `start` recovers from its log."""
        os.kill(self._postmaster(), signal.SIGQUIT)

    def start(self) -> None:
        """Start it again as soon as it has ended."""
        deadline = time.monotonic() + 20
        while not self.server.restart_if_dead():
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.01)


@contextmanager
def faulty_postgres(directory: Path) -> Iterator[FaultyPostgres]:
    """Run a server with a migrated database to copy from. Call it from the main thread."""
    with EmbeddedPostgres(directory, durable=False, max_connections=300) as server:
        made = FaultyPostgres(server)
        upgrade(made.urls("parley"))
        try:
            yield made
        finally:
            made.thaw()
