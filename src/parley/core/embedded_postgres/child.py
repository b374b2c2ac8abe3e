"""Turn this process into PostgreSQL, as a user that it accepts, bound to the life of its parent.

Run by path: `python -I -S child.py ISOLATION PARENT_PID UID GID PROGRAM ARGUMENT...`. An interpreter of its own is
needed, since only a process with one thread can make a user namespace. It imports little, so it costs milliseconds.
"""

import ctypes
import os
import signal
import sys

NAMESPACE_REFUSED = 77
_PARENT_GONE = 78
_PR_SET_PDEATHSIG = 1


def _enter_namespace(uid: int, gid: int) -> None:
    """Make a user namespace in which the current user is `uid`; outside of it nothing changes."""
    assert sys.platform == "linux"
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    try:
        os.unshare(os.CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {outer_uid} 1"),
            ("gid_map", f"{gid} {outer_gid} 1"),
        ):
            descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(descriptor, text.encode())
            os.close(descriptor)
    except OSError as error:
        os.write(2, f"user namespaces are refused here: {error}\n".encode())
        os._exit(NAMESPACE_REFUSED)


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def _die_with(parent: int) -> None:
    """Ask for a fast shutdown (SIGINT) at the parent's death. A change of credentials would undo it: it comes last."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0) != 0:
            os.write(2, f"prctl: {os.strerror(ctypes.get_errno())}\n".encode())
            os._exit(1)
    if os.getppid() != parent:
        os._exit(_PARENT_GONE)


def main() -> None:
    """Do what the arguments say; on success this never returns."""
    isolation, parent, uid, gid, *command = sys.argv[1:]
    # A shell that puts its children into the background may have made them deaf to it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o077)
    if isolation == "namespace":
        _enter_namespace(int(uid), int(gid))
    elif isolation == "nobody":
        _become(int(uid), int(gid))
    _die_with(int(parent))
    if command:
        os.execv(command[0], command)  # noqa: S606 - there is no shell to want


if __name__ == "__main__":
    main()
