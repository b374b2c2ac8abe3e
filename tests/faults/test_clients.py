"""Clients that lose their connection, join late, ask for places that are not there, and send the same thing twice."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest
from websockets.exceptions import ConnectionClosed

from tests.faults.bench import Talk, until
from tests.faults.cluster import Cluster, Member
from tests.faults.oracles import snapshot_is_the_fold
from tests.faults.proxy import FaultProxy, fault_proxy
from tests.faults.recorder import Device, Refused, Step, Stopped
from tests.faults.shown import Frame
from tests.faults.verdict import table_of
from tests.live import Socket, dial

pytestmark = pytest.mark.process

SEED = 20261121


@dataclass
class Dropper:
    """Drops a device's connection at every event whose number leaves a certain rest."""

    device: Device
    rest: int
    of: int
    places: set[int] = field(default_factory=set)

    def __call__(self, frame: Frame) -> None:
        if frame["t"] != "ev":
            return
        seq: int = frame["seq"]
        first: int = frame.get("from", seq)
        if seq not in self.places and any(number % self.of == self.rest for number in range(first, seq + 1)):
            self.places.add(seq)
            self.device.drop()


async def test_a_drop_at_every_event_of_a_reply_over_two_processes(chat: Talk) -> None:
    steady = await chat.device()
    droppers = []
    for rest in range(12):
        device = await chat.device(retry_s=0.002)
        device.on_frame = dropper = Dropper(device, rest, 12)
        droppers.append(dropper)
    await asyncio.gather(*(device.live() for device in chat.devices))
    text = f"seed={SEED} deltas=150 rate=30 reasoning=3 tool=add_task"
    reply = await chat.send(steady, text)
    await asyncio.gather(*(device.until_ended(reply) for device in chat.devices))
    (await chat.verdict()).assert_clean()
    # What merges on its way to a device that was away is one place, so not every number is one.
    assert len(set().union(*(dropper.places for dropper in droppers))) >= 100
    assert [call.outcome for call in chat.cluster.provider.of(text)] == ["finished"] * 2


@asynccontextmanager
async def through_proxies(cluster: Cluster) -> AsyncIterator[list[FaultProxy]]:
    """Put a network in front of each process."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(fault_proxy(member.port)) for member in cluster.members.values()]


@pytest.mark.parametrize("fault", ["reset", "finish", "black hole", "after bytes", "slow"])
async def test_networks_that_fail(chat: Talk, fault: str) -> None:
    async with through_proxies(chat.cluster) as proxies:
        urls = [f"ws://127.0.0.1:{proxy.port}/api/v1/realtime" for proxy in proxies]
        # Frames within half a second, or the far end is asked whether it lives.
        devices = [await chat.device(urls=lambda: urls, stall_s=0.3) for _ in range(4)]
        await asyncio.gather(*(device.live() for device in devices))
        reply = await chat.send(devices[0], f"seed={SEED + 1} deltas=120 rate=60 net={fault.replace(' ', '-')}")
        choose = random.Random(SEED)
        for _ in range(8):
            await asyncio.sleep(choose.random() * 0.2)
            proxy = choose.choice(proxies)
            match fault:
                case "reset":
                    proxy.reset()
                case "finish":
                    proxy.finish(choose.choice(("up", "down")))
                case "black hole":
                    getattr(proxy, choose.choice(("up", "down"))).black_hole()
                case "after bytes":
                    # In the middle of a frame, whatever it is.
                    proxy.down.cut_after = proxy.passed("down") // max(proxy.open, 1) + choose.randrange(2000)
                case "slow":
                    proxy.down.bytes_per_s, proxy.up.delay_s = 20_000, 0.05
            if fault in {"black hole", "after bytes"}:
                await asyncio.sleep(0.1)
                proxy.heal()
        for proxy in proxies:
            proxy.heal()
            proxy.reset()
        await asyncio.gather(*(device.until_ended(reply) for device in devices))
        (await chat.verdict()).assert_clean()


async def test_ten_devices_join_at_random_times(chat: Talk) -> None:
    first = await chat.device()
    await first.live()
    reply = await chat.send(first, f"seed={SEED + 2} deltas=150 rate=75 reasoning=4")
    choose = random.Random(SEED)
    for _ in range(10):
        await asyncio.sleep(choose.random() * 0.3)
        await chat.device(acks=choose.random() < 0.8)
    await asyncio.gather(*(device.until_ended(reply) for device in chat.devices))
    verdict = await chat.verdict()
    verdict.assert_clean()
    assert verdict.counts["snapshots"] >= 11
    assert {device.visible(reply) for device in chat.devices} == {first.visible(reply)}


async def test_the_same_cid_fifty_times_over_two_processes(chat: Talk) -> None:
    members = list(chat.cluster.members.values())
    devices = [await chat.device(members[n % 2]) for n in range(10)]
    await asyncio.gather(*(device.live() for device in devices))
    cid, text = uuid4(), f"seed={SEED + 3} deltas=20 rate=100"
    answers = await asyncio.gather(*(devices[n % 10].send(text, cid=cid) for n in range(50)))
    assert len({(answer["message"], answer["reply"]) for answer in answers}) == 1
    with pytest.raises(Refused, match="conflict"):
        await devices[3].send("seed=9 something else", cid=cid)
    await asyncio.gather(*(device.until_ended(answers[0]["reply"]) for device in devices))
    again = await devices[7].send(text, cid=cid)
    assert again["reply"] == answers[0]["reply"]
    verdict = await chat.verdict()
    verdict.assert_clean()
    assert verdict.counts["replies"] == 1
    assert len(chat.cluster.provider.of(text)) == 1


async def test_a_send_that_is_repeated_over_lost_connections_is_one(chat: Talk) -> None:
    async with through_proxies(chat.cluster) as proxies:
        urls = [f"ws://127.0.0.1:{proxy.port}/api/v1/realtime" for proxy in proxies]
        device = await chat.device(urls=lambda: urls, stall_s=0.3)
        await device.live()
        texts = [f"seed={SEED + 4} deltas=5 rate=100 number={n}" for n in range(12)]
        for n, text in enumerate(texts):
            # The answer is lost, now before the send arrived and now after it.
            direction = "up" if n % 2 else "down"
            for proxy in proxies:
                proxy.faults[direction].black_hole()  # type: ignore[index]  # a Direction
            sending = asyncio.create_task(chat.send(device, text))
            await asyncio.sleep(0.05)
            for proxy in proxies:
                proxy.reset()
                proxy.heal()
            await device.until_ended(await sending)
    verdict = await chat.verdict()
    verdict.assert_clean()
    assert verdict.counts["replies"] == len(texts)
    assert [len(chat.cluster.provider.of(text)) for text in texts] == [1] * len(texts)


# -- places that are not there ---------------------------------------------------------------------------------------


async def _raw(member: Member, token: str) -> Socket:
    socket = await dial(member)
    await socket.send(t="hello", v=1, auth={"token": token}, subs=[])
    assert (await socket.receive())["t"] == "welcome"
    return socket


@pytest.mark.parametrize("process", ["one", "two"])
async def test_places_that_are_not_there(chat: Talk, process: str) -> None:
    device = await chat.device()
    await device.live()
    reply = await chat.send(device, f"seed={SEED + 5} deltas=30 rate=200")
    await device.until_ended(reply)
    await chat.settle()
    head, epoch = device.last, device.epoch
    assert head is not None
    member = chat.cluster.members[process]
    async with await _raw(member, chat.account.token) as socket:
        for since, why in (
            (None, "initial"),
            ({"ep": epoch, "seq": head}, "ok"),
            ({"ep": epoch, "seq": head + 1}, "epoch"),
            ({"ep": epoch, "seq": 2**31}, "epoch"),
            ({"ep": epoch, "seq": 2**63 - 1}, "epoch"),
            ({"ep": epoch, "seq": 2**63}, "epoch"),
            ({"ep": "another", "seq": head - 3}, "epoch"),
            ({"ep": epoch, "seq": 0}, "ok"),
        ):
            fields = {} if since is None else {"since": since}
            await socket.send(t="sub", id=f"{why}-{since}", ch=chat.channel, **fields)
            subbed = await socket.until(lambda f: f["t"] in {"subbed", "err"})
            assert (subbed["t"], subbed.get("why")) == ("subbed", why), (since, subbed)
            first = await socket.receive()
            assert (first["t"] == "snap") == (why != "ok")
            if why != "ok":
                assert (first["seq"], first["ep"], first["more"]) == (head, epoch, False)
                assert [m["id"] for m in first["state"]["messages"]][-1] == reply
            live = first if first["t"] == "live" else await socket.of_type("live")
            assert live["seq"] == head
        await socket.send(t="sub", id=1, ch=chat.channel, since={"ep": epoch, "seq": -2})
        assert (await socket.until(lambda f: f.get("id") == 1))["code"] == "bad_frame"


async def test_a_place_that_was_trimmed(chat: Talk) -> None:
    device = await chat.device()
    await device.live()
    for n in range(2):
        await device.until_ended(await chat.send(device, f"seed={SEED + 6 + n} deltas=30 rate=0"))
    await chat.settle()
    trimmed = (device.last or 0) // 2
    where = (chat.account.workspace_id, chat.channel)
    await chat.cluster.admin.execute(
        "DELETE FROM channel_events WHERE workspace_id = $1::uuid AND channel = $2 AND seq <= $3", *where, trimmed
    )
    await chat.cluster.admin.execute(
        "UPDATE channel_heads SET floor = $3 WHERE workspace_id = $1::uuid AND channel = $2", *where, trimmed
    )
    async with await _raw(chat.cluster.members["two"], chat.account.token) as socket:
        for seq, why in ((trimmed - 1, "trimmed"), (0, "trimmed"), (trimmed, "ok")):
            await socket.send(t="sub", id=seq, ch=chat.channel, since={"ep": device.epoch, "seq": seq})
            subbed = await socket.of_type("subbed")
            assert (subbed["why"], subbed["floor"]) == (why, trimmed)
            live = await socket.of_type("live")
            assert live["seq"] == device.last


async def test_subscribing_at_the_instant_of_an_event(chat: Talk) -> None:
    first = await chat.device()
    await first.live()
    reply = await chat.send(first, f"seed={SEED + 8} deltas=250 rate=100")
    joined = 0
    snapshots: list[Step] = []

    async def join(member: Member) -> None:
        nonlocal joined
        async with await _raw(member, chat.account.token) as socket:
            number = 0
            while first.status(reply) is None:
                number, joined = number + 1, joined + 1
                await socket.send(t="sub", id=number, ch=chat.channel)
                answer = await socket.of_type("subbed")
                assert answer["id"] == number
                snap = await socket.of_type("snap")
                if snap["state"]["messages"][-1]["status"] == "completed":
                    return
                place = snap["seq"]
                snapshots.append(Step("snap", snap["ep"], place, place, state=snap["state"]))
                for _ in range(3):
                    frame = await socket.receive(timeout_s=20)
                    if frame["t"] == "ev":
                        assert frame.get("from", frame["seq"]) == place + 1, "a hole or a repeat after the snapshot"
                        place = frame["seq"]
                        if frame["e"] == "reply.completed":
                            return
                # Not faster than a connection may ask.
                await asyncio.sleep(0.05)

    await asyncio.gather(*(join(member) for member in chat.cluster.members.values() for _ in range(4)))
    (await chat.verdict()).assert_clean()
    assert joined >= 40
    table, _, _ = await table_of(chat.cluster.admin, chat.account.workspace_id, chat.channel)
    assert [problem for step in snapshots for problem in snapshot_is_the_fold("joined", step, table)] == []


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["queued", "before the first token", "in the middle", "near the end", "twice"])
async def test_cancelling_from_another_device_on_another_process(chat: Talk, when: str) -> None:
    one, two = chat.cluster.members["one"], chat.cluster.members["two"]
    sender, other = await chat.device(one), await chat.device(two)
    await asyncio.gather(sender.live(), other.live())
    plan = f"seed={SEED + 10} deltas=60 rate=60 when={when.replace(' ', '-')}"
    ahead = await chat.send(sender, plan + " ahead=1") if when == "queued" else None
    text = plan + (" ttft=3" if when == "before the first token" else "")
    reply = await chat.send(sender, text)
    match when:
        case "before the first token":
            await chat.cluster.provider.until(lambda: chat.cluster.provider.of(text))
        case "near the end":
            whole = chat.cluster.provider
            await whole.until(lambda: whole.of(text) and len(whole.of(text)[0].sent) >= 59)
        case "in the middle" | "twice":
            await sender.until(lambda: len(sender.visible(reply)) > 30)
    asked = [other.cancel(reply) for _ in range(2 if when == "twice" else 1)]
    await asyncio.gather(*asked)
    ends = {await device.until_ended(reply) for device in chat.devices}
    assert ends == {"cancelled"} if when != "near the end" else ends <= {"cancelled", "completed"}
    if ahead is not None:
        assert await sender.until_ended(ahead) == "completed"
        assert chat.cluster.provider.of(text) == []
    else:
        calls = chat.cluster.provider.of(text)
        await chat.cluster.provider.until(lambda: all(call.outcome != "running" for call in calls))
        assert [call.outcome for call in calls] == (
            ["disconnected"] if ends == {"cancelled"} and when != "near the end" else [calls[0].outcome]
        )
    # What has ended stays so.
    await other.cancel(reply)
    verdict = await chat.verdict()
    verdict.assert_clean()


async def test_a_cancel_that_races_with_the_end(chat: Talk) -> None:
    sender = await chat.device(chat.cluster.members["one"])
    other = await chat.device(chat.cluster.members["two"])
    await asyncio.gather(sender.live(), other.live())
    choose = random.Random(SEED)
    ends = set()
    for n in range(12):
        text = f"seed={SEED + 20 + n} deltas=10 rate=200"
        reply = await chat.send(sender, text)
        await asyncio.sleep(choose.uniform(0.02, 0.12))
        await other.cancel(reply)
        found = {await device.until_ended(reply) for device in chat.devices}
        assert len(found) == 1
        ends |= found
    assert ends <= {"cancelled", "completed"}
    (await chat.verdict()).assert_clean()


async def shows(device: Device, reply: str, characters: int) -> None:
    """Wait until a device shows so much of a reply."""
    await device.until(lambda: len(device.visible(reply)) > characters)


# -- deletion --------------------------------------------------------------------------------------------------------


async def test_deletion_while_streaming_to_five_devices(chat: Talk) -> None:
    devices = [await chat.device() for _ in range(5)]
    await asyncio.gather(*(device.live() for device in devices))
    text = f"seed={SEED + 40} deltas=400 rate=50"
    reply = await chat.send(devices[0], text)
    await asyncio.gather(*(shows(device, reply, 20) for device in devices))
    await chat.cluster.call(chat.account, "DELETE", f"conversations/{chat.id}", at=chat.cluster.members["two"])
    for device in devices:
        await device.gone()
        assert device.unsubbed is not None
        assert (device.unsubbed["code"], device.unsubbed["retry"]) == ("not_found", "never")
    provider = chat.cluster.provider
    await provider.until(lambda: all(call.outcome == "disconnected" for call in provider.of(text)))
    where = (chat.account.workspace_id, chat.channel)
    for table in ("channel_events", "channel_heads", "replies"):
        query = f"SELECT count(*) FROM {table} WHERE workspace_id = $1::uuid AND channel = $2"

        async def gone(query: str = query) -> bool:
            return not await chat.cluster.admin.fetchval(query, *where)

        await until(gone, what=f"{table} being empty")
    with pytest.raises((Stopped, Refused, ConnectionClosed)):
        await devices[1].send("seed=1 anyone there?", cid=UUID(int=7), timeout_s=5)
