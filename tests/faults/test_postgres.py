"""PostgreSQL that crashes, hangs, or loses connections while replies are written."""

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from tests.faults.bench import Talk, talk, until
from tests.faults.cluster import Account, Cluster, Zygote, cluster
from tests.faults.oracles import replies_of
from tests.faults.postgres import FaultyPostgres
from tests.faults.proxy import FaultProxy, fault_proxy
from tests.faults.shown import TERMINAL
from tests.faults.verdict import table_of

pytestmark = pytest.mark.process

SEED = 4000


async def test_a_crash_and_recovery_in_mid_reply(chat: Talk, faulty: FaultyPostgres) -> None:
    sender, other = await chat.device(), await chat.device()
    await asyncio.gather(sender.live(), other.live())
    text = f"seed={SEED} deltas=160 rate=40"
    reply = await chat.send(sender, text)
    await sender.until(lambda: len(sender.visible(reply)) > 30)
    seen = sender.visible(reply)
    faulty.crash()
    faulty.start()
    await chat.cluster.reconnect(faulty.server.admin_url(chat.cluster.urls.name))
    assert {await device.until_ended(reply) for device in chat.devices} == {"completed"}
    assert sender.visible(reply).startswith(seen)
    (await chat.verdict()).assert_clean()
    # Nobody took over what was only away: the provider was asked once.
    assert [call.outcome for call in chat.cluster.provider.of(text)] == ["finished"]


async def test_nothing_is_shown_while_it_hangs(chat: Talk, faulty: FaultyPostgres) -> None:
    """Durability before visibility: what cannot be committed cannot be seen, and comes as soon as it can be."""
    devices = [await chat.device() for _ in range(3)]
    await asyncio.gather(*(device.live() for device in devices))
    reply = await chat.send(devices[0], f"seed={SEED + 1} deltas=250 rate=50")
    await devices[0].until(lambda: len(devices[0].visible(reply)) > 30)
    faulty.freeze()
    try:
        # What was committed before is still on its way.
        await asyncio.sleep(0.5)
        before = [len(device.steps) for device in devices]
        frozen_at = time.monotonic()
        while time.monotonic() < frozen_at + 4.5:
            assert [len(device.steps) for device in devices] == before
            await asyncio.sleep(0.1)
    finally:
        faulty.thaw()
    assert {await device.until_ended(reply) for device in devices} <= {"completed", "failed"}
    (await chat.verdict()).assert_clean()


async def test_killed_while_it_hangs(chat: Talk, faulty: FaultyPostgres) -> None:
    """What a dead process had not committed was never seen: the log and the clients agree."""
    sender = await chat.device()
    await sender.live()
    reply = await chat.send(sender, f"seed={SEED + 2} deltas=250 rate=50", opts={"model": "prefill"})
    await sender.until(lambda: len(sender.visible(reply)) > 30)
    generator = await chat.cluster.owner(reply)
    assert generator is not None
    faulty.freeze()
    try:
        await asyncio.sleep(0.3)
        await chat.cluster.kill(generator)
    finally:
        faulty.thaw()
    await sender.until_ended(reply)
    await chat.cluster.start(generator)
    (await chat.verdict()).assert_clean()


@pytest.mark.parametrize("whose", ["the generating process", "everyone"])
async def test_connections_are_terminated_in_mid_tick(chat: Talk, whose: str) -> None:
    sender = await chat.device()
    await sender.live()
    text = f"seed={SEED + 3} deltas=180 rate=60 whose={whose.replace(' ', '-')}"
    reply = await chat.send(sender, text, opts={"model": "prefill"})
    await sender.until(lambda: sender.visible(reply))
    generator = await chat.cluster.owner(reply)
    assert generator is not None
    choose = random.Random(SEED)
    while sender.status(reply) is None:
        await chat.cluster.admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND application_name LIKE $1",
            "%" if whose == "everyone" else generator.name,
        )
        await asyncio.sleep(choose.uniform(0.05, 0.35))
    # Each time the process loses its lock too, so others may go on for it, twice; what is written is whole either way.
    assert sender.status(reply) in {"completed", "failed"}
    (await chat.verdict()).assert_clean()
    calls = chat.cluster.provider.of(text)
    await chat.cluster.provider.until(lambda: all(call.outcome != "running" for call in calls))
    assert len(calls) <= 3


# -- the network between -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def apart(
    servers: Zygote, faulty: FaultyPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Cluster, FaultProxy]]:
    """Two processes; the first one reaches its database over a network."""
    urls = await faulty.create()
    directory = tmp_path_factory.mktemp("apart")
    network = tmp_path_factory.mktemp("net")
    async with fault_proxy(faulty.socket, path=network / faulty.socket.name) as proxy:
        async with cluster(
            servers, directory, urls, faulty.server.admin_url(urls.name), PARLEY_REALTIME_LEASE_S="2"
        ) as made:
            real = str(faulty.socket.parent)
            first = made.add("far")
            first.environment = {
                name: f"{address}&application_name=far".replace(real, str(network))
                for name, address in (
                    ("PARLEY_DATABASE_URL", urls.app),
                    ("PARLEY_DATABASE_SYSTEM_URL", urls.system),
                )
            }
            for member in (first, made.add("near")):
                await made.start(member)
            yield made, proxy
    await faulty.drop(urls)


@pytest.fixture(scope="module")
async def away(apart: tuple[Cluster, FaultProxy]) -> Account:
    return await apart[0].sign_up("away@example.com")


@pytest.mark.parametrize("fault", ["black hole", "answers lost", "reset", "slow"])
async def test_a_database_that_one_process_cannot_reach(
    apart: tuple[Cluster, FaultProxy], away: Account, fault: str
) -> None:
    """A process that is cut off from its database is not believed: another one goes on, and it appends nothing more."""
    made, proxy = apart
    far, near = made.members["far"], made.members["near"]
    async with talk(made, away) as chat:
        # The question goes in where the reply is to be generated.
        sender, witness = await chat.device(far, stall_s=0.5), await chat.device(near)
        await asyncio.gather(sender.live(), witness.live())
        text = f"seed={SEED + 10} deltas=200 rate=40 fault={fault.replace(' ', '-')}"
        reply = await chat.send(sender, text, opts={"model": "prefill"})

        async def generated_far() -> bool:
            return await made.owner(reply) is far

        await until(generated_far, what="the far process generating")
        await witness.until(lambda: len(witness.visible(reply)) > 20)
        match fault:
            case "black hole":
                proxy.black_hole()
            case "answers lost":
                # The tick is written, and nobody tells the process.
                proxy.down.black_hole()
            case "reset":
                for _ in range(5):
                    proxy.reset()
                    await asyncio.sleep(0.25)
            case "slow":
                proxy.down.delay_s = 0.15
        status = await witness.until_ended(reply, timeout_s=25)
        proxy.heal()
        assert status == "completed"
        (await chat.verdict(timeout_s=30)).assert_clean()
        table, _, _ = await table_of(made.admin, away.workspace_id, chat.channel)
        assert sum(event.e in TERMINAL for event in table) == 1
        assert len(made.provider.of(text)) <= 3
        found = replies_of(table)[reply]
        assert found.strategies.count("restart") == 0
