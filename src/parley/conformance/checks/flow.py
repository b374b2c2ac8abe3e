"""What keeps a connection healthy: acknowledgements and heartbeats."""

import time
from uuid import uuid4

from parley.conformance.bench import SHORT, Bench
from parley.conformance.errors import require
from parley.conformance.oracle import Oracle
from parley.conformance.section import Section
from parley.conformance.transcript import Frame
from parley.conformance.wire import Closed, Peer

acks = Section("acks")
heartbeat = Section("heartbeat")

_WINDOW_BYTES = 256 * 1024
# Two bytes each: 64 KB a message.
_LARGE = 32_000
_MESSAGES = 6
_ACK_TIMEOUT_S = 30


async def _fill(bench: Bench, channel: str) -> None:
    """Have a conversation grow by more than the window, over HTTP."""
    rest, path = bench.rest(), f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
    for number in range(_MESSAGES):
        text = chr(ord("а") + number) * _LARGE
        made = await rest.call(
            "POST", path, expect=(200, 202), body={"text": text}, headers={"Idempotency-Key": str(uuid4())}
        )
        bench.noted("", "", {"message": made["message"]["id"], "reply": made["reply"]["id"]})


async def _read_without_ack(peer: Peer, oracle: Oracle, *, quiet_s: float) -> int:
    """Read until nothing comes any more; returns how many bytes that was."""
    size = 0
    while frames := await peer.hears(for_s=quiet_s):
        for frame in frames:
            oracle.take(frame)
            size += len(str(frame).encode())
    return size


@acks.check(limit_s=40)
async def window_is_bounded(bench: Bench) -> None:
    """A client that does not acknowledge is paused when 256 KiB are outstanding, and goes on once it does."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    await _fill(bench, channel)
    size = await _read_without_ack(peer, oracle, quiet_s=1.5)
    stored = (await bench.messages(channel))[-1]["id"]
    require(size < 2 * _WINDOW_BYTES, f"{size} bytes came without an acknowledgement: more than the window")
    require(stored not in oracle.messages, "the whole conversation came, and nothing of it was acknowledged")

    def caught_up(frame: Frame) -> bool:
        return frame["t"] in {"ev", "snap"} and stored in oracle.messages

    await peer.send("ack", a={channel: oracle.last})
    await _follow_acking(peer, oracle, caught_up)
    oracle.assert_sound()


async def _follow_acking(peer: Peer, oracle: Oracle, until: object) -> None:
    assert callable(until)
    while True:
        frame = await peer.receive("what was held back until the acknowledgement")
        oracle.take(frame)
        await peer.send("ack", a={oracle.channel: oracle.last})
        if until(frame):
            return


@acks.check(slow=True, limit_s=_ACK_TIMEOUT_S + 40)
async def no_ack_is_4002(bench: Bench) -> None:
    """A client with more than the window outstanding that never acknowledges is closed with 4002 after 30 s."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    await _fill(bench, channel)
    began = time.monotonic()
    try:
        while time.monotonic() - began < _ACK_TIMEOUT_S + 15:
            for frame in await peer.hears(for_s=1):
                oracle.take(frame)
                if frame["t"] == "hb":
                    # Alive, and slow all the same.
                    await peer.send("hb")
    except Closed as closed:
        require(closed.code == 4002, f"a slow consumer is closed with 4002; it was with {closed.code}")
    else:
        require(oracle.snapshots > 1, "it is neither closed with 4002 nor given a snapshot")
    oracle.assert_sound()
    later = await bench.join()
    await bench.subscribe(later, channel, oracle=oracle)
    oracle.assert_sound()


@heartbeat.check()
async def clients_heartbeat_is_taken(bench: Bench) -> None:
    """`hb` from a client needs no answer and harms nothing, with positions or without."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    await peer.send("hb")
    await peer.send("hb", ts=int(time.time() * 1000), a={channel: oracle.last, f"conversation:{uuid4()}": 3})
    await peer.send("ack", a={channel: 10**9})
    await peer.alive()


@heartbeat.check(slow=True, limit_s=90)
async def tells_the_heads(bench: Bench) -> None:
    """On a connection where nothing happens `hb` comes each `welcome.hb` seconds, with the head of each channel."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel, SHORT)
    await bench.finish(peer, oracle, turn.reply)
    every_s = peer.welcome["hb"]
    for _ in range(2):
        beat = await peer.until("hb", within_s=every_s + 5)
        require(beat["heads"].get(channel) == oracle.last, f"the head of the channel is {oracle.last}", beat)
        await peer.send("hb", ts=beat["ts"], a={channel: oracle.last})
