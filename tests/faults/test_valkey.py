"""Valkey between the processes: it makes things faster, and its loss costs nothing but that."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from parley.core.db import DatabaseUrls
from tests.faults.bench import Talk, talk
from tests.faults.cluster import Account, Cluster, Zygote, cluster
from tests.faults.postgres import FaultyPostgres
from tests.faults.proxy import FaultProxy, fault_proxy
from tests.faults.recorder import Device
from tests.valkey import Valkey, run_valkey

pytestmark = pytest.mark.process

SEED = 6000
# A poll each second heals what was not told; a little more for a loaded machine.
LAG_S = 2.5


def lag_s(first: Device, second: Device) -> float:
    """Return by how much the second device was behind the first one at most."""
    reached = [(step.seq, step.at) for step in second.steps]
    lags = [
        at - step.at
        for step in first.steps
        if step.kind == "ev" and (at := next((at for seq, at in reached if seq >= step.seq), None))
    ]
    return max(lags, default=0.0)


def send(store: Valkey, number: signal.Signals) -> None:
    assert store.process is not None
    store.process.send_signal(number)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with run_valkey(tmp_path_factory.mktemp("valkey")) as made:
        yield made


@pytest.fixture(scope="module")
async def network(store: Valkey) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(store.port) as made:
        yield made


@pytest.fixture(scope="module")
async def wired(
    servers: Zygote, faulty: FaultyPostgres, network: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    """Two processes with a Valkey between them."""
    urls = await faulty.create()
    async with cluster(
        servers, tmp_path_factory.mktemp("wired"), urls, faulty.server.admin_url(urls.name),
        redis_url=f"redis://127.0.0.1:{network.port}/0", PARLEY_REALTIME_LEASE_S="2",
    ) as made:  # fmt: skip
        for name in ("one", "two"):
            made.fork(made.add(name))
        for member in made.members.values():
            await made.ready(member)
        yield made
    await faulty.drop(urls)


@pytest.fixture(scope="module")
async def writer(wired: Cluster) -> Account:
    return await wired.sign_up("writer@example.com")


@pytest.fixture
async def chat(wired: Cluster, writer: Account, network: FaultProxy, store: Valkey) -> AsyncIterator[Talk]:
    network.heal()
    if store.process is None:
        store.start()
    async with talk(wired, writer) as made:
        yield made


@pytest.mark.parametrize("fault", ["none", "killed", "restarted empty", "frozen", "reset", "black hole", "slow"])
async def test_a_store_that_fails_in_mid_reply(chat: Talk, network: FaultProxy, store: Valkey, fault: str) -> None:
    one, two = chat.cluster.members["one"], chat.cluster.members["two"]
    near, far = await chat.device(one), await chat.device(two)
    await asyncio.gather(near.live(), far.live())
    text = f"seed={SEED} deltas=120 rate=40 fault={fault.replace(' ', '-')}"
    reply = await chat.send(near, text)
    await far.until(lambda: len(far.visible(reply)) > 20)
    match fault:
        case "killed":
            store.kill()
        case "restarted empty":
            store.kill()
            store.start()
        case "frozen":
            send(store, signal.SIGSTOP)
        case "reset":
            for _ in range(5):
                network.reset()
                await asyncio.sleep(0.2)
        case "black hole":
            network.black_hole()
        case "slow":
            network.down.delay_s = network.up.delay_s = 0.3
    try:
        assert {await device.until_ended(reply) for device in (near, far)} == {"completed"}
    finally:
        if fault == "frozen":
            send(store, signal.SIGCONT)
        network.heal()
    (await chat.verdict()).assert_clean()
    assert [call.outcome for call in chat.cluster.provider.of(text)] == ["finished"]
    assert max(lag_s(near, far), lag_s(far, near)) < LAG_S


async def test_the_generating_process_is_killed_while_the_store_is_away(chat: Talk, store: Valkey) -> None:
    one, two = chat.cluster.members["one"], chat.cluster.members["two"]
    near, far = await chat.device(one), await chat.device(two)
    await asyncio.gather(near.live(), far.live())
    text = f"seed={SEED + 1} deltas=120 rate=40"
    reply = await chat.send(near, text, opts={"model": "prefill"})
    await far.until(lambda: len(far.visible(reply)) > 20)
    store.kill()
    generator = await chat.cluster.owner(reply)
    assert generator is not None
    await chat.cluster.kill(generator)
    assert await (far if generator is one else near).until_ended(reply) == "completed"
    await chat.cluster.start(generator)
    store.start()
    (await chat.verdict()).assert_clean()


async def test_a_store_that_was_never_there(
    servers: Zygote, faulty: FaultyPostgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    urls = await faulty.create()
    # Bound and not listening: nobody else gets the port, and whoever connects is refused.
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        await _without_it(servers, faulty, tmp_path_factory.mktemp("absent"), urls, url)
    await faulty.drop(urls)


async def _without_it(
    servers: Zygote, faulty: FaultyPostgres, directory: Path, urls: DatabaseUrls, redis_url: str
) -> None:
    admin_url = faulty.server.admin_url(urls.name)
    async with cluster(servers, directory, urls, admin_url, redis_url=redis_url) as made:
        for name in ("one", "two"):
            await made.start(made.add(name))
        async with talk(made, await made.sign_up("nobody@example.com")) as chat:
            near, far = [await chat.device(member) for member in made.members.values()]
            await asyncio.gather(near.live(), far.live())
            reply = await chat.send(near, f"seed={SEED + 2} deltas=60 rate=40")
            assert {await device.until_ended(reply) for device in chat.devices} == {"completed"}
            (await chat.verdict()).assert_clean()
