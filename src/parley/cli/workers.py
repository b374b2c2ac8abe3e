"""Several processes behind one port: the parent starts them, and starts again what dies.

The parent has imported everything and listens; its workers are forks of it, so one that dies is replaced within a
fraction of a second, and what waits at the port meanwhile is answered by the others.
"""

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_LOOK_S = 0.25
# One that dies this soon after its start is started again more and more slowly.
_YOUNG_S = 5.0
_BACK_OFF_S = (0.0, 0.2, 1.0, 2.0, 5.0)
_FAILED = 70
_PR_SET_PDEATHSIG = 1

Work = Callable[[int, Callable[[], None]], None]
"""Serve as worker number n until a signal comes; call the second argument once requests are answered."""


class WorkersFailed(Exception):
    """No worker could be started."""


@dataclass
class _Worker:
    number: int
    pid: int
    ready: int
    """The reading end of a pipe: a byte comes when it answers, and the end when it is gone."""
    began: float = field(default_factory=time.monotonic)
    is_ready: bool = False
    leaving: bool = False


class Workers:
    """Runs `count` workers until a SIGTERM or SIGINT. A SIGHUP replaces them one after the other.

    Must be used from a process with one thread and no event loop: it forks.
    """

    def __init__(self, count: int, work: Work, *, look: Callable[[], None], all_ready: Callable[[], None]) -> None:
        self._count = count
        self._work = work
        self._look = look
        self._all_ready = all_ready
        self._workers: dict[int, _Worker] = {}
        self._deaths: dict[int, int] = {}
        self._due: dict[int, float] = {}
        self._replacing: list[int] = []
        self._stopping = False
        self._announced = False

    def run(self) -> None:
        """Serve. Raises `WorkersFailed` when the first ones end before they answered."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for number in range(1, self._count + 1):
                self._start(number)
            while self._workers or (self._due and not self._stopping):
                self._turn()
        finally:
            for worker in self._workers.values():
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _turn(self) -> None:
        pending = [due for due in self._due.values() if not self._stopping]
        wait = min([_LOOK_S if self._announced else 0.02, *(max(due - time.monotonic(), 0) for due in pending)])
        heard = signal.sigtimedwait(_SIGNALS, wait)
        if heard is not None and heard.si_signo in {signal.SIGTERM, signal.SIGINT}:
            self._stopping = True
            self._tell(signal.SIGTERM)
        elif heard is not None and heard.si_signo == signal.SIGHUP and not self._stopping:
            logger.info("replacing the workers one after the other")
            self._replacing = [pid for pid in self._workers if pid not in self._replacing]
            self._replace_next()
        for worker in list(self._workers.values()):
            self._hear(worker)
            self._reap(worker)
        self._start_due()
        self._look()

    def _tell(self, number: int) -> None:
        for worker in self._workers.values():
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def _hear(self, worker: _Worker) -> None:
        if worker.is_ready:
            return
        try:
            said = os.read(worker.ready, 1)
        except BlockingIOError:
            return
        if not said:
            return
        worker.is_ready = True
        if self._replacing:
            # Its replacement answers: now the old one may go.
            old = self._workers.get(self._replacing[0])
            if old is not None and old.number == worker.number:
                old.leaving = True
                os.kill(old.pid, signal.SIGTERM)
        if not self._announced and all(w.is_ready for w in self._workers.values()):
            self._announced = True
            self._all_ready()

    def _replace_next(self) -> None:
        while self._replacing and self._replacing[0] not in self._workers:
            self._replacing.pop(0)
        if self._replacing and not self._workers[self._replacing[0]].leaving:
            self._start(self._workers[self._replacing[0]].number)

    def _reap(self, worker: _Worker) -> None:
        pid, status = os.waitpid(worker.pid, os.WNOHANG)
        if pid == 0:
            return
        os.close(worker.ready)
        del self._workers[worker.pid]
        if self._stopping:
            return
        if worker.leaving:
            self._replacing.remove(worker.pid)
            self._replace_next()
            return
        code = os.waitstatus_to_exitcode(status)
        if not self._announced:
            self._stopping = True
            self._tell(signal.SIGTERM)
            raise WorkersFailed("the server could not start; the reason is in the lines above")
        if any(other.number == worker.number for other in self._workers.values()):
            return
        logger.error("worker is gone, starting another", extra={"worker": worker.number, "code": code})
        young = time.monotonic() - worker.began < _YOUNG_S
        deaths = self._deaths[worker.number] = self._deaths.get(worker.number, -1) + 1 if young else 0
        self._due[worker.number] = time.monotonic() + _BACK_OFF_S[min(deaths, len(_BACK_OFF_S) - 1)]

    def _start_due(self) -> None:
        for number, due in list(self._due.items()):
            if not self._stopping and due <= time.monotonic():
                del self._due[number]
                self._start(number)

    def _start(self, number: int) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._become(number, writing, parent)
        os.close(writing)
        self._workers[pid] = _Worker(number, pid, reading)

    def _become(self, number: int, writing: int, parent: int) -> None:
        """Be a worker; never returns: what the parent has open is not a worker's to close."""
        code = _FAILED
        try:
            # Ctrl-C goes to the parent, which passes it on in its own way.
            os.setpgid(0, 0)
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

            def ready() -> None:
                os.write(writing, b"1")

            self._work(number, ready)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:  # noqa: BLE001 - a worker ends here, whatever it was
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
                logging.shutdown()
            os._exit(code)


def _die_with(parent: int) -> None:
    """Be killed when the parent is: it holds the port and perhaps the database. Their replies are taken over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_FAILED)
