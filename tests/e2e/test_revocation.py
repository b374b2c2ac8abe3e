"""Access that ends in one process ends in another within two seconds: requests, sockets and streams."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import pytest

from parley.core.embedded_postgres import EmbeddedPostgres
from tests.conftest import TestDatabases
from tests.jobs.conftest import until
from tests.live import Socket, dial
from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

PASSWORD = "correct horse 1"
LIMIT_S = 2.0
_LISTENERS = (
    "FROM pg_stat_activity WHERE datname = current_database() AND usename = 'parley_system'"
    " AND (query ILIKE 'LISTEN%' OR query = 'SELECT 1')"
)
_numbers = itertools.count(1)


@dataclass
class Pair:
    """Two servers on one database, and a superuser of it."""

    one: ServerProcess
    two: ServerProcess
    admin: asyncpg.Connection

    async def deafen(self) -> None:
        """End the connections on which both servers listen, once they do."""

        async def both_listen() -> bool:
            return bool(await self.admin.fetchval(f"SELECT count(*) >= 2 {_LISTENERS}"))

        await until(both_listen)
        await self.admin.fetch(f"SELECT pg_terminate_backend(pid) {_LISTENERS}")


@pytest.fixture(scope="module")
async def pair(
    databases: TestDatabases, postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    urls = await databases.create()
    environment = {
        "PARLEY_DATABASE_URL": urls.app,
        "PARLEY_DATABASE_SYSTEM_URL": urls.system,
        "PARLEY_DATABASE_OWNER_URL": urls.owner,
        "PARLEY_SECRET_KEY": "one key for the two of them, long enough",
        "PARLEY_RATE_LIMITS": "off",
    }
    base = tmp_path_factory.mktemp("revocation")
    admin = await asyncpg.connect(postgres.admin_url(urls.name))
    with server_process(base / "one", **environment) as one, server_process(base / "two", **environment) as two:
        yield Pair(one, two, admin)
    await admin.close()
    await databases.drop(urls)


@dataclass
class Person:
    """Someone who signed up at the first server, and what they have open at the second."""

    data: dict[str, Any]
    http: httpx.AsyncClient
    pair: Pair

    @property
    def user_id(self) -> str:
        return str(self.data["user"]["id"])

    @property
    def workspace_id(self) -> str:
        return str(self.data["workspace"]["id"])

    async def call(self, server: ServerProcess, method: str, path: str, **options: Any) -> httpx.Response:
        return await self.http.request(method, f"{server.url}/api/v1/{path}", **options)

    async def adopt(self, data: dict[str, Any]) -> None:
        self.data = data
        self.http.headers["Authorization"] = f"Bearer {data['access_token']}"

    async def socket(self) -> Socket:
        made = await dial(self.pair.two)
        await made.send(t="hello", v=1, auth={"token": self.data["access_token"]}, subs=[])
        assert (await made.receive())["t"] == "welcome"
        return made

    async def stream(self) -> asyncio.Task[float]:
        """Open a stream of events; the task ends when the stream does, with the time."""
        made = await self.call(self.pair.two, "POST", "conversations", json={})
        url = f"{self.pair.two.url}/api/v1/channels/conversation:{made.json()['data']['id']}/events"
        opened = asyncio.Event()

        async def read() -> float:
            async with self.http.stream("GET", url, timeout=30) as answer:
                assert answer.status_code == 200
                async for _ in answer.aiter_bytes():
                    opened.set()
            return time.monotonic()

        task = asyncio.create_task(read())
        waiter = asyncio.create_task(opened.wait())
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        waiter.cancel()
        assert opened.is_set(), "the stream did not open"
        assert not task.done()
        return task

    async def refused(self, server: ServerProcess) -> tuple[float, str]:
        """Return when a request was first refused, and with what."""
        deadline = time.monotonic() + 10
        while True:
            answer = await self.call(server, "GET", "me")
            if answer.status_code == 401:
                return time.monotonic(), answer.json()["error"]
            assert answer.status_code == 200, answer.text
            assert time.monotonic() < deadline, "it was never refused"
            await asyncio.sleep(0.02)


NewPerson = Callable[[], Awaitable[Person]]


@pytest.fixture
async def person(pair: Pair) -> AsyncIterator[NewPerson]:
    clients = []

    async def make() -> Person:
        http = httpx.AsyncClient()
        clients.append(http)
        body = {"email": f"p{next(_numbers)}@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
        answer = await http.post(f"{pair.one.url}/api/v1/auth/signup", json=body)
        assert answer.status_code == 201, answer.text
        made = Person({}, http, pair)
        await made.adopt(answer.json()["data"])
        # In the memory of both, for thirty seconds if nobody told them otherwise.
        for server in (pair.one, pair.two):
            assert (await made.call(server, "GET", "me")).status_code == 200
        return made

    yield make
    for http in clients:
        await http.aclose()


async def closed_at(socket: Socket) -> tuple[float, int]:
    code = await socket.closed()
    return time.monotonic(), code


async def assert_open(socket: Socket) -> None:
    """Hold that a socket answers: it does not know this frame, and says so."""
    await socket.send(t="unheard.of", id=1)
    assert (await socket.receive())["t"] == "err"


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "while nobody listens"])
async def test_signing_out_in_one_ends_everything_in_the_other(pair: Pair, person: NewPerson, heard: bool) -> None:
    ada, bob = await person(), await person()
    socket, bobs = await ada.socket(), await bob.socket()
    stream = await ada.stream()
    closing = asyncio.create_task(closed_at(socket))
    if not heard:
        await pair.deafen()
    answer = await ada.call(pair.one, "POST", "auth/signout")
    assert answer.status_code == 204
    began = time.monotonic()
    (refused, code), (closed, close_code), ended = await asyncio.gather(ada.refused(pair.two), closing, stream)
    assert code == "session_revoked"
    assert close_code == 4403
    assert max(refused, closed, ended) - began < LIMIT_S
    # Nobody else was touched.
    assert (await bob.call(pair.two, "GET", "me")).status_code == 200
    await assert_open(bobs)
    await bobs.connection.close()


async def test_a_password_reset_by_its_owner_ends_the_others_elsewhere(pair: Pair, person: NewPerson) -> None:
    ada = await person()
    elsewhere = Person({}, httpx.AsyncClient(), pair)
    credentials = {"email": ada.data["user"]["email"], "password": PASSWORD}
    answer = await elsewhere.call(pair.two, "POST", "auth/signin", json=credentials)
    await elsewhere.adopt(answer.json()["data"])
    socket, mine = await elsewhere.socket(), await ada.socket()
    closing = asyncio.create_task(closed_at(socket))
    new = {"current_password": PASSWORD, "password": "another horse 2", "confirmPassword": "another horse 2"}
    assert (await ada.call(pair.one, "POST", "auth/password/change", json=new)).status_code == 204
    began = time.monotonic()
    (refused, code), (closed, close_code) = await asyncio.gather(elsewhere.refused(pair.two), closing)
    assert (code, close_code) == ("session_revoked", 4403)
    assert max(refused, closed) - began < LIMIT_S
    # The session that changed it goes on, on its socket too.
    assert (await ada.call(pair.two, "GET", "me")).status_code == 200
    await assert_open(mine)
    await mine.connection.close()
    await elsewhere.http.aclose()


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "while nobody listens"])
async def test_rights_that_change_and_end(pair: Pair, person: NewPerson, heard: bool) -> None:
    ada, bob = await person(), await person()
    await pair.admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'member')", ada.workspace_id, bob.user_id
    )
    switched = await bob.call(pair.one, "POST", "auth/switch", json={"workspace_id": ada.workspace_id})
    assert switched.status_code == 200, switched.text
    await bob.adopt(switched.json()["data"])
    path = f"workspaces/{ada.workspace_id}/members/{bob.user_id}"
    for method, options, code in (("PATCH", {"json": {"role": "viewer"}}, 4000), ("DELETE", {}, 4403)):
        assert (await bob.call(pair.two, "GET", "me")).status_code == 200
        socket, adas = await bob.socket(), await ada.socket()
        closing = asyncio.create_task(closed_at(socket))
        if not heard:
            await pair.deafen()
        answer = await ada.call(pair.one, method, path, **options)
        assert answer.status_code in {200, 204}, answer.text
        began = time.monotonic()
        closed, close_code = await closing
        assert close_code == code
        assert closed - began < LIMIT_S
        if code == 4000:
            assert socket.connection.close_reason == "rights changed"
            while (await bob.call(pair.two, "POST", "conversations", json={})).status_code != 403:
                assert time.monotonic() - began < LIMIT_S
                await asyncio.sleep(0.02)
        else:
            refused, _ = await bob.refused(pair.two)
            assert refused - began < LIMIT_S
        await assert_open(adas)
        await adas.connection.close()


async def test_a_switch_closes_what_is_open_in_the_old_workspace(pair: Pair, person: NewPerson) -> None:
    ada = await person()
    made = await ada.call(pair.one, "POST", "workspaces", json={"name": "Another"})
    assert made.status_code == 201, made.text
    socket, stream = await ada.socket(), await ada.stream()
    closing = asyncio.create_task(closed_at(socket))
    answer = await ada.call(pair.one, "POST", "auth/switch", json={"workspace_id": made.json()["data"]["id"]})
    began = time.monotonic()
    (refused, _), (closed, close_code), ended = await asyncio.gather(ada.refused(pair.two), closing, stream)
    assert close_code == 4403
    assert max(refused, closed, ended) - began < LIMIT_S
    await ada.adopt(answer.json()["data"])
    assert (await ada.call(pair.two, "GET", "me")).status_code == 200
    again = await ada.socket()
    await again.connection.close()
