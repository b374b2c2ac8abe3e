"""As whom PostgreSQL runs. It refuses root, so root needs a way around that leaves the machine as it is."""

import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parley.core.embedded_postgres import child

Isolation = Literal["auto", "namespace", "nobody", "none"]

# What root looks like inside the namespace; any ordinary number serves.
_NAMESPACE_ID = 1000
_OVERFLOW_ID = 65534


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A way to run the server: `none` as the current user, `namespace` and `nobody` when that is root."""

    isolation: Literal["namespace", "nobody", "none"]
    uid: int
    gid: int

    @property
    def file_owner(self) -> int:
        """The user that owns the server's files, seen from outside."""
        return self.uid if self.isolation == "nobody" else os.geteuid()

    def command(self, program: Path | None = None, arguments: Sequence[str] = ()) -> list[str]:
        """Return the command that runs `program` this way and lets it die with this process."""
        return [
            *(sys.executable, "-I", "-S", child.__file__),
            *(self.isolation, str(os.getpid()), str(self.uid), str(self.gid)),
            *([str(program)] if program else []),
            *arguments,
        ]

    def hand_over(self, path: Path) -> None:
        """Give a fresh directory to the user that the server runs as."""
        if self.isolation == "nobody":
            os.chown(path, self.uid, self.gid)


def identity(isolation: Literal["namespace", "nobody", "none"]) -> Identity:
    """Return the identity for a chosen isolation."""
    if isolation == "namespace":
        return Identity(isolation="namespace", uid=_NAMESPACE_ID, gid=_NAMESPACE_ID)
    if isolation == "nobody":
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            return Identity(isolation="nobody", uid=_OVERFLOW_ID, gid=_OVERFLOW_ID)
        return Identity(isolation="nobody", uid=nobody.pw_uid, gid=nobody.pw_gid)
    return Identity(isolation="none", uid=os.geteuid(), gid=os.getegid())


def namespaces_work() -> bool:
    """Try to make a user namespace in a child. Default containers and hardened kernels refuse."""
    if sys.platform != "linux":
        return False
    attempt = subprocess.run(  # noqa: S603 - our own interpreter and file
        identity("namespace").command(), capture_output=True, check=False, timeout=30, env=child_environment()
    )
    return attempt.returncode == 0


def child_environment() -> dict[str, str]:
    """Return the little that PostgreSQL needs. It must not see our secrets, nor settings such as PGPORT."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}
