"""Processes with a role each: some hold sockets, others write replies; and what they hold when all is quiet again."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from parley.client import RealtimeClient, Timing
from tests.faults.bench import Talk, talk, until
from tests.faults.cluster import Account, Cluster, Member, Zygote, cluster
from tests.faults.oracles import Counts, back_to_baseline
from tests.faults.postgres import FaultyPostgres

pytestmark = pytest.mark.process

SEED = 9000


@pytest.fixture(scope="module")
async def roles(
    servers: Zygote, faulty: FaultyPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    """Two processes of each role."""
    urls = await faulty.create()
    directory = tmp_path_factory.mktemp("roles")
    async with cluster(
        servers, directory, urls, faulty.server.admin_url(urls.name),
        PARLEY_REALTIME_LEASE_S="2", PARLEY_REALTIME_DRAIN_WINDOW_S="1", PARLEY_REALTIME_DRAIN_S="1",
    ) as made:  # fmt: skip
        for name in ("web1", "web2", "gen1", "gen2"):
            made.fork(made.add(name, role=name[:3]))
        for member in made.members.values():
            await made.ready(member)
        yield made
    await faulty.drop(urls)


@pytest.fixture(scope="module")
async def somebody(roles: Cluster) -> Account:
    return await roles.sign_up("somebody@example.com")


@pytest.fixture
async def chat(roles: Cluster, somebody: Account) -> AsyncIterator[Talk]:
    for member in roles.members.values():
        if not member.alive:
            await roles.start(member)
    async with talk(roles, somebody) as made:
        yield made


async def _generating(chat: Talk, reply: str) -> Member:
    found: list[Member] = []

    async def owned() -> bool:
        member = await chat.cluster.owner(reply)
        found[:] = [member] if member is not None and member.role == "gen" else []
        return bool(found)

    await until(owned, what="a process of the role `gen` writing the reply")
    return found[0]


async def test_both_roles_are_killed_during_a_reply(chat: Talk) -> None:
    devices = [await chat.device() for _ in range(3)]
    await asyncio.gather(*(device.live() for device in devices))
    text = f"seed={SEED} deltas=150 rate=40 reasoning=2"
    reply = await chat.send(devices[0], text, opts={"model": "prefill"})
    generator = await _generating(chat, reply)
    await devices[0].until(lambda: len(devices[0].visible(reply)) > 30)
    # Those with the sockets first: the one that writes does not notice.
    for name in ("web1", "web2"):
        await chat.cluster.kill(chat.cluster.members[name])
        await chat.cluster.start(chat.cluster.members[name])
    assert len(chat.cluster.provider.of(text)) == 1
    await chat.cluster.kill(generator)
    assert {await device.until_ended(reply) for device in devices} == {"completed"}
    (await chat.verdict()).assert_clean()
    assert [call.kind for call in chat.cluster.provider.of(text)] == ["first", "continuation"]


@pytest.mark.parametrize("role", ["web", "gen"])
async def test_a_process_is_told_to_end_during_a_reply(chat: Talk, role: str) -> None:
    """Its connections move, its replies end or go on elsewhere: nothing is lost, and it exits as asked."""
    devices = [await chat.device() for _ in range(4)]
    await asyncio.gather(*(device.live() for device in devices))
    reply = await chat.send(devices[0], f"seed={SEED + 1} deltas=200 rate=40 of={role}", opts={"model": "prefill"})
    generator = await _generating(chat, reply)
    await devices[0].until(lambda: devices[0].visible(reply))
    leaving = generator if role == "gen" else chat.cluster.members["web1"]
    chat.cluster.signal(leaving, signal.SIGTERM)
    assert await chat.cluster.ended(leaving, timeout_s=30) == 0
    await chat.cluster.start(leaving)
    assert {await device.until_ended(reply) for device in devices} == {"completed"}
    (await chat.verdict()).assert_clean()


async def test_the_shipped_client_over_processes_that_die(chat: Talk) -> None:
    """The client that users run, on a process that is killed under it again and again."""
    web = chat.cluster.members["web1"]
    witness = await chat.device()
    await witness.live()

    async def credentials() -> dict[str, str]:
        return {"token": chat.account.token}

    client = RealtimeClient(
        web.ws_url, credentials, timing=Timing(silence_s=5), random=random.Random(SEED).random, name="faults"
    )
    async with client:
        await client.subscribe(chat.channel)
        for n in range(3):
            reply = await chat.send(witness, f"seed={SEED + 10 + n} deltas=60 rate=40", opts={"model": "prefill"})
            await witness.until(lambda reply=reply: witness.visible(reply))  # type: ignore[misc]  # bound per turn
            await chat.cluster.kill(web)
            await chat.cluster.start(web)
            assert await witness.until_ended(reply) == "completed"

            async def same(reply: str = reply) -> bool:
                state: Mapping[str, Any] = client.state(chat.channel)
                message = next((m for m in state["messages"] if m["id"] == reply), None)
                return message is not None and message["status"] == "completed"

            await until(same, timeout_s=30, what="the client seeing the end")
        assert client.integrity_failures == 0
        messages = client.state(chat.channel)["messages"]
        for message in messages:
            if message["role"] == "assistant":
                text = "".join(part["text"] for part in message["parts"] if part["type"] == "text")
                assert text == witness.visible(message["id"])
    (await chat.verdict()).assert_clean()


async def test_a_process_holds_nothing_of_those_who_have_left(chat: Talk) -> None:
    web, gen = chat.cluster.members["web1"], chat.cluster.members["gen1"]
    # Every reply is to be written by the process that is looked at.
    await chat.cluster.kill(chat.cluster.members["gen2"])

    async def crowd(n: int) -> None:
        async with talk(chat.cluster, chat.account, seed=n) as here:
            devices = [await here.device(web, retry_s=0.01) for _ in range(8)]
            await asyncio.gather(*(device.live() for device in devices))
            for k in range(2):
                reply = await here.send(devices[k], f"seed={SEED + 100 + 10 * n + k} deltas=30 rate=100")
                for device in devices[::2]:
                    device.drop()
                await asyncio.gather(*(device.until_ended(reply) for device in devices))
            (await here.verdict()).assert_clean()

    async def counts(member: Member) -> Counts:
        # The pools open connections as they are needed, up to their size, and keep them.
        pooled = await chat.cluster.admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", member.name
        )
        return Counts(member.rss_bytes(), member.descriptors() - pooled, len(await member.tasks()))

    # Once for what is made at the first use and kept.
    await crowd(0)
    before = {member.name: await counts(member) for member in (web, gen)}
    for n in range(1, 4):
        await crowd(n)
    problems: list[str] = []

    async def settled() -> bool:
        problems.clear()
        for member in (web, gen):
            problems.extend(
                back_to_baseline(member.name, before[member.name], await counts(member), memory_bytes=8 << 20)
            )
        return not problems

    try:
        await until(settled, timeout_s=10)
    except AssertionError:
        raise AssertionError(problems) from None
