"""The data directory: its lock, its layout, its first filling."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from parley.core.embedded_postgres.binaries import MAJOR_VERSION
from parley.core.embedded_postgres.child import NAMESPACE_REFUSED
from parley.core.embedded_postgres.errors import (
    DataDirectoryInUse,
    NamespaceRefused,
    StartFailed,
    UnusableDataDirectory,
)
from parley.core.embedded_postgres.isolation import Identity, child_environment

_INITDB_TIMEOUT_S = 120
# The kernel takes 107 bytes; some left, since clients put a suffix to it.
_SOCKET_PATH_LIMIT = 100
# A comma separates hosts in a DSN and directories in the server's setting; the rest is caution.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./@+=~-]+")


class DirectoryLock:
    """One server per data directory. The kernel releases it with the process, however that ends."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "parley.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise `DataDirectoryInUse`."""
        # Python opens files close-on-exec, so PostgreSQL does not hold the lock after our death.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise DataDirectoryInUse(
                f"The data directory {self._path.parent} is in use by another Parley"
                f"{f' (process {holder})' if holder else ''}. Stop it, or choose another with PARLEY_DATA_DIR."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two processes lock two files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one server keeps its files."""

    data: Path
    """What PostgreSQL calls PGDATA."""
    socket_dir: Path
    cluster_name: str
    """Unique to the directory; every process of the server carries it in its command line."""

    def has_cluster(self) -> bool:
        """Whether there is a database already."""
        return (self.data / "PG_VERSION").is_file()


def short_hash(path: Path) -> str:
    """Return a name for a directory, the same each time."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def place(data_dir: Path, root: Path, port: int) -> Place:
    """Lay out the files of `data_dir`'s server below `root`."""
    name = f"parley-{short_hash(data_dir)}"
    socket_dir = root / "run"
    plain = _PLAIN_PATH.fullmatch(str(socket_dir))
    if not plain or len(os.fsencode(socket_dir / f".s.PGSQL.{port}")) >= _SOCKET_PATH_LIMIT:
        socket_dir = Path(tempfile.gettempdir()) / name
    return Place(data=root / "data", socket_dir=socket_dir, cluster_name=name)


def make_reachable(folder: Path) -> None:
    """Make a folder that other users can pass through; those that exist are left as they are."""
    for level in (*reversed(folder.parents), folder):
        try:
            level.mkdir()
        except FileExistsError:
            continue
        level.chmod(0o755)


def prepare_socket_dir(socket_dir: Path, identity: Identity) -> None:
    """Make the directory, private to the server's user, and empty it. The caller holds the lock."""
    try:
        socket_dir.mkdir(mode=0o700)
        identity.hand_over(socket_dir)
    except FileExistsError:
        # It may lie in a folder where everyone can write: whoever owns it could listen in our place.
        found = socket_dir.lstat()
        if socket_dir.is_symlink() or not socket_dir.is_dir() or found.st_uid != identity.file_owner:
            raise UnusableDataDirectory(
                f"{socket_dir}, where the socket of PostgreSQL belongs, is not a directory of ours. Remove it."
            ) from None
    socket_dir.chmod(0o700)
    # Left by a server that was killed; their process number may belong to someone else by now.
    for leftover in socket_dir.glob(".s.PGSQL.*"):
        leftover.unlink()


def ensure_cluster(here: Place, identity: Identity, bin_dir: Path, *, durable: bool) -> None:
    """Run initdb if there is no database yet, and check the one that is there."""
    data = here.data
    # Of an initdb that was killed. One that is orphaned may write on while this removes; the next start has the rest.
    for leftover in data.parent.glob("data.new-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if here.has_cluster():
        _check(data, identity)
        return
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise UnusableDataDirectory(f"{data} is neither empty nor a PostgreSQL data directory. Move it away.")
    # Filled under another name: a kill in the middle leaves nothing that looks like a database.
    # The name differs each time, since an orphaned initdb may still be tidying up after itself.
    fresh = Path(tempfile.mkdtemp(prefix="data.new-", dir=data.parent))
    identity.hand_over(fresh)
    _initdb(fresh, identity, bin_dir, durable=durable)
    fresh.rename(data)
    if durable:
        parent = os.open(data.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)


def _initdb(fresh: Path, identity: Identity, bin_dir: Path, *, durable: bool) -> None:
    # macOS has no C.UTF-8 of its own; PostgreSQL brings one that sorts alike.
    locale = (
        ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if sys.platform == "darwin"
        else ["--locale=C.UTF-8"]
    )
    arguments = ["--no-instructions", "--auth=trust", "--encoding=UTF8", *locale, "-U", "postgres"]
    if not durable:
        arguments.append("--no-sync")
    run = subprocess.run(  # noqa: S603 - our own interpreter and binaries
        identity.command(bin_dir / "initdb", [*arguments, "-D", str(fresh)]),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_INITDB_TIMEOUT_S,
        cwd="/",
        env=child_environment(),
    )
    if run.returncode == NAMESPACE_REFUSED:
        raise NamespaceRefused(run.stdout.strip())
    if run.returncode != 0:
        words = "\n".join(run.stdout.splitlines()[-8:])
        raise StartFailed(f"The database in {fresh.parent} could not be created. The last words of initdb:\n{words}")


def _check(data: Path, identity: Identity) -> None:
    version = (data / "PG_VERSION").read_text().strip()
    if version != MAJOR_VERSION:
        raise UnusableDataDirectory(
            f"{data} was made by PostgreSQL {version}; this Parley brings PostgreSQL {MAJOR_VERSION}, which cannot "
            f"read it. Make a backup with the Parley that made it, move the directory away, and restore the backup; "
            f"or set PARLEY_DATABASE_URL to a PostgreSQL {version} server."
        )
    owner = data.stat().st_uid
    if owner != identity.file_owner:
        raise UnusableDataDirectory(
            f"{data} belongs to user {owner}, and PostgreSQL would run here with the rights of user "
            f"{identity.file_owner}. Start Parley as the user who made it, or give it away: "
            f"chown -R {identity.file_owner} {data}"
        )
