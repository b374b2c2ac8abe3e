"""A provider that fails, seen from two processes: retried before anything is visible, told honestly after that."""

import asyncio

import pytest

from tests.faults.bench import Talk
from tests.faults.script import Plan

pytestmark = pytest.mark.process

SEED = 8000


@pytest.mark.parametrize(
    ("plan", "status"),
    [
        ("fail=429 fail_first=1", "completed"),
        ("fail=500 fail_first=1", "completed"),
        ("fail=reset:0 fail_first=1", "completed"),
        ("fail=500", "failed"),
        ("fail=reset:12", "failed"),
        ("fail=eof:12", "failed"),
        ("fail=garbage:12", "failed"),
        ("fail=error:12", "failed"),
        ("stall=10:1.5", "completed"),
        ("ttft=1", "completed"),
    ],
)
async def test_what_a_provider_can_do(chat: Talk, plan: str, status: str) -> None:
    one, two = chat.cluster.members["one"], chat.cluster.members["two"]
    devices = [await chat.device(one), await chat.device(two), await chat.device()]
    await asyncio.gather(*(device.live() for device in devices))
    text = f"seed={SEED} deltas=30 rate=100 {plan}"
    reply = await chat.send(devices[0], text)
    assert {await device.until_ended(reply) for device in devices} == {status}
    (await chat.verdict()).assert_clean()
    whole = Plan.read(text)
    if status == "failed" and ":12" in plan:
        said = "".join(whole.pieces()[:12])
        assert devices[1].visible(reply) == said, "all that was said is kept"
    calls = chat.cluster.provider.of(text)
    # What was visible is never asked for twice.
    assert len(calls) == (2 if "fail_first" in plan or plan == "fail=500" else 1)


async def test_a_slow_provider_is_let_go_when_its_reply_is_cancelled(chat: Talk) -> None:
    one, two = chat.cluster.members["one"], chat.cluster.members["two"]
    sender, other = await chat.device(one), await chat.device(two)
    await asyncio.gather(sender.live(), other.live())
    text = f"seed={SEED + 1} deltas=30 rate=100 stall=10:30"
    reply = await chat.send(sender, text)
    await other.until(lambda: len(other.visible(reply)) > 5)
    await other.cancel(reply)
    assert {await device.until_ended(reply) for device in chat.devices} == {"cancelled"}
    provider = chat.cluster.provider
    await provider.until(lambda: provider.of(text)[0].outcome == "disconnected", timeout_s=5)
    (await chat.verdict()).assert_clean()
