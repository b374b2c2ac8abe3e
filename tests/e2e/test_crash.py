"""`kill -9` in mid-reply: what was acknowledged is there, what was seen stays, and the rest follows it."""

import signal
import time
from pathlib import Path

import httpx
import pytest

from parley.realtime.fold import digest, visible_text
from tests.documented import documented
from tests.live import Frame, Socket, dial
from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

PASSWORD = "correct horse 1"


async def _account(server: ServerProcess, path: str) -> str:
    async with httpx.AsyncClient(base_url=server.url) as http:
        body = {"email": "alice@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
        if path == "signin":
            del body["confirmPassword"]
        answer = await http.post(f"/api/v1/auth/{path}", json=body)
        token: str = answer.json()["data"]["access_token"]
        return token


async def _hello(server: ServerProcess, token: str, subs: list[Frame]) -> Socket:
    socket = await dial(server)
    await socket.send(t="hello", v=1, auth={"token": token}, subs=subs)
    assert (await socket.receive())["t"] == "welcome"
    return socket


async def test_kill_in_mid_reply(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with server_process(data_dir) as server:
        token = await _account(server, "signup")
        async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as http:
            id_ = (await http.post("/api/v1/conversations", json={})).json()["data"]["id"]
        channel = f"conversation:{id_}"
        socket = await _hello(server, token, [{"ch": channel}])
        parts = [{"type": "text", "text": "repeat 300 word"}]
        await socket.send(t="chat.send", id=1, ch=channel, cid="0193c0de-0000-7000-8000-000000000001", parts=parts)
        seen, epoch, last = "", "", 0
        while len(seen) < 200:
            frame = await socket.receive()
            epoch = frame.get("ep", epoch)
            if frame["t"] == "ev":
                last = frame["seq"]
                seen += frame["d"].get("x", "")
        server.kill()
        socket.drop()

    # No repair: the same command on the same folder. The access token outlives the restart too.
    with server_process(data_dir) as server:
        async with await _hello(server, token, [{"ch": channel, "since": {"ep": epoch, "seq": last}}]) as again:
            subbed = await again.of_type("subbed")
            assert subbed["recovered"] is True
            # This model can be given the beginning of its answer, so the answer comes to its own end.
            ended = await again.until(lambda f: f.get("e") == "reply.completed", timeout_s=30)
            resumed = [f["d"] for f in again.frames if f.get("e") == "reply.resumed"]
            assert [(d["strategy"], d["attempt"]) for d in resumed] == [("prefill", 2)]
            rest = "".join(f["d"]["x"] for f in again.frames if f.get("e") == "reply.delta")
            whole = seen + rest
            assert whole.split() == [f"word{n}" for n in range(1, 301)]
            assert (ended["d"]["len"], ended["d"]["sha256"]) == digest(whole)
            async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as http:
                question, reply = (await http.get(f"/api/v1/conversations/{id_}/messages")).json()["data"]
            assert question["parts"] == parts
            assert visible_text(reply) == whole

            cid = "0193c0de-0000-7000-8000-000000000002"
            await again.send(t="chat.send", id=2, ch=channel, cid=cid, parts=[{"type": "text", "text": "hello"}])
            await again.until(lambda f: f.get("e") == "reply.completed")
        assert server.terminate() == 0


async def test_postgres_killed_under_the_server_comes_back(tmp_path: Path) -> None:
    with server_process(tmp_path / "data") as server:
        token = await _account(server, "signup")
        async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as http:
            assert (await http.post("/api/v1/tasks", json={"title": "before"})).status_code == 201
            pid = int((tmp_path / "data/postgres/data/postmaster.pid").read_text().split()[0])
            import os

            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 15
            while True:
                answer = await http.get("/api/v1/tasks")
                assert answer.status_code in {200, 503}, answer.text
                if answer.status_code == 200 and (await http.get("/health/ready")).status_code == 200:
                    break
                assert time.monotonic() < deadline, "the database did not come back"
            assert [task["title"] for task in answer.json()["data"]] == ["before"]
            made = (await http.post("/api/v1/conversations", json={})).json()["data"]["id"]
            path = f"/api/v1/conversations/{made}/messages"
            # What is connected is looked at again now; a stream that could not be says so, and the same key goes on.
            headers = {"Accept": "text/event-stream", "Idempotency-Key": "0193c0de-0000-7000-8000-000000000003"}
            text = ""
            while "event: reply.completed" not in text:
                assert time.monotonic() < deadline + 15, text
                answer = await http.post(path, json={"text": "hello"}, headers=headers, timeout=20)
                text = documented().streamed(answer.text)
                assert "event: reply.completed" in text or "event: unsubbed" in text
            assert len((await http.get(path)).json()["data"]) == 2


async def test_two_servers_side_by_side(tmp_path: Path) -> None:
    with server_process(tmp_path / "one") as one, server_process(tmp_path / "two") as two:
        token = await _account(one, "signup")
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}) as http:
            assert (await http.get(f"{one.url}/api/v1/me")).status_code == 200
            assert (await http.get(f"{two.url}/api/v1/me")).status_code == 401
