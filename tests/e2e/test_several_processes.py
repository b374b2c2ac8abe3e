"""Several processes of one service: workers behind a port, and roles on hosts of their own."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, WebSocketException

from parley.core.db import DatabaseUrls
from parley.realtime.fold import digest
from tests.live import Frame, Socket, dial
from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

PASSWORD = "correct horse 1"


def workers_of(server: ServerProcess) -> list[int]:
    """Return the ids of a server's workers: its children that are Python."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"parley.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def sign_up(server: ServerProcess) -> str:
    body = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
    async with httpx.AsyncClient(base_url=server.url) as http:
        answer = await http.post("/api/v1/auth/signup", json=body)
        token: str = answer.json()["data"]["access_token"]
        return token


async def new_channel(server: ServerProcess, token: str) -> str:
    async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as http:
        made = await http.post("/api/v1/conversations", json={})
        return f"conversation:{made.json()['data']['id']}"


async def hello(server: ServerProcess, token: str, subs: list[Frame]) -> Socket:
    made = await dial(server)
    await made.send(t="hello", v=1, auth={"token": token}, subs=subs)
    assert (await made.receive())["t"] == "welcome"
    return made


class Reader:
    """Follows a channel over any number of connections, and holds that each event comes once and in order."""

    def __init__(self, servers: list[ServerProcess], token: str, channel: str) -> None:
        self.servers, self.token, self.channel = servers, token, channel
        self.last, self.epoch, self.text = 0, "", ""
        self.events: list[Frame] = []
        self.connections = 0

    async def connect(self) -> Socket:
        for attempt in range(200):
            server = self.servers[(self.connections + attempt) % len(self.servers)]
            sub = {"ch": self.channel, **({"since": {"ep": self.epoch, "seq": self.last}} if self.epoch else {})}
            try:
                made = await hello(server, self.token, [sub])
            except (OSError, WebSocketException):
                await asyncio.sleep(0.05)
            else:
                self.connections += 1
                return made
        raise AssertionError("nobody answers")

    def take(self, frame: Frame) -> None:
        if frame["t"] == "subbed":
            assert frame["recovered"] or not self.epoch, "a position that held before does not any more"
            self.epoch = frame["ep"]
            self.last = self.last or frame["head"]
        if frame["t"] == "ev":
            if frame["seq"] <= self.last:
                return
            assert frame.get("from", frame["seq"]) == self.last + 1
            self.last = frame["seq"]
            self.events.append(frame)
            if frame["e"] == "reply.delta":
                assert frame["d"]["off"] == len(self.text)
                self.text += frame["d"]["x"]

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield frames, from one connection after the other."""
        socket = await self.connect()
        while True:
            try:
                frame = await socket.receive(timeout_s=20)
            except ConnectionClosed:
                socket = await self.connect()
                continue
            self.take(frame)
            yield frame


async def send(server: ServerProcess, token: str, channel: str, text: str) -> str:
    async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as http:
        answer = await http.post(f"/api/v1/conversations/{channel.partition(':')[2]}/messages", json={"text": text})
        assert answer.status_code == 202, answer.text
        reply: str = answer.json()["data"]["reply"]["id"]
        return reply


async def test_a_reply_survives_every_worker(tmp_path: Path) -> None:
    """Each worker is killed once while it is written. The model can be given a beginning, so the text comes whole."""
    with server_process(tmp_path / "data", PARLEY_WORKERS="2", PARLEY_DEMO_DELAY_MS="10") as server:
        token = await sign_up(server)
        channel = await new_channel(server, token)
        reader = Reader([server], token, channel)
        killed: list[int] = []
        sent = ""
        async for frame in reader.frames():
            if frame["t"] == "live" and not sent:
                sent = await send(server, token, channel, "repeat 300 word")
            if len(reader.text) > 200 * (len(killed) + 1) and len(killed) < 2:
                victim = next(pid for pid in workers_of(server) if pid not in killed)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
            if frame.get("e") in {"reply.completed", "reply.failed"}:
                break
        ended = reader.events[-1]
        assert ended["e"] == "reply.completed", ended["d"]
        assert (ended["d"]["len"], ended["d"]["sha256"]) == digest(reader.text)
        # Exactly what it would have been, had nobody been killed.
        assert " ".join(reader.text.split()).count("word") == 300
        strategies = [event["d"]["strategy"] for event in reader.events if event["e"] == "reply.resumed"]
        assert strategies, "whoever wrote it was among the killed"
        assert set(strategies) == {"prefill"}
        assert reader.connections >= 2

        def both_are_back() -> bool:
            return len(workers_of(server)) == 2 and not set(killed) & set(workers_of(server))

        deadline = time.monotonic() + 10
        while not both_are_back():
            assert time.monotonic() < deadline, "the parent did not start others"
            await asyncio.sleep(0.02)
        assert server.terminate() == 0


async def test_workers_are_replaced_one_by_one_and_nothing_is_refused(tmp_path: Path) -> None:
    with server_process(tmp_path / "data", PARLEY_WORKERS="2", PARLEY_DEMO_DELAY_MS="10") as server:
        token = await sign_up(server)
        before = set(workers_of(server))
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while set(workers_of(server)) & before or len(workers_of(server)) != 2:
            # A connection for each: one that is kept may be closed in the moment in which it is used again.
            async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as http:
                assert (await http.get("/api/v1/me")).status_code == 200
            assert time.monotonic() < deadline, "they were not replaced"
        assert server.terminate() == 0


async def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    """They would hold the port, and go on without the database that the parent owns."""
    with server_process(tmp_path / "data", PARLEY_WORKERS="2") as server:
        workers = workers_of(server)
        assert len(workers) == 2
        server.kill()
        deadline = time.monotonic() + 10
        while any(is_alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "they are still there"
            await asyncio.sleep(0.02)
    with server_process(tmp_path / "data", PARLEY_WORKERS="2") as again:
        await sign_up(again)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def on_one_database(urls: DatabaseUrls, base: Path, **roles: str) -> Iterator[dict[str, ServerProcess]]:
    environment = {
        "PARLEY_DATABASE_URL": urls.app,
        "PARLEY_DATABASE_SYSTEM_URL": urls.system,
        "PARLEY_DATABASE_OWNER_URL": urls.owner,
        "PARLEY_SECRET_KEY": "one key for all of them, long enough",
        "PARLEY_RATE_LIMITS": "off",
        "PARLEY_DEMO_DELAY_MS": "5",
    }
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(server_process(base / name, **environment, PARLEY_ROLE=role))
            for name, role in roles.items()
        }


async def test_roles(urls: DatabaseUrls, tmp_path: Path) -> None:
    """What is sent at one web process is written by the generating one, and read at another web process."""
    with on_one_database(urls, tmp_path, one="web", two="web", writer="gen") as servers:
        token = await sign_up(servers["one"])
        channel = await new_channel(servers["one"], token)
        reader = Reader([servers["two"]], token, channel)
        async for frame in reader.frames():
            if frame["t"] == "live" and not reader.events:
                sent_at = time.monotonic()
                await send(servers["one"], token, channel, "repeat 50 word")
            if frame.get("e") == "reply.started":
                started_s = time.monotonic() - sent_at
            if frame.get("e") in {"reply.completed", "reply.failed"}:
                break
        assert reader.events[-1]["e"] == "reply.completed"
        assert reader.text.count("word") == 50
        assert started_s < 0.4, "it was begun by the sweep and not by the call"
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{servers['writer'].url}/health/ready")).status_code == 200
            assert (await http.get(f"{servers['writer'].url}/api/v1/me")).status_code == 404

        # A cancel at one is heard by the writer at once.
        reply = await send(servers["one"], token, channel, "repeat 3000 word")
        socket = await hello(servers["two"], token, [{"ch": channel}])
        await socket.until(lambda f: f.get("e") == "reply.delta")
        asked_at = time.monotonic()
        await socket.send(t="reply.cancel", id=1, reply=reply)
        await socket.until(lambda f: f.get("e") == "reply.cancelled")
        assert time.monotonic() - asked_at < 0.5
        await socket.connection.close()
