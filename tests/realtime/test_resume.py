"""A client that is cut off at any frame and comes back has lost nothing, doubled nothing, and reordered nothing."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from benchmarks.fake_provider import FakeProvider, script
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, RealtimeSettings
from parley.realtime.fold import digest
from tests.conftest import make_settings
from tests.live import Frame, LiveServer, Socket, greet, live

DELTAS = 300
SEED = 21
EXPECTED = "".join(script(SEED, DELTAS, 4))

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
models:
  gpt: {{provider: openai, name: fake, retries: 0}}
aliases:
  default: gpt
"""


@dataclass
class Reader:
    """The client rule in a few lines, for one channel and one reply; it refuses whatever is not exactly next."""

    channel: str
    epoch: str = ""
    last: int = 0
    text: str = ""
    events: int = 0
    terminal: Frame | None = None
    seen: list[tuple[int, int]] = field(default_factory=list)

    def take(self, frame: Frame) -> None:
        if frame["t"] == "subbed":
            self.epoch = frame["ep"]
        elif frame["t"] == "snap":
            self.last = frame["seq"]
        if frame["t"] != "ev":
            return
        low = frame.get("from", frame["seq"])
        assert low == self.last + 1, f"{low} after {self.last}"
        self.last = frame["seq"]
        self.seen.append((low, frame["seq"]))
        self.events += 1
        d = frame["d"]
        if frame["e"] == "reply.delta":
            assert d["off"] == len(self.text)
            self.text += d["x"]
        elif frame["e"] == "reply.completed":
            self.terminal = frame
            assert (d["len"], d["sha256"]) == digest(self.text)

    @property
    def since(self) -> Frame:
        return {"ep": self.epoch, "seq": self.last}


async def _read(socket: Socket, reader: Reader, *, events: int | None = None) -> None:
    """Read until the reply has ended, or until so many events were taken."""
    while reader.terminal is None and (events is None or reader.events < events):
        frame = await socket.receive(timeout_s=30)
        reader.take(frame)
        if frame["t"] == "ev" and frame["seq"] % 50 == 0:
            await socket.send(t="ack", a={reader.channel: reader.last})


async def _sign_up(server: LiveServer) -> tuple[str, str, UUID]:
    """Return a token, a channel and a conversation's id."""
    async with httpx.AsyncClient(base_url=server.url) as http:
        body = {"email": "alice@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        token = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        made = (await http.post("/api/v1/conversations", json={})).json()["data"]["id"]
    return token, f"conversation:{made}", UUID(made)


async def _ask(server: LiveServer, token: str, channel: str, *, rate: int) -> None:
    socket = await greet(server, token)
    async with socket:
        parts = [{"type": "text", "text": f"deltas={DELTAS} rate={rate} seed={SEED} size=4"}]
        cid = "0193c0de-0000-7000-8000-000000000001"
        await socket.send(t="chat.send", id=1, ch=channel, cid=cid, parts=parts)
        assert (await socket.of_type("ok"))["id"] == 1


@pytest.mark.parametrize("served_from", ["ring", "postgres"])
async def test_a_drop_at_every_frame_loses_nothing(tmp_path: Path, urls: DatabaseUrls, served_from: str) -> None:
    async with FakeProvider() as provider:
        (tmp_path / "registry.yaml").write_text(REGISTRY.format(url=provider.url))
        settings = make_settings(
            tmp_path,
            urls,
            llm=LlmSettings(registry=tmp_path / "registry.yaml"),
            realtime=RealtimeSettings(tick_ms=0, connections_per_user=2000, frames_burst=10_000),
        )
        async with live(settings) as server:
            token, channel, conversation = await _sign_up(server)
            ended = asyncio.Event()

            async def follow(cut_after: int) -> Reader:
                reader = Reader(channel)
                # Not all at once: this test is about frames and not about a storm of connections.
                async with door:
                    socket = await greet(server, token, subs=[{"ch": channel}])
                    await socket.of_type("live")
                for frame in socket.frames:
                    reader.take(frame)
                waiting.release()
                try:
                    await _read(socket, reader, events=cut_after)
                finally:
                    socket.drop()
                if reader.terminal is None:
                    if served_from == "postgres":
                        await ended.wait()
                    async with door:
                        again = await greet(server, token, subs=[{"ch": channel, "since": reader.since}])
                        subbed = await again.of_type("subbed")
                        assert (subbed["recovered"], subbed["why"]) == (True, "ok")
                    async with again:
                        await _read(again, reader)
                return reader

            # Every event of the reply: 300 deltas of their own, and what frames them.
            cuts = range(1, DELTAS + 8)
            waiting, door = asyncio.Semaphore(0), asyncio.Semaphore(8)
            followers = [asyncio.create_task(follow(cut)) for cut in cuts]
            for _ in followers:
                await waiting.acquire()
            await _ask(server, token, channel, rate=40)

            watcher = Reader(channel)
            async with await greet(server, token, subs=[{"ch": channel, "since": {"seq": 0}}]) as socket:
                await _read(socket, watcher)
            if served_from == "postgres":
                bus = server.app.state.realtime.bus
                for ring in bus._rings.values():
                    ring.open(head=ring.head, epoch=ring.epoch)
            ended.set()

            readers = [*await asyncio.gather(*followers), watcher]
            assert {reader.text for reader in readers} == {EXPECTED}
            assert {reader.last for reader in readers} == {watcher.last}
            stored = await _stored(urls, conversation)
            deltas = sum(1 for _, e in stored if e == "reply.delta")
            assert deltas > DELTAS / 3, "with a tick of 0 only what arrives during a write is joined"
            assert max(cuts) >= len(stored) - 2, "there was a client for every event"
            assert [seq for seq, _ in stored] == list(range(1, watcher.last + 1))


async def _stored(urls: DatabaseUrls, conversation: UUID) -> list[tuple[int, str]]:
    import asyncpg

    connection = await asyncpg.connect(urls.system)
    try:
        rows = await connection.fetch(
            "SELECT seq, e FROM channel_events WHERE channel = $1 ORDER BY seq", f"conversation:{conversation}"
        )
    finally:
        await connection.close()
    return [(row["seq"], row["e"]) for row in rows]


async def test_a_ring_of_nothing_serves_everything_from_postgres(tmp_path: Path, urls: DatabaseUrls) -> None:
    settings = make_settings(tmp_path, urls, realtime=RealtimeSettings(ring_events=0))
    async with live(settings) as server:
        token, channel, _ = await _sign_up(server)
        async with await greet(server, token, subs=[{"ch": channel}]) as socket:
            await socket.of_type("live")
            parts = [{"type": "text", "text": "repeat 40 word"}]
            await socket.send(t="chat.send", id=1, ch=channel, cid="0193c0de-0000-7000-8000-000000000001", parts=parts)
            done = await socket.until(lambda frame: frame.get("e") == "reply.completed")
        text = "".join(f["d"]["x"] for f in socket.frames if f.get("e") == "reply.delta")
        assert digest(text) == (done["d"]["len"], done["d"]["sha256"])


async def test_a_snapshot_in_mid_reply_and_the_rest_make_the_whole(tmp_path: Path, urls: DatabaseUrls) -> None:
    settings = make_settings(tmp_path, urls)
    async with live(settings) as server:
        token, channel, _ = await _sign_up(server)
        async with await greet(server, token, subs=[{"ch": channel}]) as first:
            parts = [{"type": "text", "text": "repeat 60 word"}]
            await first.send(t="chat.send", id=1, ch=channel, cid="0193c0de-0000-7000-8000-000000000001", parts=parts)
            await first.until(lambda frame: frame.get("e") == "reply.delta")
            await first.until(lambda frame: frame.get("e") == "reply.delta")
            async with await greet(server, token, subs=[{"ch": channel}]) as late:
                snap = await late.of_type("snap")
                message = snap["state"]["messages"][-1]
                assert message["status"] == "streaming"
                text, last = message["parts"][0]["text"], snap["seq"]
                assert text
                while True:
                    frame = await late.receive()
                    if frame["t"] != "ev":
                        continue
                    assert frame.get("from", frame["seq"]) == last + 1
                    last = frame["seq"]
                    if frame["e"] == "reply.delta":
                        assert frame["d"]["off"] == len(text)
                        text += frame["d"]["x"]
                    if frame["e"] == "reply.completed":
                        assert digest(text) == (frame["d"]["len"], frame["d"]["sha256"])
                        break


async def test_a_socket_that_is_gone_does_not_stop_the_reply(tmp_path: Path, urls: DatabaseUrls) -> None:
    settings = make_settings(tmp_path, urls)
    async with live(settings) as server:
        token, channel, _ = await _sign_up(server)
        socket = await greet(server, token, subs=[{"ch": channel}])
        parts = [{"type": "text", "text": "repeat 30 word"}]
        await socket.send(t="chat.send", id=1, ch=channel, cid="0193c0de-0000-7000-8000-000000000001", parts=parts)
        await socket.until(lambda frame: frame.get("e") == "reply.delta")
        socket.drop()
        with pytest.raises(ConnectionClosed):
            await socket.receive()
        async with await greet(server, token, subs=[{"ch": channel, "since": {"seq": 0}}]) as again:
            await again.until(lambda frame: frame.get("e") == "reply.completed")
