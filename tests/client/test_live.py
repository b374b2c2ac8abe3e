"""The client against the real server, over a network that breaks."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from parley.client import ApiError, ConnectionChange, ConnectionStopped, ParleyHTTP, RealtimeClient
from parley.client.states import find_message
from parley.core.settings import Settings
from parley.realtime.drain import drain
from parley.realtime.fold import digest, visible_text
from tests.client.relay import Relay
from tests.live import live
from tests.process import server_process

PASSWORD = "correct horse 1"
DEADLINE_S = 30


@pytest.fixture
async def relay(settings: Settings) -> AsyncIterator[Relay]:
    """The real server behind a network that can be cut."""
    async with live(settings) as server, Relay.to(server.port) as made:
        yield made


@pytest.fixture
async def http(relay: Relay) -> AsyncIterator[ParleyHTTP]:
    """A user of it."""
    async with ParleyHTTP(relay.url) as made:
        await made.sign_up(f"{uuid4().hex}@example.com", PASSWORD)
        yield made


def numbered(count: int) -> str:
    return " ".join(f"word{n}" for n in range(1, count + 1))


class Listener:
    """Adds up a reply from events alone, trusting that each piece is told once."""

    def __init__(self, http: ParleyHTTP) -> None:
        self.texts: dict[str, str] = {}
        self.changes: list[ConnectionChange] = []
        self.deltas = 0
        self.client = RealtimeClient(
            http.realtime_url,
            http.credentials,
            on_event=self._event,
            on_connection=self.changes.append,
            random=lambda: 0.02,  # a reconnect within 10 ms
        )

    def _event(self, ch: str, e: str, d: dict[str, Any]) -> None:
        if e == "reply.delta":
            self.deltas += 1
            text = self.texts.setdefault(d["reply"], "")
            assert d["off"] == len(text)
            self.texts[d["reply"]] = text + d["x"]


async def channel_of(http: ParleyHTTP) -> str:
    return f"conversation:{(await http.create_conversation())['id']}"


async def test_a_reply_over_a_network_that_keeps_breaking(relay: Relay, http: ParleyHTTP) -> None:
    ch = await channel_of(http)
    shaken, calm = Listener(http), Listener(http)
    async with shaken.client, calm.client, asyncio.timeout(DEADLINE_S):
        await asyncio.gather(shaken.client.subscribe(ch), calm.client.subscribe(ch))
        sent = await shaken.client.send(ch, "repeat 150 word")
        ended = asyncio.create_task(shaken.client.wait_terminal(sent["reply"]))
        chance = random.Random(7)
        while not ended.done():
            heard = shaken.deltas
            until = heard + chance.randrange(1, 6)
            while shaken.deltas < until and not ended.done():
                await asyncio.wait({ended}, timeout=0.005)
            shaken.client.drop()
        message = await ended
        assert await calm.client.wait_terminal(sent["reply"]) == message
        lost = [change for change in shaken.changes if change.state == "disconnected"]
        assert len(lost) > 5, "it did break"
        assert visible_text(message) == numbered(150)
        for listener in (shaken, calm):
            assert listener.client.integrity_failures == 0
            assert listener.texts[sent["reply"]] == numbered(150)
        # What a new client is given is what the others have come to.
        fresh = Listener(http)
        async with fresh.client:
            state = await fresh.client.subscribe(ch)
            assert state["messages"] == shaken.client.state(ch)["messages"] == calm.client.state(ch)["messages"]
            assert state["conversation"]["current_id"] == calm.client.state(ch)["conversation"]["current_id"]


async def test_a_message_sent_into_a_broken_network_has_one_effect(relay: Relay, http: ParleyHTTP) -> None:
    ch = await channel_of(http)
    listener = Listener(http)
    async with listener.client, asyncio.timeout(DEADLINE_S):
        await listener.client.subscribe(ch)
        sending = []
        for n in range(10):
            sending.append(asyncio.create_task(listener.client.send(ch, f"message {n}")))
            await asyncio.sleep(0)
            relay.cut()
        sent = await asyncio.gather(*sending)
        for turn in sent:
            assert (await listener.client.wait_terminal(turn["reply"]))["status"] == "completed"
        messages = listener.client.state(ch)["messages"]
        asked = [visible_text(message) for message in messages if message["role"] == "user"]
        assert sorted(asked) == sorted(f"message {n}" for n in range(10))
        stored, _ = await http.list_messages(ch.partition(":")[2])
        assert stored == messages


async def test_the_socket_and_http_are_one_server(relay: Relay, http: ParleyHTTP) -> None:
    ch = await channel_of(http)
    listener = Listener(http)
    async with listener.client, asyncio.timeout(DEADLINE_S):
        await listener.client.subscribe(ch)
        inbox = await listener.client.subscribe("user:me")
        tasks = await listener.client.subscribe("tasks")
        assert ch.endswith(inbox["conversations"][0]["id"])
        cid = uuid4()
        turn = await http.send_message(ch.partition(":")[2], "add task buy milk", cid=cid)
        again = await listener.client.send(ch, "add task buy milk", cid=cid)
        assert again == {"message": turn["message"]["id"], "reply": turn["reply"]["id"]}
        message = await listener.client.wait_terminal(again["reply"])
        assert [part["type"] for part in message["parts"]] == ["tool", "text"]
        assert [item["title"] for item in tasks["items"]] == ["buy milk"]
        with pytest.raises(ApiError) as caught:
            await listener.client.send(ch, "something else", cid=cid)
        assert caught.value.code == "conflict"
        with pytest.raises(ApiError) as caught:
            await listener.client.subscribe(f"conversation:{uuid4()}")
        assert caught.value.code == "not_found"


async def test_a_reply_is_stopped(relay: Relay, http: ParleyHTTP) -> None:
    ch = await channel_of(http)
    listener = Listener(http)
    async with listener.client, asyncio.timeout(DEADLINE_S):
        await listener.client.subscribe(ch)
        sent = await listener.client.send(ch, "repeat 2000 word")
        stream = listener.client.events()
        async for _, e, _ in stream:
            if e == "reply.delta":
                break
        await listener.client.cancel(sent["reply"])
        await http.cancel(sent["reply"])
        message = await listener.client.wait_terminal(sent["reply"])
        assert message["status"] == "cancelled"
        assert numbered(2000).startswith(visible_text(message))
        assert listener.client.integrity_failures == 0


async def test_a_reply_is_continued_and_made_anew(relay: Relay, http: ParleyHTTP) -> None:
    ch = await channel_of(http)
    listener = Listener(http)
    async with listener.client, asyncio.timeout(DEADLINE_S):
        await listener.client.subscribe(ch)
        first = await listener.client.send(ch, "repeat 3 word")
        await listener.client.wait_terminal(first["reply"])
        for ask, over_http, about in (
            (listener.client.regenerate_reply, http.regenerate_reply, first["message"]),
            (listener.client.continue_reply, http.continue_reply, first["reply"]),
        ):
            cid = uuid4()
            asking = [asyncio.create_task(ask(first["reply"], cid=cid)) for _ in range(3)]
            await asyncio.sleep(0)
            relay.cut()
            once, *again = await asyncio.gather(*asking)
            assert again == [once] * 2, "one effect"
            assert once["message"] == about
            turn = await over_http(first["reply"], cid=cid)
            assert (turn["message"]["id"], turn["reply"]["id"]) == (about, once["reply"])
            assert (await listener.client.wait_terminal(once["reply"]))["status"] == "completed"
        messages = listener.client.state(ch)["messages"]
        assert [message["role"] for message in messages] == ["user", *["assistant"] * 3]
        assert listener.client.integrity_failures == 0


async def test_a_reply_while_its_server_is_replaced(settings: Settings) -> None:
    """One server asks its clients to go while it writes; they go to another one, and nothing is lost or told twice."""
    async with live(settings) as first, live(settings) as second, Relay.to(first.port) as relay:
        async with ParleyHTTP(relay.url) as http, asyncio.timeout(DEADLINE_S):
            await http.sign_up(f"{uuid4().hex}@example.com", PASSWORD)
            ch = await channel_of(http)
            listener = Listener(http)
            async with listener.client:
                await listener.client.subscribe(ch)
                sent = await listener.client.send(ch, "repeat 150 word")
                async for _, e, _ in listener.client.events():
                    if e == "reply.delta" and listener.deltas > 5:
                        break
                relay.port = second.port
                draining = asyncio.create_task(drain(first.app.state.realtime, window_s=10, deadline_s=5))
                sending = asyncio.create_task(listener.client.send(ch, "are you there?"))
                await draining
                assert len(second.app.state.realtime.connections) == 1
                message = await listener.client.wait_terminal(sent["reply"])
                assert visible_text(message) == listener.texts[sent["reply"]] == numbered(150)
                answer = await listener.client.wait_terminal((await sending)["reply"])
                assert "are you there?" in visible_text(answer)
                assert listener.client.integrity_failures == 0
                states = [change.state for change in listener.changes]
                assert states == ["connecting", "connected", "connected"], "it was never without a connection"


async def test_a_client_that_stays_on_a_credential(relay: Relay, http: ParleyHTTP) -> None:
    async def token() -> dict[str, str]:
        return {"token": await http.access_token()}

    async def wrong() -> dict[str, str]:
        return {"token": "nonsense"}

    async with RealtimeClient(http.realtime_url, token) as client, asyncio.timeout(DEADLINE_S):
        await client.connected()
    states: list[ConnectionChange] = []
    async with RealtimeClient(http.realtime_url, wrong, on_connection=states.append, random=lambda: 0.0) as client:
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(ConnectionStopped) as caught:
                await client.connected()
    assert caught.value.code == 4401
    assert [change.state for change in states] == ["connecting", "connecting", "stopped"], "one new credential, no more"


@pytest.mark.process
async def test_a_server_that_is_killed(tmp_path: Path) -> None:
    """`kill -9` while a reply is written: the client comes back by itself, and what it showed stays as it was."""
    data_dir = tmp_path / "data"
    quick = {"PARLEY_DEMO_DELAY_MS": "5"}
    with server_process(data_dir, **quick) as first:
        async with Relay.to(first.port) as relay, ParleyHTTP(relay.url) as http, asyncio.timeout(90):
            await http.sign_up("a@example.com", PASSWORD)
            ch = await channel_of(http)
            listener = Listener(http)
            async with listener.client:
                await listener.client.subscribe(ch)
                sent = await listener.client.send(ch, "repeat 500 word")
                async for _, e, _ in listener.client.events():
                    if e == "reply.delta" and listener.deltas > 10:
                        break
                first.kill()
                sending = asyncio.create_task(listener.client.send(ch, "are you there?"))
                with server_process(data_dir, **quick) as second:
                    relay.port = second.port
                    ended = await listener.client.wait_terminal(sent["reply"])
                    assert ended["status"] == "completed"
                    assert listener.texts[sent["reply"]] == visible_text(ended) == numbered(500)
                    answer = await listener.client.wait_terminal((await sending)["reply"])
                    assert "are you there?" in visible_text(answer)
                    held = find_message(listener.client.state(ch), answer["id"])
                    assert held is not None
                    assert digest(visible_text(held)) == digest(visible_text(answer))
                    assert listener.client.integrity_failures == 0
