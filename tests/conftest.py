"""A real PostgreSQL for every test: migrated once, one clone per test."""

import ipaddress
import itertools
import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import hypothesis
import pytest
from fastapi import FastAPI

from parley.core.db import Database, DatabaseUrls
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.core.migrate import upgrade
from parley.core.settings import DatabaseSettings, Environment, LogSettings, Settings, load_settings
from parley.main import create_app
from tests.canaries import CanaryHandler, secrets_in_tables
from tests.held import held

if os.environ.get("PARLEY_CI"):
    # The same examples in each run: what decides on a change does not depend on luck. `make test` looks further.
    hypothesis.settings.load_profile("ci")

_numbers = itertools.count(1)
_MEMORY, _ROOM = Path("/dev/shm"), 8 * 1024**3


@pytest.fixture(scope="session", autouse=True)
def network_closed_but_loopback() -> Iterator[None]:
    """No test talks to anything but this machine."""
    original = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6} and not ipaddress.ip_address(address[0]).is_loopback:
            raise PermissionError(f"tests stay on this machine, not {address[0]}")
        original(self, address)

    socket.socket.connect = connect  # type: ignore[assignment, method-assign]  # the guard itself
    yield
    socket.socket.connect = original  # type: ignore[method-assign]  # as above


@pytest.fixture(scope="session", autouse=True)
def no_secret_in_any_log() -> Iterator[None]:
    """No log line of the whole run holds a password or a token once it is written as production writes it."""
    handler = CanaryHandler()
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)
    assert handler.found == []


@pytest.fixture(scope="session")
def quick_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for what the whole run writes: in memory where there is room, so that no disk holds a test up."""
    if not _MEMORY.is_dir() or shutil.disk_usage(_MEMORY).free < _ROOM:
        yield tmp_path_factory.mktemp("data")
        return
    for left in _MEMORY.glob("parley-tests-*"):
        # Of a run that was killed.
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    here = _MEMORY / f"parley-tests-{os.getpid()}"
    here.mkdir(mode=0o700)
    yield here
    shutil.rmtree(here, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(quick_directory: Path) -> Iterator[EmbeddedPostgres]:
    """The server of the whole run."""
    with EmbeddedPostgres(quick_directory, durable=False, max_connections=400) as server:
        yield server


def urls_of(postgres: EmbeddedPostgres, name: str) -> DatabaseUrls:
    """Return the addresses of a database of the test server."""
    return DatabaseUrls(
        app=postgres.url("parley_app", name),
        system=postgres.url("parley_system", name),
        owner=postgres.url("parley_owner", name),
        direct=postgres.url("parley_system", name),
    )


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The migrated database that every test's own is a clone of."""
    upgrade(urls_of(postgres, "parley"))
    return "parley"


@dataclass(frozen=True)
class TestDatabases:
    """Makes clones of the migrated database."""

    __test__ = False

    postgres: EmbeddedPostgres
    template: str

    async def create(self) -> DatabaseUrls:
        """Return the addresses of a new clone."""
        name = f"test_{next(_numbers)}"
        admin = await asyncpg.connect(self.postgres.admin_url())
        try:
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE {self.template} OWNER parley_owner")
        finally:
            await admin.close()
        return urls_of(self.postgres, name)

    async def drop(self, urls: DatabaseUrls) -> None:
        """Remove a clone. In CI, look first whether a secret stands in any of its tables."""
        if os.environ.get("PARLEY_CI"):
            inside = await asyncpg.connect(self.postgres.admin_url(urls.name))
            try:
                found = await secrets_in_tables(inside)
            finally:
                await inside.close()
            assert found == []
        admin = await asyncpg.connect(self.postgres.admin_url())
        try:
            name = urls.name
            await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        finally:
            await admin.close()


@pytest.fixture(scope="session")
def databases(postgres: EmbeddedPostgres, template: str) -> TestDatabases:
    """The maker of databases."""
    return TestDatabases(postgres, template)


@pytest.fixture
async def urls(databases: TestDatabases) -> AsyncIterator[DatabaseUrls]:
    """A fresh, migrated database."""
    made = await databases.create()
    yield made
    await databases.drop(made)


@pytest.fixture
async def database(urls: DatabaseUrls) -> AsyncIterator[Database]:
    """The engines of a fresh database."""
    made = Database(urls, DatabaseSettings())
    yield made
    await made.close()


@pytest.fixture
async def admin(urls: DatabaseUrls, postgres: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection to the test's database: past every policy."""
    name = urls.name
    connection = await asyncpg.connect(postgres.admin_url(name))
    yield connection
    await connection.close()


def make_settings(data_dir: Path, urls: DatabaseUrls, **overrides: Any) -> Settings:
    """Return settings for a test's application."""
    # Patient: what takes longer than expected is a busy machine, and not what most tests are about.
    database = DatabaseSettings(
        url=urls.app, system_url=urls.system, owner_url=urls.owner, connect_timeout_s=10, statement_timeout_s=30
    )
    values: dict[str, Any] = {
        "env": Environment.TESTING,
        "data_dir": data_dir,
        "database": database,
        "log": LogSettings(files=False),
        "rate_limits": "off",
        **overrides,
    }
    return load_settings(data_dir, **values)


@pytest.fixture
def settings(tmp_path: Path, urls: DatabaseUrls) -> Settings:
    """The settings of the test's application; tests that need others call `running_app`."""
    return make_settings(tmp_path, urls)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[FastAPI]:
    """Run an application with its lifespan."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[FastAPI]:
    """The application, started."""
    async with held(running(settings)) as application:
        yield application


@pytest.fixture
def running_app() -> Callable[[Settings], AbstractAsyncContextManager[FastAPI]]:
    """Run an application with other settings inside a test."""
    return running


def http_client(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """Return a client of an application in this process."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://parley.test", **options)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client that nobody has signed in."""
    async with http_client(app) as made:
        yield made


@dataclass(frozen=True)
class Account:
    """A signed-up user with a client that carries the access token."""

    http: httpx.AsyncClient
    email: str
    user_id: UUID
    workspace_id: UUID
    access_token: str
    refresh_token: str


SignUp = Callable[..., Awaitable[Account]]


@pytest.fixture
async def sign_up(app: FastAPI) -> AsyncIterator[SignUp]:
    """A function that signs someone up: `alice = await sign_up()`."""
    clients: list[httpx.AsyncClient] = []

    async def make(email: str | None = None, *, app: FastAPI = app) -> Account:
        email = email or f"user{next(_numbers)}@example.com"
        client = http_client(app)
        clients.append(client)
        body = {"email": email, "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        answer = await client.post("/api/v1/auth/signup", json=body)
        assert answer.status_code == 201, answer.text
        data = answer.json()["data"]
        client.headers["Authorization"] = f"Bearer {data['access_token']}"
        return Account(
            http=client,
            email=email,
            user_id=UUID(data["user"]["id"]),
            workspace_id=UUID(data["workspace"]["id"]),
            access_token=data["access_token"],
            refresh_token=data["refresh_token"],
        )

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
async def alice(sign_up: SignUp) -> Account:
    """A user."""
    return await sign_up("alice@example.com")


@pytest.fixture
async def bob(sign_up: SignUp) -> Account:
    """Another user, in another workspace."""
    return await sign_up("bob@example.org")
