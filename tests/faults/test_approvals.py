"""A tool call that waits for a yes, and the process that waits is killed, or stops."""

import asyncio
import signal
from typing import Any

import pytest

from tests.faults.bench import Talk, until
from tests.faults.recorder import Device
from tests.faults.test_kills import generating, other_than, reply_of

pytestmark = pytest.mark.process

TITLE = "SELECT count(*) FROM tasks WHERE title = $1"


@pytest.fixture
async def asking(chat: Talk) -> Talk:
    """A conversation with an assistant that asks before it changes anything."""
    body = {
        "name": f"asks_{chat.id.replace('-', '')}",
        "title": "Asks",
        "instructions": "Be brief.",
        "approval": "writes",
    }
    made = await chat.cluster.call(chat.account, "POST", "assistants", json=body)
    await chat.cluster.call(chat.account, "PATCH", f"conversations/{chat.id}", json={"assistant": made["id"]})
    return chat


def states(device: Device, reply: str) -> list[str]:
    """Return what a device was told of the calls of a reply."""
    return [step.d["state"] for step in device.steps if step.e == "reply.tool" and step.d["reply"] == reply]


def call_that_waits(device: Device, reply: str) -> str:
    """Return the id of the call that it was shown last."""
    calls = [s.d["call"] for s in device.steps if s.e == "reply.tool" and s.d["reply"] == reply and "input" in s.d]
    return str(calls[-1])


async def begin(chat: Talk, text: str) -> tuple[Device, str, str]:
    """Send; return the device, the reply and the call, once it waits. The device is not at the generator."""
    one, two = chat.cluster.members.values()
    at = {member.name: await chat.device(member) for member in (one, two)}
    await asyncio.gather(*(device.live() for device in at.values()))
    reply = await chat.send(at[one.name], text)
    seer = at[other_than(chat.cluster, await generating(chat, reply)).name]
    await seer.until(lambda: "approval" in states(seer, reply))
    return seer, reply, call_that_waits(seer, reply)


async def decide(chat: Talk, call: str, approved: bool, **options: Any) -> Any:
    return await chat.cluster.call(
        chat.account, "POST", f"tool-calls/{call}/approve", json={"approved": approved}, **options
    )


@pytest.mark.parametrize("when", ["while nobody has it", "when the next one waits"])
@pytest.mark.parametrize("approved", [True, False])
async def test_the_process_that_waits_is_killed(asking: Talk, when: str, approved: bool) -> None:
    chat = asking
    seed = 9_100 + 2 * approved + ("next" in when)
    seer, reply, call = await begin(chat, f"seed={seed} deltas=12 rate=200 tool=add_task")
    generator = await generating(chat, reply)
    other = other_than(chat.cluster, generator)
    await chat.cluster.kill(generator)
    if when == "when the next one waits":

        async def taken_over() -> bool:
            return await chat.cluster.owner(reply) is other

        await until(taken_over, what="the take-over")
    answer = await decide(chat, call, approved, at=other)
    assert answer == {"call": call, "reply": reply, "approved": approved}
    assert await seer.until_ended(reply) == "completed"
    await chat.cluster.start(generator)
    (await chat.verdict()).assert_clean()
    assert states(seer, reply) == ["input", "approval", *(["running", "done"] if approved else ["failed"])]
    assert await chat.cluster.admin.fetchval(TITLE, f"seed {seed}") == approved
    assert (await reply_of(chat, reply)).strategies == ["restart"]


async def test_a_yes_reaches_the_process_that_waits_from_the_other_one(asking: Talk) -> None:
    chat = asking
    seer, reply, call = await begin(chat, "seed=9110 deltas=12 rate=200 tool=add_task")
    generator = await generating(chat, reply)
    answer = await seer.ask(t="tool.approve", reply=reply, call=call, approved=True)
    assert (answer["call"], answer["approved"]) == (call, True)
    assert await seer.until_ended(reply) == "completed"
    (await chat.verdict()).assert_clean()
    assert await chat.cluster.admin.fetchval(TITLE, "seed 9110") == 1
    assert (await reply_of(chat, reply)).strategies == [], f"{generator.name} went on by itself"


async def test_the_process_that_waits_is_told_to_stop(asking: Talk) -> None:
    chat = asking
    seer, reply, call = await begin(chat, "seed=9120 deltas=12 rate=200 tool=add_task")
    generator = await generating(chat, reply)
    chat.cluster.signal(generator, signal.SIGTERM)
    # Not the quarter of an hour that a call waits, nor the minute that a reply has to end in.
    assert await chat.cluster.ended(generator, timeout_s=40) == 0

    async def taken_over() -> bool:
        return await chat.cluster.owner(reply) is other_than(chat.cluster, generator)

    await until(taken_over, what="the take-over")
    assert states(seer, reply) == ["input", "approval"]
    await decide(chat, call, True, at=other_than(chat.cluster, generator))
    assert await seer.until_ended(reply) == "completed"
    await chat.cluster.start(generator)
    (await chat.verdict()).assert_clean()
    assert await chat.cluster.admin.fetchval(TITLE, "seed 9120") == 1
