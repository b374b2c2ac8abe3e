"""Processes that can be killed, on a PostgreSQL that can be killed too."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.bench import Talk, talk
from tests.faults.cluster import Account, Cluster, Zygote, cluster, zygote
from tests.faults.postgres import FaultyPostgres, faulty_postgres


@pytest.fixture(scope="session")
def servers() -> Iterator[Zygote]:
    """The parent of all server processes of the run."""
    with zygote() as made:
        yield made


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyPostgres]:
    """A PostgreSQL for these tests alone: they freeze and kill it."""
    with faulty_postgres(tmp_path_factory.mktemp("faulty")) as made:
        yield made


@pytest.fixture(scope="module")
async def processes(
    servers: Zygote, faulty: FaultyPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    """Two processes on one database, for a module's tests."""
    urls = await faulty.create()
    directory = tmp_path_factory.mktemp("cluster")
    async with cluster(
        servers, directory, urls, faulty.server.admin_url(urls.name), PARLEY_REALTIME_LEASE_S="2"
    ) as made:
        for name in ("one", "two"):
            made.fork(made.add(name))
        for member in made.members.values():
            await made.ready(member)
        yield made
    await faulty.drop(urls)


@pytest.fixture(scope="module")
async def someone(processes: Cluster) -> Account:
    """Who sends."""
    return await processes.sign_up("someone@example.com")


@pytest.fixture
async def pair(processes: Cluster) -> Cluster:
    """Two processes that both run."""
    for member in processes.members.values():
        if not member.alive:
            await processes.start(member)
    return processes


@pytest.fixture
async def chat(pair: Cluster, someone: Account) -> AsyncIterator[Talk]:
    """A conversation."""
    async with talk(pair, someone) as made:
        yield made
