"""What happens by the clock: silence, heartbeats, acknowledgements that do not come."""

import asyncio
import itertools
import json
import time
from contextlib import AsyncExitStack

from tests.realtime.conftest import Serve, conversation_of, poll
from tests.realtime.steps import poll_until_ended, publish, slow_words, task_of


async def test_silence_is_4001_and_any_frame_breaks_it(serve_with: Serve) -> None:
    async with serve_with(realtime={"silence_timeout_s": 0.5}) as server, server.sign_up() as account:
        async with server.join(account) as silent, server.join(account) as alive:
            task = asyncio.create_task(silent.code())
            for _ in range(8):
                await alive.send("hb")
                await asyncio.sleep(0.1)  # the pace is what is tested
            assert await task == 4001
            await alive.alive()


async def test_heartbeats_come_with_heads_on_a_busy_connection(serve_with: Serve) -> None:
    async with serve_with(realtime={"heartbeat_s": 0.2}) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as peer:
            assert peer.seen[0]["hb"] >= 1
            await peer.sub(channel)
            sent = await peer.say(channel, slow_words(70))
            terminal = await peer.event("reply.completed", reply=sent["reply"])
            beats = [frame for frame in peer.seen if frame["t"] == "hb"]
            events = [frame for frame in peer.seen if frame["t"] == "ev"]
            span = (events[-1]["ts"] - events[0]["ts"]) / 1000
            assert span > 0.8, "the reply is to last for some heartbeats"
            assert len(beats) >= span / 0.2 - 2
            last = await peer.until("hb")
            assert last["heads"] == {channel: terminal["seq"]}
            heads = [frame["heads"][channel] for frame in peer.seen if frame["t"] == "hb" and frame["heads"]]
            assert heads == sorted(heads)
            # A head may name only what is committed, and what comes after it is higher.
            assert heads[-1] == terminal["seq"]


async def test_who_acknowledges_nothing_is_4002(serve_with: Serve) -> None:
    small = {"ack_window_bytes": 4096, "ack_timeout_s": 0.5}
    async with serve_with(realtime=small) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as lazy, server.join(account) as diligent:
            diligent.acks = True
            await lazy.sub(channel, since={"seq": -1})
            await diligent.sub(channel, since={"seq": -1})
            for number in range(4):
                sent = await diligent.say(channel, f"{number} " + "x" * 3000)
                await diligent.event("reply.completed", reply=sent["reply"])
            assert await lazy.code() == 4002
            received = [frame for frame in lazy.seen if frame["t"] == "ev"]
            assert sum(len(json.dumps(frame)) for frame in received) < 4096 + 16 * 1024
            await diligent.alive()


async def test_an_ack_opens_the_window_again(serve_with: Serve) -> None:
    small = {"ack_window_bytes": 2048, "ack_timeout_s": 20}
    async with serve_with(realtime=small) as server, server.sign_up() as account:
        channel = await conversation_of(account)
        async with server.join(account) as peer, server.join(account) as sender:
            await peer.sub(channel, since={"seq": -1})
            texts = [f"{number} " + "x" * 3000 for number in range(3)]
            for text in texts:
                sent = await sender.say(channel, text)
                await poll_until_ended(account, sent["reply"], channel)
            head = (await sender.ask("sub", ch=channel, since={"seq": -1}))["head"]
            stuck = 0
            while peer.logs[channel].last < head:
                try:
                    await peer.until("ev", within_s=0.3)
                except TimeoutError:
                    stuck += 1
                    await peer.send("ack", a={channel: peer.logs[channel].last})
            assert stuck, "the window closed between"


async def test_heartbeats_come_while_events_wait_for_an_acknowledgement(serve_with: Serve) -> None:
    quick = {"heartbeat_s": 0.2, "ack_window_bytes": 2048, "ack_timeout_s": 20}
    async with serve_with(realtime=quick) as server, server.sign_up() as account, server.join(account) as peer:
        task = await task_of(account)
        await peer.sub("tasks", since={"seq": -1})
        head = await publish(server, account, task, count=40, size=1000)
        (connection,) = server.realtime.connections
        await poll(lambda: connection._out.is_paused)
        for _ in range(3):
            beat = await peer.until("hb", within_s=2)
        assert beat["heads"] == {"tasks": head}
        assert peer.logs["tasks"].last < head
        assert connection._out.is_paused


async def test_those_who_come_together_do_not_beat_together(serve_with: Serve) -> None:
    async with serve_with() as server, server.sign_up() as account, AsyncExitStack() as stack:
        began = time.monotonic()
        for _ in range(12):
            await stack.enter_async_context(server.join(account))
        ended = time.monotonic()
        first = sorted(connection._heartbeat_at for connection in server.realtime.connections)
        # Within the interval that is promised, and not at its end only.
        assert began <= first[0]
        assert first[-1] <= ended + 30
        assert first[-1] - first[0] > 5


async def test_after_the_first_they_beat_at_the_promised_pace(serve_with: Serve) -> None:
    async with serve_with(realtime={"heartbeat_s": 0.3}) as server, server.sign_up() as account:
        async with server.join(account) as peer:
            began = time.monotonic()
            await peer.until("hb", within_s=2)
            assert time.monotonic() - began < 1.5, "the first comes within the first interval"
            stamps = [(await peer.until("hb", within_s=2))["ts"] for _ in range(4)]
            assert all(later - earlier >= 250 for earlier, later in itertools.pairwise(stamps)), stamps
