"""The embedded PostgreSQL against real processes: starts, deaths, and who may touch what."""

import asyncio
import functools
import importlib.util
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from parley.core import database_roles
from parley.core.database_roles import RightsMissing, ensure_database, ensure_roles
from parley.core.embedded_postgres import (
    BinariesMissing,
    DataDirectoryInUse,
    EmbeddedPostgres,
    StartFailed,
    UnusableDataDirectory,
    child,
    processes,
    server,
)
from parley.core.embedded_postgres.directory import place, short_hash
from parley.core.embedded_postgres.isolation import child_environment, identity, namespaces_work
from parley.core.embedded_postgres.processes import Process, running

pytestmark = pytest.mark.process

ROLES = ("parley_owner", "parley_app", "parley_system")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")

# A process that owns a server and does nothing else, until it is killed.
PARENT = """
import sys, signal
from pathlib import Path
from parley.core.embedded_postgres import EmbeddedPostgres
EmbeddedPostgres(Path(sys.argv[1]), nobody_root=Path(sys.argv[2]), isolation=sys.argv[3]).start()
sys.stdout.write("started\\n")
sys.stdout.flush()
signal.pause()
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "d"


@pytest.fixture
def nobody_root() -> Iterator[Path]:
    """A folder that `nobody` can get to; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def becomes_nobody() -> bool:
    """Whether this machine leaves no other way, as root in a default container."""
    return os.geteuid() == 0 and not namespaces_work()


@pytest.fixture
def in_place(becomes_nobody: bool) -> None:
    if becomes_nobody:
        pytest.skip("user namespaces are refused here, so root's database is not in the data directory")


@pytest.fixture
def root(data_dir: Path, nobody_root: Path, becomes_nobody: bool) -> Path:
    """Where the server of `data_dir` keeps its files."""
    return nobody_root / short_hash(data_dir) if becomes_nobody else data_dir / "postgres"


Make = Callable[..., EmbeddedPostgres]


@pytest.fixture
def make(data_dir: Path, nobody_root: Path) -> Make:
    return functools.partial(EmbeddedPostgres, data_dir, durable=False, nobody_root=nobody_root)


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def query(dsn: str, *statements: str) -> Any:
    """Run statements on one connection; return the first value of the last."""

    async def run() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            value = None
            for statement in statements:
                value = await connection.fetchval(statement)
            return value
        finally:
            await connection.close()

    return asyncio.run(run(), loop_factory=asyncio.new_event_loop)


async def wait_for_waiter(connection: Any, kind: str) -> None:
    """Wait until some session waits for a lock of this kind."""
    async with asyncio.timeout(5):
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = $1 AND NOT granted", kind):
            pass


def processes_of(data_dir: Path) -> list[Process]:
    name = place(data_dir, data_dir / "postgres", 5432).cluster_name
    return [process for process in running() if process.belongs_to(name)]


def postmaster_pid(root: Path) -> int:
    return int((root / "data/postmaster.pid").read_text().split()[0])


class Parent:
    """Another process that owns a server, as `parley serve` does."""

    def __init__(self, data_dir: Path, nobody_root: Path) -> None:
        self._arguments = [str(data_dir), str(nobody_root)]
        self._process: subprocess.Popen[str] | None = None

    def begin(self, isolation: str = "auto") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT, *self._arguments, isolation],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def start(self, isolation: str = "auto") -> None:
        self.begin(isolation)
        assert self._process
        assert self._process.stdout
        assert self._process.stdout.readline() == "started\n"

    def kill(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


@pytest.fixture
def parent(data_dir: Path, nobody_root: Path) -> Iterator[Parent]:
    process = Parent(data_dir, nobody_root)
    yield process
    process.kill()
    # The server needs its files until it has ended.
    wait_for(lambda: not processes_of(data_dir), "PostgreSQL is gone")


# Starting and stopping


def test_first_start(make: Make, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-postgres")
    with make(durable=True) as postgres:
        assert postgres.is_alive()
        assert postgres.url() == f"postgresql://parley_app@/parley?host={root}/run&port=5432"
        for role in ROLES:
            assert (
                query(postgres.url(role), "SELECT current_user || ' in ' || current_database()") == f"{role} in parley"
            )
        expected = {
            "listen_addresses": "",
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
            "max_connections": "200",
            "TimeZone": "UTC",
            "server_encoding": "UTF8",
            "idle_in_transaction_session_timeout": "1min",
        }
        assert {name: query(postgres.url(), f"SHOW {name}") for name in expected} == expected
        administrator = query(postgres.admin_url(), "SELECT current_user || ' in ' || current_database()")
        assert administrator == "postgres in postgres"
        assert stat.S_IMODE((root / "run").stat().st_mode) == 0o700
        assert stat.S_IMODE((root / "data").stat().st_mode) == 0o700
        pid = postmaster_pid(root)
        assert os.getpgid(pid) == pid, "a Ctrl-C in the terminal would reach PostgreSQL before us"
        if sys.platform == "linux":
            assert b"not-for-postgres" not in Path(f"/proc/{pid}/environ").read_bytes()
            held = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
            assert not [path for path in held if path.endswith("parley.lock")]
    assert not postgres.is_alive()
    assert not (root / "data/postmaster.pid").exists()


async def test_starts_while_a_loop_runs_and_serves_sqlalchemy(make: Make) -> None:
    with make() as postgres:
        engine = create_async_engine(postgres.url("parley_system").replace("postgresql:", "postgresql+asyncpg:"))
        settings = ", ".join(
            f"current_setting('{name}')" for name in ("fsync", "full_page_writes", "synchronous_commit")
        )
        try:
            async with engine.connect() as connection:
                row = (await connection.execute(text(f"SELECT current_user, {settings}"))).one()
        finally:
            await engine.dispose()
        assert tuple(row) == ("parley_system", "off", "off", "on")


def test_restart_keeps_data(make: Make) -> None:
    postgres = make(durable=True)
    with postgres:
        query(postgres.url("parley_owner"), "CREATE TABLE kept AS SELECT 42 AS answer")
    assert not postgres.restart_if_dead(), "it was stopped, it did not die"
    with postgres:
        assert query(postgres.url("parley_owner"), "SELECT answer FROM kept") == 42


def test_two_side_by_side(tmp_path: Path, nobody_root: Path) -> None:
    here = functools.partial(EmbeddedPostgres, durable=False, nobody_root=nobody_root)
    with here(tmp_path / "a") as a, here(tmp_path / "b") as b:
        query(a.url("parley_owner"), "CREATE TABLE only_here ()")
        assert query(b.url(), "SELECT to_regclass('only_here')::text") is None


def test_second_start_on_the_same_directory_is_refused(make: Make, data_dir: Path) -> None:
    with make() as first:
        with pytest.raises(DataDirectoryInUse, match=f"{data_dir}.*process {os.getpid()}"):
            make().start()
        assert query(first.url(), "SELECT 1") == 1
        with pytest.raises(RuntimeError, match="started already"):
            first.start()


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("name", ["x" * 100, "with space, and comma"])
def test_path_that_no_socket_can_have(nobody_root: Path, name: str) -> None:
    with EmbeddedPostgres(nobody_root / name, durable=False) as postgres:
        socket_dir = Path(query(postgres.admin_url(), "SHOW unix_socket_directories"))
        assert socket_dir.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert query(postgres.url(), "SELECT 1") == 1
    assert not socket_dir.exists()


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("kind", ["link", pytest.param("of another user", marks=needs_root)])
def test_socket_directory_of_someone_else_is_refused(tmp_path: Path, kind: str) -> None:
    data_dir = tmp_path / ("x" * 100)
    theirs = place(data_dir, data_dir / "postgres", 5432).socket_dir
    trap = tmp_path / "trap"
    trap.mkdir()
    if kind == "link":
        theirs.symlink_to(trap)
    else:
        theirs.mkdir()
        os.chown(theirs, 65534, 65534)
    try:
        with pytest.raises(UnusableDataDirectory, match="not a directory of ours"):
            EmbeddedPostgres(data_dir, durable=False).start()
    finally:
        theirs.unlink() if kind == "link" else theirs.rmdir()


@needs_linux
def test_start_outside_the_main_thread_is_refused(make: Make) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(make().start).result()


# Deaths


@needs_linux
def test_kill_of_the_parent_ends_the_server_and_loses_nothing(
    make: Make, parent: Parent, data_dir: Path, root: Path
) -> None:
    parent.start()
    owner = f"postgresql://parley_owner@/parley?host={root}/run"

    async def die_in_use() -> None:
        # With a session open: a shutdown that is polite would wait for it.
        connection = await asyncpg.connect(owner)
        await connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        assert processes_of(data_dir)
        parent.kill()
        wait_for(lambda: not processes_of(data_dir), "PostgreSQL is gone")
        connection.terminate()

    asyncio.run(die_in_use(), loop_factory=asyncio.new_event_loop)
    with make(durable=True) as postgres:
        assert query(postgres.url("parley_owner"), "SELECT answer FROM kept") == 42


@needs_linux
def test_start_right_after_the_kill_of_the_parent(make: Make, parent: Parent, root: Path) -> None:
    parent.start()
    old = postmaster_pid(root)
    parent.kill()
    with make(durable=True) as postgres:
        assert postmaster_pid(root) != old
        assert query(postgres.url(), "SELECT 1") == 1


def test_orphan_that_missed_the_signal_is_stopped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ORPHAN_GRACE_S", 0.1)
    orphan = make()
    orphan.start()
    try:
        query(orphan.url("parley_owner"), "CREATE TABLE kept ()")
        orphan._lock.release()  # as the death of its owner would
        with make() as postgres:
            assert not orphan.is_alive()
            assert query(postgres.url(), "SELECT to_regclass('kept')::text") == "kept"
    finally:
        orphan.stop()


def test_orphan_that_does_not_end_is_named(make: Make, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ORPHAN_GRACE_S", 0.1)
    monkeypatch.setattr(server, "_EARLIER_SERVER_TIMEOUT_S", 0.3)
    with make() as orphan:
        orphan._lock.release()
        pid = postmaster_pid(root)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DataDirectoryInUse, match=f"process .*{pid}"):
            make().start()
        os.kill(pid, signal.SIGCONT)


def test_server_started_by_hand_is_respected(make: Make, root: Path) -> None:
    postgres = make()
    postgres.start()
    who, bin_dir = postgres._identity, postgres._bin_dir
    postgres.stop()
    assert who is not None
    assert bin_dir is not None
    arguments = ["-D", str(root / "data"), "-c", "listen_addresses=", "-c", f"unix_socket_directories={root}/run"]
    by_hand = subprocess.Popen(
        who.command(bin_dir / "postgres", arguments), stderr=subprocess.DEVNULL, env=child_environment()
    )
    try:
        wait_for((root / "run/.s.PGSQL.5432").exists, "it is up", 10)
        with pytest.raises(DataDirectoryInUse, match=f"process {by_hand.pid}"):
            postgres.start()
        assert by_hand.poll() is None
    finally:
        by_hand.send_signal(signal.SIGINT)
        by_hand.wait(10)


def test_kill_of_the_server_is_repaired(make: Make, root: Path) -> None:
    async def die_in_use(postgres: EmbeddedPostgres) -> None:
        connection = await asyncpg.connect(postgres.url("parley_owner"))
        await connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        os.kill(postmaster_pid(root), signal.SIGKILL)
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await connection.execute("SELECT pg_sleep(60)")
        connection.terminate()

    with make(durable=True) as postgres:
        assert not postgres.restart_if_dead()
        asyncio.run(die_in_use(postgres), loop_factory=asyncio.new_event_loop)
        wait_for(lambda: not postgres.is_alive(), "the death is noticed")
        assert postgres.restart_if_dead()
        assert not postgres.restart_if_dead()
        assert query(postgres.url("parley_owner"), "SELECT answer FROM kept") == 42


def test_restart_waits_for_children_that_outlive_the_server(make: Make, data_dir: Path, root: Path) -> None:
    with make() as postgres:
        (stuck,) = [process.pid for process in processes_of(data_dir) if "checkpointer" in process.arguments[0]]
        os.kill(stuck, signal.SIGSTOP)
        os.kill(postmaster_pid(root), signal.SIGKILL)
        wait_for(lambda: not postgres.is_alive(), "the death is noticed")
        waker = threading.Timer(0.5, os.kill, (stuck, signal.SIGCONT))
        begun = time.monotonic()
        waker.start()
        assert postgres.restart_if_dead()
        assert time.monotonic() - begun > 0.5
        waker.join()
        assert query(postgres.url(), "SELECT 1") == 1


def test_restart_does_not_hide_a_lost_database(make: Make, data_dir: Path, root: Path) -> None:
    with make() as postgres:
        os.kill(postmaster_pid(root), signal.SIGKILL)
        wait_for(lambda: not processes_of(data_dir) and not postgres.is_alive(), "all are gone")
        shutil.rmtree(root / "data")
        with pytest.raises(UnusableDataDirectory, match="has gone"):
            postgres.restart_if_dead()


def test_number_of_a_dead_server_that_went_to_another_process(make: Make, root: Path) -> None:
    pid_file = root / "data/postmaster.pid"
    postgres = make()
    with postgres:
        written = pid_file.read_text()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        pid_file.write_text(written.replace(written.split()[0], str(other.pid), 1))
        (root / "run/.s.PGSQL.5432.lock").write_text(f"{other.pid}\n")
        with postgres:
            assert query(postgres.url(), "SELECT 1") == 1
        other.kill()


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_processes_by_ps_as_on_macos(make: Make, data_dir: Path) -> None:
    name = place(data_dir, data_dir / "postgres", 5432).cluster_name
    with make():
        listed = {process.pid for process in processes._running_by_ps() if process.belongs_to(name)}
        assert listed >= {process.pid for process in processes_of(data_dir) if "worker" not in process.arguments[0]}
        assert listed


# The first filling


def test_initdb_cut_short_leaves_nothing_half_made(make: Make, parent: Parent, root: Path) -> None:
    parent.begin()
    wait_for(lambda: any(root.glob("data.new-*/base")), "initdb is at work")
    parent.kill()
    assert not (root / "data").exists()
    # What a killed initdb could not tidy up.
    (root / "data.new-left").mkdir()
    (root / "data.new-left/PG_VERSION").write_text("18\n")
    with make(durable=True) as postgres:
        assert query(postgres.url(), "SELECT 1") == 1
    # The orphaned initdb may have written on while the first start was removing its files.
    orphans = f"{root}/data.new-"
    wait_for(lambda: not [one for one in processes.running() if orphans in " ".join(one.arguments)], "initdb ends", 60)
    (root / "data.new-late").mkdir()
    with make(durable=True):
        assert not list(root.glob("data.new-*"))


def test_kill_between_the_steps_is_made_good(make: Make) -> None:
    postgres = make()
    with postgres:
        admin = postgres.admin_url()
        query(admin, "DROP DATABASE parley")
        query(admin, "DROP ROLE parley_system")
        query(admin, "ALTER ROLE parley_app SUPERUSER CREATEDB NOLOGIN")
    with postgres:
        query(postgres.admin_url("parley"), "GRANT CREATE ON SCHEMA public TO PUBLIC")
    with postgres:
        assert_unprivileged(postgres)


def test_other_major_version(make: Make, data_dir: Path) -> None:
    data = data_dir / "postgres/data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(UnusableDataDirectory, match=r"made by PostgreSQL 16.*backup"):
        make().start()


def test_directory_of_something_else(make: Make, root: Path) -> None:
    (root / "data").mkdir(parents=True)
    (root / "data/novel.txt").write_text("It was a dark and stormy night")
    with pytest.raises(UnusableDataDirectory, match="neither empty nor"):
        make().start()
    assert (root / "data/novel.txt").exists()


@needs_root
def test_data_of_another_user(make: Make, root: Path) -> None:
    postgres = make()
    with postgres:
        pass
    os.chown(root / "data", 12345, 12345)
    with pytest.raises(UnusableDataDirectory, match="belongs to user 12345"):
        postgres.start()


def test_missing_binaries(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BinariesMissing, match="PARLEY_DATABASE_URL"):
        make().start()


def test_failed_start_shows_the_log_and_leaves_the_directory_free(make: Make) -> None:
    with pytest.raises(StartFailed, match=r"invalid value for parameter \"shared_buffers\""):
        make(shared_buffers="a lot").start()
    with make(shared_buffers="16MB") as postgres:
        assert query(postgres.url(), "SHOW shared_buffers") == "16MB"


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartFailed, match="could not be started"):
        EmbeddedPostgres(tmp_path / "file/d").start()


def test_large_log_is_put_aside(make: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOG_LIMIT_BYTES", 100)
    log = data_dir / "postgres/postgres.log"
    postgres = make()
    with postgres:
        pass
    first = log.read_text()
    with postgres:
        assert log.with_name("postgres.log.1").read_text() == first


# Root without namespaces


@needs_root
def test_nobody(make: Make, data_dir: Path, nobody_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    # With folders yet to make and a strict umask, which must not close them.
    postgres = make(isolation="nobody", nobody_root=nobody_root / "a/b")
    root = nobody_root / "a/b" / short_hash(data_dir)
    old_umask = os.umask(0o077)
    try:
        with caplog.at_level(logging.WARNING), postgres:
            query(postgres.url("parley_owner"), "CREATE TABLE kept AS SELECT 42 AS answer")
            assert query(postgres.admin_url(), "SHOW data_directory") == str(root / "data")
            assert (root / "data").owner() == "nobody"
            assert Path(f"/proc/{postmaster_pid(root)}").owner() == "nobody"
            os.kill(postmaster_pid(root), signal.SIGKILL)
            wait_for(lambda: not postgres.is_alive(), "the death is noticed")
            assert postgres.restart_if_dead()
    finally:
        os.umask(old_umask)
    assert "runs as nobody" in caplog.text
    with postgres:
        assert query(postgres.url("parley_owner"), "SELECT answer FROM kept") == 42


@needs_root
@needs_linux
def test_nobody_dies_with_its_parent(parent: Parent, data_dir: Path) -> None:
    parent.start("nobody")
    assert processes_of(data_dir)
    parent.kill()
    wait_for(lambda: not processes_of(data_dir), "PostgreSQL is gone")


@needs_root
def test_database_stays_where_it_was_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres = make()
    monkeypatch.setattr(server, "namespaces_work", lambda: False)
    with postgres:
        query(postgres.url("parley_owner"), "CREATE TABLE kept ()")
    monkeypatch.undo()
    with postgres:
        assert query(postgres.url(), "SELECT to_regclass('kept')::text") == "kept"


@needs_root
@pytest.mark.usefixtures("in_place")
def test_namespaces_that_are_refused_later(
    make: Make, nobody_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres = make()
    with postgres:
        pass
    refusing = tmp_path / "refusing.py"
    refusing.write_text(f"raise SystemExit({child.NAMESPACE_REFUSED})")
    monkeypatch.setattr(child, "__file__", str(refusing))
    with pytest.raises(StartFailed, match="user namespaces are refused"):
        postgres.start()
    assert list(nobody_root.iterdir()) == [], "no second, empty database was made"


@needs_linux
def test_child_whose_parent_is_gone_already_starts_nothing(tmp_path: Path) -> None:
    touch = shutil.which("touch")
    assert touch
    command = identity("none").command(Path(touch), [str(tmp_path / "made")])
    command[command.index(str(os.getpid()))] = "1"
    assert subprocess.run(command, check=False).returncode != 0
    assert not (tmp_path / "made").exists()


# Roles


def assert_unprivileged(postgres: EmbeddedPostgres) -> None:
    admin = postgres.admin_url("parley")
    names = ", ".join(f"'{role}'" for role in ROLES)
    assert query(admin, f"SELECT count(*) FROM pg_roles WHERE rolname IN ({names}) AND rolcanlogin") == 3
    privileged = "rolsuper OR rolbypassrls OR rolcreatedb OR rolcreaterole OR rolreplication"
    assert query(admin, f"SELECT count(*) FROM pg_roles WHERE rolname IN ({names}) AND ({privileged})") == 0
    assert query(admin, f"SELECT count(*) FROM pg_auth_members WHERE member::regrole::text IN ({names})") == 0
    assert query(admin, "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'parley'") == "parley_owner"
    assert query(postgres.url("parley_owner"), "CREATE TABLE made ()", "DROP TABLE made", "SELECT 1") == 1
    for role in ("parley_app", "parley_system"):
        assert query(admin, f"SELECT has_schema_privilege('{role}', 'public', 'USAGE')")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            query(postgres.url(role), "CREATE TABLE made ()")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            query(postgres.url(role), "SET ROLE parley_owner")


def test_roles_are_unprivileged(make: Make) -> None:
    with make() as postgres:
        assert_unprivileged(postgres)


async def test_roles_by_an_administrator_without_superuser(make: Make) -> None:
    make_roles = functools.partial(ensure_roles, owner="o'wner", app='a"pp', system="sys tem")
    with make() as postgres:
        super_connection = await asyncpg.connect(postgres.admin_url())
        await super_connection.execute("CREATE ROLE admin LOGIN CREATEROLE CREATEDB")
        admin = postgres.url("admin", "postgres")

        # Several at once, from two databases: the lock of one is not seen in the other.
        await super_connection.execute("CREATE DATABASE home OWNER admin")
        dsns = [admin, admin, postgres.url("admin", "home"), admin]
        await asyncio.gather(*(make_roles(dsn, "shop") for dsn in dsns))
        await make_roles(admin, "shop", passwords={"o'wner": "pass'word"})
        await make_roles(admin, "second")

        owners = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = ANY($1)"
        assert [row[0] for row in await super_connection.fetch(owners, ["shop", "second"])] == ["o'wner"] * 2
        stored = "SELECT rolpassword LIKE 'SCRAM%' FROM pg_authid WHERE rolname = 'o''wner'"
        assert await super_connection.fetchval(stored)
        await super_connection.close()

        connection = await asyncpg.connect(admin, database="shop")
        await connection.execute("""SET ROLE "o'wner"; CREATE TABLE made (); RESET ROLE""")
        await connection.execute("""SET ROLE "a""pp" """)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE other ()")
        await connection.close()


async def test_roles_wait_for_whoever_makes_them(make: Make) -> None:
    with make() as postgres:
        first = await asyncpg.connect(postgres.admin_url())
        await first.execute(f"SELECT pg_advisory_lock({database_roles._LOCK_KEY})")
        second = asyncio.create_task(ensure_roles(postgres.admin_url(), "shop", owner="late"))
        await wait_for_waiter(first, "advisory")
        assert not await first.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = 'late'")
        await first.close()
        await second


async def test_role_that_someone_else_makes_meanwhile(make: Make) -> None:
    """Through another database's lock; each waits for the other's transaction, then finds the role there."""
    with make() as postgres:
        first = await asyncpg.connect(postgres.admin_url("template1"))
        transaction = first.transaction()
        await transaction.start()
        await first.execute("CREATE ROLE late CREATEDB")
        second = asyncio.create_task(ensure_roles(postgres.admin_url(), owner="late"))
        await wait_for_waiter(first, "transactionid")
        await transaction.commit()
        await second
        found = await first.fetchrow("SELECT rolcanlogin, rolcreatedb FROM pg_roles WHERE rolname = 'late'")
        await first.close()
        assert tuple(found) == (True, False)


async def test_database_that_was_there_keeps_its_owner(make: Make) -> None:
    with make() as postgres:
        connection = await asyncpg.connect(postgres.admin_url())
        await connection.execute("CREATE DATABASE theirs")
        await ensure_database(postgres.admin_url(), "theirs")
        owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'theirs'"
        assert await connection.fetchval(owner) == "postgres"
        await connection.close()
        migrations = await asyncpg.connect(postgres.url("parley_owner", "theirs"))
        await migrations.execute("CREATE TABLE made (); CREATE SCHEMA more")
        await migrations.close()


async def test_rights_that_cannot_be_given_are_named(make: Make) -> None:
    with make() as postgres:
        connection = await asyncpg.connect(postgres.admin_url())
        await connection.execute("CREATE ROLE admin LOGIN CREATEROLE CREATEDB")
        await connection.execute("CREATE DATABASE theirs")
        await connection.close()
        with pytest.raises(RightsMissing, match=r"o may not create in schema public.*Let a superuser"):
            await ensure_roles(postgres.url("admin", "postgres"), "theirs", owner="o", app="a", system="s")
