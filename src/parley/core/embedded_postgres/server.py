"""The embedded PostgreSQL: start, watch, stop."""

import asyncio
import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from parley.core.database_roles import APP_ROLE, ensure_roles
from parley.core.embedded_postgres.binaries import copy_binaries, find_binaries
from parley.core.embedded_postgres.child import NAMESPACE_REFUSED
from parley.core.embedded_postgres.directory import (
    DirectoryLock,
    Place,
    ensure_cluster,
    make_reachable,
    place,
    prepare_socket_dir,
    short_hash,
)
from parley.core.embedded_postgres.errors import NamespaceRefused, StartFailed, UnusableDataDirectory
from parley.core.embedded_postgres.isolation import Identity, Isolation, child_environment, identity, namespaces_work
from parley.core.embedded_postgres.processes import forget_stale_pid, wait_until_gone

logger = logging.getLogger(__name__)

DATABASE = "parley"
_DEFAULT_PORT = 5432
_LOG_LIMIT_BYTES = 10 * 1024 * 1024
_POLL_S = 0.005
# An earlier server ends within a second of its parent; one that is still there has missed the signal.
_ORPHAN_GRACE_S = 2.0
_EARLIER_SERVER_TIMEOUT_S = 30.0
_MEMORY_TIMEOUT_S = 10.0


class EmbeddedPostgres:
    """PostgreSQL 18 on a Unix socket, its data below `<data_dir>/postgres/`.

    On Linux it ends when this process ends, however that happens. `durable=False` gives up safety against a power
    cut, for tests; a crash of any process loses nothing either way. `port` only names the socket. `isolation` says
    how root runs it: in a user namespace, or, where that is refused, as `nobody` with its files below `nobody_root`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        durable: bool = True,
        port: int | None = None,
        max_connections: int = 200,
        shared_buffers: str = "128MB",
        isolation: Isolation = "auto",
        nobody_root: Path = Path("/var/lib/parley"),
        start_timeout_s: float = 60.0,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self._durable = durable
        self._port = port or _DEFAULT_PORT
        self._max_connections = max_connections
        self._shared_buffers = shared_buffers
        self._isolation = isolation
        self._nobody_root = nobody_root
        self._start_timeout_s = start_timeout_s
        self._root = self.data_dir / "postgres"
        self._log = self._root / "postgres.log"
        self._lock = DirectoryLock(self.data_dir)
        self._identity: Identity | None = None
        self._place: Place | None = None
        self._bin_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server; return when it accepts connections and has its roles and its database.

        Call it from the main thread: on Linux the server dies with the thread that started it.
        Raises `EmbeddedPostgresError`.
        """
        _require_main_thread()
        if self._process is not None:
            raise RuntimeError("this EmbeddedPostgres has been started already")
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
            self._root.mkdir(mode=0o700, exist_ok=True)
            self._settle()
            self._launch(create=True)
            _run(ensure_roles(self.admin_url(), DATABASE))
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError | subprocess.SubprocessError):
                raise StartFailed(f"PostgreSQL could not be started in {self.data_dir}: {error}") from error
            raise
        if sys.platform != "linux":
            atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the server as it likes it: sessions are closed, everything is written. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)
            if self._place is not None and self._place.socket_dir.name != "run":
                try:
                    self._place.socket_dir.rmdir()
                except OSError as error:
                    logger.debug("the socket directory stays: %s", error)
        self._place = None
        atexit.unregister(self.stop)
        self._lock.release()

    def is_alive(self) -> bool:
        """Tell whether the server process runs."""
        process = self._process
        return process is not None and process.poll() is None

    def restart_if_dead(self) -> bool:
        """Start the server again if its process ended by itself; tell whether that was done.

        Call it from the main thread. Does nothing before `start` and after `stop`. Raises `EmbeddedPostgresError`.
        """
        process = self._process
        if process is None or process.poll() is None:
            return False
        _require_main_thread()
        logger.warning("PostgreSQL ended by itself (%s); starting it again", _describe(process.returncode))
        self._launch(create=False)
        return True

    def url(self, role: str = APP_ROLE, database: str = DATABASE) -> str:
        """Return the DSN of a role, for asyncpg, libpq and (with another scheme) SQLAlchemy."""
        if self._place is None:
            raise RuntimeError("the embedded PostgreSQL has no address while it is not started")
        socket_dir = quote(str(self._place.socket_dir), safe="/")
        # The port is spelled out, since clients would otherwise take it from PGPORT.
        return f"postgresql://{quote(role, safe='')}@/{quote(database, safe='')}?host={socket_dir}&port={self._port}"

    def admin_url(self, database: str = "postgres") -> str:
        """Return the DSN of the superuser."""
        return self.url("postgres", database)

    def _settle(self) -> None:
        """Decide as whom and where the server runs. An existing database is never left for a new, empty one."""
        self._bin_dir = find_binaries()
        self._place = place(self.data_dir, self._root, self._port)
        elsewhere_root = self._nobody_root / short_hash(self.data_dir)
        elsewhere = place(self.data_dir, elsewhere_root, self._port)
        chosen = self._isolation
        if chosen == "auto":
            if os.geteuid() != 0:
                chosen = "none"
            elif self._place.has_cluster():
                chosen = "namespace"
            else:
                chosen = "nobody" if elsewhere.has_cluster() or not namespaces_work() else "namespace"
        self._identity = identity(chosen)
        if chosen == "nobody":
            self._place = elsewhere
            make_reachable(elsewhere_root)
            self._bin_dir = copy_binaries(self._bin_dir, elsewhere_root)
            logger.warning(
                "PostgreSQL refuses root, and user namespaces are refused here, so it runs as nobody, with its data "
                "in %s. In a container, keep that directory on a volume.",
                elsewhere_root,
            )

    def _launch(self, *, create: bool) -> None:
        """Bring the server up on a directory that no other server works on any more."""
        assert self._identity is not None
        assert self._place is not None
        assert self._bin_dir is not None
        here = self._place
        wait_until_gone(here.cluster_name, here.data, grace_s=_ORPHAN_GRACE_S, timeout_s=_EARLIER_SERVER_TIMEOUT_S)
        forget_stale_pid(here.data)
        if not create and not here.has_cluster():
            raise UnusableDataDirectory(f"The database in {here.data} has gone. Restore it, or start Parley anew.")
        try:
            ensure_cluster(here, self._identity, self._bin_dir, durable=self._durable)
            prepare_socket_dir(here.socket_dir, self._identity)
            memory_deadline = time.monotonic() + _MEMORY_TIMEOUT_S
            while not self._try_launch(here, self._identity, self._bin_dir, memory_deadline):
                time.sleep(0.1)
        except NamespaceRefused as error:
            raise StartFailed(
                f"The database in {here.data} belongs to root, PostgreSQL refuses to run as root, and user namespaces "
                f"are refused here. Allow them, or run Parley as an ordinary user who owns {self.data_dir}. {error}"
            ) from error

    def _try_launch(self, here: Place, who: Identity, bin_dir: Path, memory_deadline: float) -> bool:
        """Start the process and wait until it is ready; False if the memory of a dead server is still in use."""
        if self._log.exists() and self._log.stat().st_size > _LOG_LIMIT_BYTES:
            self._log.replace(self._log.with_name("postgres.log.1"))
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            offset = os.fstat(log).st_size
            process = self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and binaries
                who.command(bin_dir / "postgres", ["-D", str(here.data), *self._settings(here)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=child_environment(),
                # A Ctrl-C is for us: we finish what runs, then stop the server.
                start_new_session=True,
            )
        finally:
            os.close(log)
        deadline = time.monotonic() + self._start_timeout_s
        while process.poll() is None:
            if _is_ready(here, process.pid):
                logger.info("PostgreSQL runs as process %s, with its data in %s", process.pid, here.data)
                return True
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"PostgreSQL was not ready within {self._start_timeout_s:.0f} s. {self._last_words(offset)}"
                )
            time.sleep(_POLL_S)
        words = self._last_words(offset)
        if process.returncode == NAMESPACE_REFUSED:
            raise NamespaceRefused(words)
        if "is still in use" in words and time.monotonic() < memory_deadline:
            return False
        raise StartFailed(f"PostgreSQL ended while starting ({_describe(process.returncode)}). {words}")

    def _settings(self, here: Place) -> list[str]:
        against_power_cuts = "on" if self._durable else "off"
        settings = {
            "cluster_name": here.cluster_name,
            "listen_addresses": "",
            "unix_socket_directories": str(here.socket_dir),
            "port": str(self._port),
            "max_connections": str(self._max_connections),
            "shared_buffers": self._shared_buffers,
            "max_wal_size": "512MB",
            "fsync": against_power_cuts,
            "full_page_writes": against_power_cuts,
            "synchronous_commit": "on",
            "idle_in_transaction_session_timeout": "60s",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_min_messages": "warning",
            "log_checkpoints": "off",
        }
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    def _last_words(self, offset: int) -> str:
        with self._log.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode(errors="replace").splitlines()[-8:]
        return "\n".join([f"The end of {self._log}:", *lines]) if lines else f"{self._log} says nothing."


def _require_main_thread() -> None:
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "start the embedded PostgreSQL from the main thread: it would end with the thread that started it"
        )


def _is_ready(here: Place, pid: int) -> bool:
    """Read what the server says of itself, as pg_ctl does; that costs less than a try to connect."""
    try:
        lines = (here.data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask ever less politely: fast shutdown, immediate shutdown (the next start recovers), kill."""
    for request, patience_s in ((signal.SIGINT, 30), (signal.SIGQUIT, 5), (signal.SIGKILL, 5)):
        process.send_signal(request)
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            logger.warning("PostgreSQL did not end within %s s of %s", patience_s, request.name)


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _run(work: Coroutine[object, object, None]) -> None:
    """Run a coroutine to its end, also where a loop is running, and without touching the thread's current loop."""

    def run() -> None:
        asyncio.run(work, loop_factory=asyncio.new_event_loop)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
