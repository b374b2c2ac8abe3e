"""A process that has imported everything and forks servers on demand: a start costs what the server does, no imports.

Run as `python -m tests.faults.zygote`. It reads one JSON object per line and answers each with one:
`{"spawn": {"log": path, "cwd": path, "environment": {…}, "arguments": […]}}` → `{"pid": n}`,
`{"wait": pid}` → `{"status": exit code, negative for a signal, or null while it runs}`.
A server writes what it holds to `<log>.counts` on SIGUSR2. All of them end with this process, and it with its parent.
"""

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_OURS = ("PARLEY_", "OPENAI_", "ANTHROPIC_", "LOCAL_LLM_")


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends, however it does."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import parley.cli.serve
    import parley.main  # noqa: F401 - what a server needs, in memory before the first fork

    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "spawn" in asked:
            answer: dict[str, Any] = {"pid": _spawn(asked["spawn"])}
        else:
            answer = {"status": _wait(asked["wait"])}
        print(json.dumps(answer), flush=True)


def _spawn(wanted: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _become_server(wanted, parent)
        except BaseException:  # noqa: BLE001 - nothing of the parent may run on in the child
            traceback.print_exc()
        finally:
            os._exit(70)
    return pid


def _wait(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _become_server(wanted: dict[str, Any], parent: int) -> NoReturn:
    die_with_parent(parent)
    # A session of its own: what it starts itself can be ended with it.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 256)
    for name in [name for name in os.environ if name.startswith(_OURS)]:
        del os.environ[name]
    os.environ.update(wanted["environment"])
    os.chdir(wanted["cwd"])
    counts = Path(f"{wanted['log']}.counts")
    signal.signal(signal.SIGUSR2, lambda *_: _write_counts(counts))
    sys.argv = ["parley", *wanted["arguments"]]
    from parley.cli import main as run
    from parley.core import clock

    # The process's own clock; the database keeps its own.
    wrong = clock.shifted(float(os.environ.pop("FAULTS_CLOCK_S", "0")))
    wrong.__enter__()
    code = 0
    try:
        run()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _write_counts(path: Path) -> None:
    """Write the number of tasks; descriptors and memory can be seen from outside."""
    gc.collect()
    loop = asyncio._get_running_loop()
    tasks = [] if loop is None else [task.get_name() for task in asyncio.all_tasks(loop)]
    spare = path.with_suffix(".new")
    spare.write_text(json.dumps({"tasks": tasks}))
    spare.replace(path)


if __name__ == "__main__":
    main()
