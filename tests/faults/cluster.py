"""Server processes on one PostgreSQL, quick to start and to kill."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from benchmarks.fake_provider import FakeProvider
from parley.core.db import DatabaseUrls
from tests.faults.provider import Provider

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "correct horse 1"
_READY = re.compile(r"Parley is ready(?: at http://[^\s:]+:(\d+))?")

REGISTRY = """
providers:
  faulty: {{kind: openai, base_url: "{url}", api_key: "none"}}
  background: {{kind: openai_responses, base_url: "{background}/v1", api_key: "none"}}
models:
  plain:
    provider: faulty
    name: plain
    capabilities: [tools]
    timeouts: {{connect: 2, first_token: 20, idle: 20, total: 300}}
    retries: 1
  prefill:
    provider: faulty
    name: prefill
    capabilities: [tools]
    prefill: prefix
    timeouts: {{connect: 2, first_token: 20, idle: 20, total: 300}}
    retries: 1
  reattach:
    provider: background
    name: reattach
    capabilities: [tools]
    timeouts: {{connect: 2, first_token: 20, idle: 20, total: 300}}
    retries: 1
  falling:
    provider: faulty
    name: falling
    prefill: prefix
    timeouts: {{connect: 2, first_token: 20, idle: 20, total: 300}}
    retries: 0
    fallbacks: [plain]
aliases:
  default: [plain]
"""


class Zygote:
    """The parent of all servers of a run."""

    def __init__(self, root: Path = ROOT) -> None:
        path = os.pathsep.join([str(root / "src"), str(root)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the parent of the servers is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        return self._answer()

    def spawn(self, **wanted: Any) -> int:
        """Fork a server; return its pid at once."""
        return int(self._ask({"spawn": wanted})["pid"])

    def status(self, pid: int) -> int | None:
        """Return how a server ended, or None while it runs. Ask once more after an answer and it is an error."""
        status: int | None = self._ask({"wait": pid})["status"]
        return status

    def close(self) -> None:
        """End all servers and their parent."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def zygote(root: Path = ROOT) -> Iterator[Zygote]:
    """Run the parent of servers for the length of the block."""
    made = Zygote(root)
    try:
        yield made
    finally:
        made.close()


@dataclass
class Member:
    """A server process. `port` stays the same over its restarts."""

    name: str
    role: str
    environment: dict[str, str]
    pid: int = 0
    port: int = 0
    starts: int = 0
    log: Path = Path()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/v1/realtime"

    @property
    def alive(self) -> bool:
        return self.pid != 0

    def rss_bytes(self) -> int:
        """Return the memory that it has to itself, pages shared with its parent left out."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    async def tasks(self) -> list[str]:
        """Return the names of its tasks."""
        path = Path(f"{self.log}.counts")
        os.kill(self.pid, signal.SIGUSR2)
        deadline = time.monotonic() + 5
        while (text := _taken(path)) is None:
            assert time.monotonic() < deadline, "it does not say what it runs"
            await asyncio.sleep(0.01)
        tasks: list[str] = json.loads(text)["tasks"]
        return tasks


def _taken(path: Path) -> str | None:
    """Return a file's text and remove it, once it is there."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    path.unlink()
    return text


@dataclass
class Account:
    """Someone who can send."""

    token: str
    user_id: str
    workspace_id: str
    refresh_token: str
    email: str


@dataclass
class Cluster:
    """The processes, their database and their provider."""

    zygote: Zygote
    directory: Path
    urls: DatabaseUrls
    provider: Provider
    background: FakeProvider
    """What goes on without a reader, and can be read on by another process."""
    admin: asyncpg.Pool
    """Superuser's connections, past every policy."""
    redis_url: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    start_times_s: list[float] = field(default_factory=list)

    def _environment(self, member: Member) -> dict[str, str]:
        return {
            "PARLEY_ENV": "testing",
            "PARLEY_DATA_DIR": str(self.directory / member.name),
            # PostgreSQL then knows whose each connection is.
            "PARLEY_DATABASE_URL": f"{self.urls.app}&application_name={member.name}",
            "PARLEY_DATABASE_SYSTEM_URL": f"{self.urls.system}&application_name={member.name}",
            "PARLEY_DATABASE_OWNER_URL": self.urls.owner,
            "PARLEY_DATABASE_POOL_SIZE": "6",
            "PARLEY_SECRET_KEY": "one key for all of the processes, long enough",
            "PARLEY_RATE_LIMITS": "off",
            "PARLEY_AUTH_ACCESS_TOKEN_MINUTES": "1440",
            "PARLEY_REALTIME_CONNECTIONS_PER_USER": "200",
            "PARLEY_LOG_CONSOLE": "json",
            "PARLEY_LOG_FILES": "false",
            "PARLEY_LLM_REGISTRY": str(self.directory / "registry.yaml"),
            # Scenarios fail one after the other at one provider, and each counts its calls.
            "PARLEY_LLM_BREAKER_FAILURES": "0",
            "PARLEY_PORT": str(member.port),
            **({"PARLEY_REDIS_URL": self.redis_url} if self.redis_url else {}),
            **({} if member.role == "all" else {"PARLEY_ROLE": member.role}),
            **self.environment,
            **member.environment,
        }

    # -- processes -----------------------------------------------------------------------------------------------

    def add(self, name: str, *, role: str = "all", **environment: str) -> Member:
        """Name a process; `start` brings it up."""
        made = self.members[name] = Member(name, role, environment)
        (self.directory / name).mkdir(parents=True, exist_ok=True)
        return made

    def fork(self, member: Member) -> None:
        """Begin to start a process; `ready` waits for it."""
        assert not member.alive, f"{member.name} runs"
        member.starts += 1
        member.log = self.directory / f"{member.name}-{member.starts}.log"
        member.log.touch()
        member.pid = self.zygote.spawn(
            log=str(member.log), cwd=str(self.directory), environment=self._environment(member), arguments=["serve"]
        )

    async def ready(self, member: Member, *, timeout_s: float = 30) -> None:
        """Return once a process that was forked answers."""
        deadline = time.monotonic() + timeout_s
        while True:
            if found := _READY.search(member.log.read_text()):
                member.port = int(found[1] or 0)
                return
            status = self.zygote.status(member.pid)
            if status is not None or time.monotonic() > deadline:
                if status is not None:
                    member.pid = 0
                text = member.log.read_text()[-4000:]
                raise AssertionError(f"{member.name} did not start ({status}):\n{text}")
            await asyncio.sleep(0.01)

    async def start(self, member: Member) -> Member:
        """Start a process; return once it answers."""
        began = time.monotonic()
        self.fork(member)
        await self.ready(member)
        self.start_times_s.append(time.monotonic() - began)
        return member

    async def kill(self, member: Member) -> None:
        """End a process as a power cut would."""
        self.signal(member, signal.SIGKILL)
        await self.ended(member)

    async def ended(self, member: Member, *, timeout_s: float = 30) -> int:
        """Return the exit code of a process that was told to end."""
        deadline = time.monotonic() + timeout_s
        while (status := self.zygote.status(member.pid)) is None:
            assert time.monotonic() < deadline, f"{member.name} does not end"
            await asyncio.sleep(0.002)
        member.pid = 0
        return status

    def signal(self, member: Member, number: signal.Signals) -> None:
        """Send a signal to a process and to what it has started."""
        assert member.alive
        if number in {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT}:
            os.killpg(member.pid, number)
        else:
            os.kill(member.pid, number)

    def alive(self, *roles: str) -> list[Member]:
        """Return the processes that run, of these roles."""
        return [m for m in self.members.values() if m.alive and (not roles or m.role in roles)]

    def sockets(self) -> list[str]:
        """Return where clients may connect, dead or alive."""
        return [m.ws_url for m in self.members.values() if m.role != "gen" and m.port]

    async def owner(self, reply_id: str) -> Member | None:
        """Return the process that generates a reply, found by who holds its advisory lock."""
        name = await self.admin.fetchval(
            """
            SELECT a.application_name FROM replies r
            JOIN pg_locks l ON l.locktype = 'advisory' AND l.objid = r.owner::oid AND l.objsubid = 2 AND l.granted
            JOIN pg_stat_activity a ON a.pid = l.pid WHERE r.id = $1::uuid AND r.status = 'streaming'
            """,
            reply_id,
        )
        return self.members.get(name or "")

    async def reconnect(self, admin_url: str) -> None:
        """Connect the superuser again, once the database answers."""
        self.admin.terminate()
        deadline = time.monotonic() + 20
        while True:
            try:
                self.admin = await _superuser(admin_url)
                return
            except (OSError, asyncpg.PostgresError):
                assert time.monotonic() < deadline, "the database does not come back"
                await asyncio.sleep(0.02)

    # -- people --------------------------------------------------------------------------------------------------

    async def sign_up(self, email: str) -> Account:
        """Make an account."""
        body = {"email": email, "password": PASSWORD, "confirmPassword": PASSWORD}
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{self._any().url}/api/v1/auth/signup", json=body, timeout=30)
        assert answer.status_code == 201, answer.text
        data = answer.json()["data"]
        return Account(data["access_token"], data["user"]["id"], data["workspace"]["id"], data["refresh_token"], email)

    async def call(self, account: Account, method: str, path: str, *, at: Member | None = None, **options: Any) -> Any:
        """Ask over HTTP; return the `data` of the answer."""
        headers = {"Authorization": f"Bearer {account.token}", **options.pop("headers", {})}
        deadline = time.monotonic() + 20
        async with httpx.AsyncClient(headers=headers) as http:
            while True:
                try:
                    url = f"{(at or self._any()).url}/api/v1/{path}"
                    answer = await http.request(method, url, timeout=10, **options)
                except httpx.TransportError:
                    # It was killed under us. What is asked here may be asked twice.
                    assert time.monotonic() < deadline, f"nobody answers {method} {path}"
                else:
                    # After a fault of the database a process may need a moment; it says so.
                    if answer.status_code != 503 or time.monotonic() > deadline:
                        break
                await asyncio.sleep(0.1)
        assert answer.status_code < 300, f"{answer.status_code} {answer.text}"
        return answer.json()["data"] if answer.content else None

    async def conversation(self, account: Account, **fields: Any) -> str:
        """Make a conversation; return its id."""
        return str((await self.call(account, "POST", "conversations", json=fields))["id"])

    def _any(self) -> Member:
        found = [m for m in self.members.values() if m.role != "gen" and m.port]
        return next((m for m in found if m.alive), found[0])


async def _superuser(url: str) -> asyncpg.Pool:
    return await asyncpg.create_pool(url, min_size=1, max_size=6)


def _write_registry(directory: Path, provider: Provider, background: FakeProvider) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "registry.yaml").write_text(REGISTRY.format(url=provider.url, background=background.url))


@asynccontextmanager
async def cluster(
    zygote: Zygote, directory: Path, urls: DatabaseUrls, admin_url: str, *, redis_url: str | None = None,
    **environment: str,
) -> AsyncIterator[Cluster]:  # fmt: skip
    """Make a cluster without members; whatever was started in it is gone at the end."""
    admin = await _superuser(admin_url)
    async with Provider.serving() as provider, FakeProvider() as background:
        _write_registry(directory, provider, background)
        made = Cluster(zygote, directory, urls, provider, background, admin, redis_url, environment)
        try:
            yield made
        finally:
            for member in made.alive():
                await made.kill(member)
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                async with asyncio.timeout(2):
                    await made.admin.close()
