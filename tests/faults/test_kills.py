"""Processes that are killed, stopped for a while, or all gone at once."""

import asyncio
import random
import signal

import pytest

from tests.faults.bench import Talk, until
from tests.faults.cluster import Cluster, Member
from tests.faults.oracles import EXACT, Reply, replies_of
from tests.faults.recorder import Device
from tests.faults.shown import Frame
from tests.faults.verdict import table_of

pytestmark = pytest.mark.process

SEED = 777
# Until an end, a take-over or a silent restart, counted from the kill: detection each half second, and the claim.
TAKEN_OVER_S = 4.0


def other_than(cluster: Cluster, member: Member) -> Member:
    return next(m for m in cluster.members.values() if m is not member)


async def reply_of(chat: Talk, id_: str) -> Reply:
    table, _, _ = await table_of(chat.cluster.admin, chat.account.workspace_id, chat.channel)
    return replies_of(table)[id_]


async def generating(chat: Talk, reply: str) -> Member:
    """Return the process that generates a reply."""
    found: list[Member] = []

    async def owned() -> bool:
        member = await chat.cluster.owner(reply)
        found[:] = [member] if member else []
        return bool(found)

    await until(owned, what="somebody generating the reply")
    return found[0]


async def test_the_process_that_holds_the_socket_is_killed(chat: Talk) -> None:
    """The reply does not notice: its provider sees one call, from beginning to end."""
    generator = chat.cluster.members["one"]
    holder = other_than(chat.cluster, generator)
    sender = await chat.device(generator)
    watchers = [await chat.device() for _ in range(3)]
    await asyncio.gather(*(device.live() for device in chat.devices))
    text = f"seed={SEED} deltas=150 rate=50 reasoning=2"
    reply = await chat.send(sender, text)
    choose = random.Random(SEED)
    kills = 0
    while sender.status(reply) is None:
        await asyncio.sleep(choose.uniform(0.05, 0.3))
        await chat.cluster.kill(holder)
        kills += 1
        await chat.cluster.start(holder)
    assert {await device.until_ended(reply) for device in chat.devices} == {"completed"}
    (await chat.verdict()).assert_clean()
    assert kills >= 3
    assert [call.outcome for call in chat.cluster.provider.of(text)] == ["finished"]
    assert sum(len(watcher.codes) for watcher in watchers) >= 1


POINTS = ["before the first token", "at the first token", "in the middle", "at the last token", "at the end", "tool"]


async def _reach(chat: Talk, device: Device, reply: str, text: str, point: str, *, plan_deltas: int) -> None:
    provider = chat.cluster.provider
    match point:
        case "before the first token":
            await provider.until(lambda: provider.of(text))
        case "at the first token":
            await device.until(lambda: device.visible(reply))
        case "in the middle":
            await provider.until(lambda: provider.of(text) and len(provider.of(text)[0].sent) >= plan_deltas // 2)
        case "at the last token":
            await provider.until(lambda: provider.of(text) and len(provider.of(text)[0].sent) >= plan_deltas - 1)
        case "at the end":
            await provider.until(lambda: provider.of(text) and provider.of(text)[0].outcome == "finished")
        case "tool":
            await device.until(lambda: any(s.e == "reply.tool" and s.d["state"] == "running" for s in device.steps))


@pytest.mark.parametrize("model", ["plain", "prefill"])
@pytest.mark.parametrize("point", POINTS)
async def test_the_process_that_generates_is_killed(chat: Talk, point: str, model: str) -> None:
    two = chat.cluster.members["two"]
    sender, watcher = await chat.device(), await chat.device(two)
    await asyncio.gather(sender.live(), watcher.live())
    deltas = 40
    fields = " ttft=1" if point == "before the first token" else ""
    fields += " tool=add_task" if point == "tool" else ""
    text = f"seed={SEED + len(point)} deltas={deltas} rate=60 point={point.replace(' ', '-')}{fields} at={model}"
    reply = await chat.send(sender, text, opts={"model": model})
    generator = await generating(chat, reply)
    seer = sender if generator is two else watcher
    await _reach(chat, seer, reply, text, point, plan_deltas=deltas)
    shown = {device.name: device.visible(reply) for device in chat.devices}
    await chat.cluster.kill(generator)
    loop = asyncio.get_running_loop()
    killed = loop.time()
    heard: list[float] = []

    def hear(frame: Frame) -> None:
        e, d = frame.get("e", ""), frame.get("d") or {}
        if d.get("reply") == reply and e not in {"reply.delta", "reply.part", "reply.tool"}:
            heard.append(loop.time())

    seer.on_frame = hear
    status = await seer.until_ended(reply)
    await chat.cluster.start(generator)
    (await chat.verdict()).assert_clean()
    found = await reply_of(chat, reply)
    assert all(found.text.startswith(text) for text in shown.values()), "what was delivered stays"
    if point != "before the first token" or heard:
        assert not heard or heard[0] - killed < TAKEN_OVER_S
    if status == "failed":
        assert found.end is not None
        assert found.end.d["error"]["code"] == "worker_lost"
        assert found.end.d["partial"] is True
        assert "continue" in found.end.d["can"]
    else:
        assert status == "completed"
        assert EXACT.issuperset(found.strategies)
    calls = chat.cluster.provider.of(text)
    assert len(calls) <= 3
    assert all(call.fits for call in calls)
    # A tool ran once or its outcome is unknown; it never ran twice.
    if point == "tool":
        tasks = await chat.cluster.call(chat.account, "GET", "tasks")
        assert [task["title"] for task in tasks].count(f"seed {SEED + len(point)}") <= 2


@pytest.mark.parametrize("at", ["with the first word", "in the middle"])
async def test_killed_after_text_was_taken_back(chat: Talk, at: str) -> None:
    """Another model began anew in the first one's place; a third process goes on with the second one's text."""
    two = chat.cluster.members["two"]
    sender, watcher = await chat.device(), await chat.device(two)
    await asyncio.gather(sender.live(), watcher.live())
    text = f"seed={SEED + 40 + len(at)} deltas=80 rate=60 fail=reset:20 fail_first=1"
    reply = await chat.send(sender, text, opts={"model": "falling"})
    generator = await generating(chat, reply)
    seer = sender if generator is two else watcher
    await seer.until(lambda: any(step.e == "reply.reset" for step in seer.steps))
    if at == "in the middle":
        provider = chat.cluster.provider
        await provider.until(lambda: len(provider.of(text)) > 1 and len(provider.of(text)[1].sent) >= 30)
    await chat.cluster.kill(generator)
    assert await seer.until_ended(reply) == "completed"
    await chat.cluster.start(generator)
    assert {await device.until_ended(reply) for device in chat.devices} == {"completed"}
    (await chat.verdict()).assert_clean()
    found = await reply_of(chat, reply)
    assert found.strategies == ["fallback", "prefill"]
    assert found.text == found.whole
    assert [call.fits for call in chat.cluster.provider.of(text)] == [True, True, True]


async def test_killed_the_moment_its_text_is_seen(chat: Talk) -> None:
    """What a client has seen was committed before: no instant is early enough to take it back."""
    one = chat.cluster.members["one"]
    for n in range(4):
        near = await chat.device(one)
        await near.live()
        reply = await chat.send(near, f"seed={SEED + 30 + n} deltas=60 rate=60", opts={"model": "prefill"})
        assert await generating(chat, reply) is one
        seen = 0

        def kill(frame: Frame, reply: str = reply, near: Device = near, n: int = n) -> None:
            nonlocal seen
            if frame.get("e") == "reply.delta" and frame["d"]["reply"] == reply and one.alive:
                seen += 1
                if seen == 2 + n:
                    chat.cluster.signal(one, signal.SIGKILL)
                    near.on_frame = lambda _: None

        near.on_frame = kill
        await chat.cluster.ended(one)
        await chat.cluster.start(one)
        await near.until_ended(reply)
    (await chat.verdict()).assert_clean()


@pytest.mark.parametrize("model", ["plain", "prefill"])
async def test_a_process_that_was_stopped_beyond_its_lease_appends_nothing(chat: Talk, model: str) -> None:
    sender = await chat.device()
    await sender.live()
    text = f"seed={SEED + 50} deltas=250 rate=30 at={model}"
    reply = await chat.send(sender, text, opts={"model": model})
    generator = await generating(chat, reply)
    witness = await chat.device(other_than(chat.cluster, generator))
    await witness.until(lambda: len(witness.visible(reply)) > 50)
    chat.cluster.signal(generator, signal.SIGSTOP)
    try:
        # The lease is two seconds here; the lock goes only with the process, so it is the lease that tells.
        await witness.until(
            lambda: witness.status(reply) or any(step.e == "reply.resumed" for step in witness.steps), timeout_s=20
        )
        taken_over_at = witness.last
    finally:
        chat.cluster.signal(generator, signal.SIGCONT)
    assert await witness.until_ended(reply) == ("failed" if model == "plain" else "completed")
    first = chat.cluster.provider.of(text)[0]
    await chat.cluster.provider.until(lambda: first.outcome != "running")
    assert first.outcome == "disconnected", "the fenced process lets its provider go"
    (await chat.verdict()).assert_clean()
    if model == "plain":
        assert (await chat.head()) == taken_over_at, "nothing came after the end"
    # It serves on.
    other = await chat.device(generator)
    await other.live()
    assert await other.until_ended(await chat.send(other, f"seed={SEED + 51} deltas=10")) == "completed"


async def test_every_process_is_killed_and_one_comes_back(chat: Talk) -> None:
    sender = await chat.device()
    await sender.live()
    running = await chat.send(sender, f"seed={SEED + 60} deltas=200 rate=50")
    waiting = await chat.send(sender, f"seed={SEED + 61} deltas=20 rate=100")
    await sender.until(lambda: len(sender.visible(running)) > 50)
    seen = sender.visible(running)
    for member in list(chat.cluster.members.values()):
        chat.cluster.signal(member, signal.SIGKILL)
    for member in list(chat.cluster.members.values()):
        await chat.cluster.ended(member)
    last = await chat.cluster.start(chat.cluster.members["two"])
    assert await sender.until_ended(running, timeout_s=15) in {"failed", "completed"}
    assert await sender.until_ended(waiting, timeout_s=15) == "completed"
    (await chat.verdict()).assert_clean()
    assert (await reply_of(chat, running)).text.startswith(seen)
    assert last.alive


async def test_a_reply_that_loses_process_after_process_comes_to_an_end(chat: Talk) -> None:
    sender = await chat.device()
    await sender.live()
    text = f"seed={SEED + 70} deltas=200 rate=40"
    reply = await chat.send(sender, text, opts={"model": "prefill"})
    kills = 0
    while sender.status(reply) is None and kills < 5:
        generator = await chat.cluster.owner(reply)
        if generator is None:
            await asyncio.sleep(0.02)
            continue
        await sender.until(lambda n=kills: sender.status(reply) or len(chat.cluster.provider.of(text)) > n)  # type: ignore[misc]  # bound per turn
        await asyncio.sleep(0.15)
        await chat.cluster.kill(generator)
        kills += 1
        await chat.cluster.start(generator)
    await sender.until_ended(reply)
    (await chat.verdict()).assert_clean()
    # Two take-overs at most.
    assert kills <= 3
    assert len(chat.cluster.provider.of(text)) <= 3


@pytest.mark.parametrize("kills", [1, 2])
async def test_an_answer_that_goes_on_by_itself_is_read_on_by_another_process(chat: Talk, kills: int) -> None:
    sender = await chat.device()
    await sender.live()
    asked = len(chat.cluster.background.responses)
    text = f"seed={SEED + 75 + kills} deltas=150 rate=50 reasoning=3"
    reply = await chat.send(sender, text, opts={"model": "reattach"})
    choose = random.Random(SEED + kills)
    for n in range(kills):
        generator = await generating(chat, reply)
        await sender.until(lambda n=n: len(sender.visible(reply)) > 150 * n + choose.randrange(100))  # type: ignore[misc]  # bound per turn
        await chat.cluster.kill(generator)
        await chat.cluster.start(generator)
    assert await sender.until_ended(reply) == "completed"
    (await chat.verdict()).assert_clean()
    assert set((await reply_of(chat, reply)).strategies) == {"reattach"}
    assert len(chat.cluster.background.responses) == asked + 1, "it was generated once"


async def test_cancelled_while_its_process_is_dead(chat: Talk) -> None:
    sender = await chat.device()
    await sender.live()
    text = f"seed={SEED + 80} deltas=300 rate=40"
    reply = await chat.send(sender, text, opts={"model": "prefill"})
    generator = await generating(chat, reply)
    other = await chat.device(other_than(chat.cluster, generator))
    await other.until(lambda: len(other.visible(reply)) > 20)
    await chat.cluster.kill(generator)
    await other.cancel(reply)
    assert await other.until_ended(reply) in {"cancelled", "failed"}
    await chat.cluster.start(generator)
    (await chat.verdict()).assert_clean()
    await chat.cluster.provider.until(lambda: all(call.outcome != "running" for call in chat.cluster.provider.of(text)))


async def test_a_process_that_is_told_to_end_hands_over_or_finishes(chat: Talk) -> None:
    sender = await chat.device()
    await sender.live()
    reply = await chat.send(sender, f"seed={SEED + 90} deltas=60 rate=40")
    generator = await generating(chat, reply)
    await sender.until(lambda: sender.visible(reply))
    chat.cluster.signal(generator, signal.SIGTERM)
    assert await sender.until_ended(reply) == "completed"
    assert await chat.cluster.ended(generator) == 0
    await chat.cluster.start(generator)
    (await chat.verdict()).assert_clean()


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "behind"])
async def test_a_clock_that_is_an_hour_wrong_takes_nothing_over(chat: Talk, ahead: bool) -> None:
    """Leases are the database's time: a process whose own clock is wrong neither loses nor takes a reply."""
    sender = await chat.device()
    await sender.live()
    text = f"seed={SEED + 95} deltas=120 rate=40 ahead={ahead}"
    reply = await chat.send(sender, text)
    generator = await generating(chat, reply)
    wrong = other_than(chat.cluster, generator)
    await chat.cluster.kill(wrong)
    wrong.environment["FAULTS_CLOCK_S"] = "3600" if ahead else "-3600"
    try:
        await chat.cluster.start(wrong)
        assert await sender.until_ended(reply) == "completed"
        assert [call.outcome for call in chat.cluster.provider.of(text)] == ["finished"]
        (await chat.verdict()).assert_clean()
    finally:
        del wrong.environment["FAULTS_CLOCK_S"]
        await chat.cluster.kill(wrong)
        await chat.cluster.start(wrong)
