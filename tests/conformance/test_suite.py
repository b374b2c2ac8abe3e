"""The whole suite against a real server, and what it leaves behind."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from parley.conformance.catalogue import SECTIONS
from parley.conformance.command import examine, parser
from tests.process import ServerProcess, server_process

pytestmark = pytest.mark.process

_PASSWORD = "correct horse 1"


async def _command(*arguments: str) -> tuple[int, str, str]:
    """Run `parley conformance` as its users do."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "parley.cli", "conformance", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_server_conforms(conforming: ServerProcess) -> None:
    code, out, err = await _command(conforming.url, "--json", "--jobs", "6", "--prompt", "repeat 150 word")
    report: dict[str, Any] = json.loads(out)
    assert [check for check in report["checks"] if check["outcome"] == "failed"] == []
    skipped = [check["id"] for check in report["checks"] if check["outcome"] == "skipped"]
    assert skipped == [check.id for section in SECTIONS for check in section.checks if check.slow]
    assert len(report["checks"]) == sum(len(section.checks) for section in SECTIONS)
    assert (code, err) == (0, "")
    assert report["seconds"] < 60


async def test_the_slow_checks(tmp_path: Path) -> None:
    # The same timers, shorter: what is waited for is what the server says and does.
    settings = {"PARLEY_REALTIME_HEARTBEAT_S": "1", "PARLEY_REALTIME_ACK_TIMEOUT_S": "2"}
    with server_process(tmp_path / "data", **settings) as server:
        options = parser("test").parse_args(
            [server.url, "--slow", "--only", "acks.no_ack", "--only", "heartbeat.tells"]
        )
        results = await examine(options)
    assert {result.check.id: result.reason for result in results if result.outcome != "ok"} == {}
    assert sum(result.check.slow for result in results) == 2


async def test_nothing_is_left_behind(conforming: ServerProcess) -> None:
    email = "owner@example.com"
    async with httpx.AsyncClient(base_url=f"{conforming.url}/api/v1") as http:
        body = {"email": email, "password": _PASSWORD, "confirmPassword": _PASSWORD}
        made = await http.post("/auth/signup", json=body)
        http.headers["Authorization"] = f"Bearer {made.json()['data']['access_token']}"
        arguments = [conforming.url, "--email", email, "--password", _PASSWORD, "--prompt", "repeat 40 word"]
        only = ("queueing", "idempotency", "credentials", "isolation", "subscribe.inbox_tells_of_conversations")
        code, out, _ = await _command(*arguments, *(word for one in only for word in ("--only", one)))
        assert code == 0, out
        assert (await http.get("/conversations")).json()["meta"]["total"] == 0
        assert (await http.get("/api-keys")).json()["data"] == []
        # Of the sessions only the one that this test reads with.
        assert len((await http.get("/auth/sessions")).json()["data"]) == 1


async def test_a_token_is_enough(conforming: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=f"{conforming.url}/api/v1") as http:
        body = {"email": "token@example.com", "password": _PASSWORD, "confirmPassword": _PASSWORD}
        token = (await http.post("/auth/signup", json=body)).json()["data"]["access_token"]
        code, out, _ = await _command(conforming.url, "--token", token, "--only", "credentials", "--json")
        assert code == 0, out
        outcomes = {check["id"]: check["outcome"] for check in json.loads(out)["checks"]}
        # Without a password there is no second session to end.
        assert outcomes.pop("credentials.sign_out_ends_the_connection") == "skipped"
        assert set(outcomes.values()) == {"ok"}
        # An account that was given is not closed.
        me = await http.get("/me", headers={"Authorization": f"Bearer {token}"})
        assert me.status_code == 200
        assert token not in out


async def test_a_server_that_is_not_there() -> None:
    code, out, err = await _command("http://127.0.0.1:9", "--only", "handshake")
    assert (code, out) == (2, "")
    assert err.startswith("parley conformance: http://127.0.0.1:9 does not answer")


async def test_something_else_than_a_parley_server() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        code, out, err = await _command(f"127.0.0.1:{port}")
    assert (code, out) == (2, "")
    assert "no account could be signed up" in err
