"""Limits of requests: by user, by key, by workspace, by address for credentials that do not hold."""

import asyncio
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI

from parley.core.api_limits import network_of
from parley.core.db import DatabaseUrls
from parley.core.settings import LimitSettings
from tests.conftest import Account, http_client, make_settings, running
from tests.core.test_hostile_http import filled, operations, sign_up_body
from tests.identity.test_issuers import socket

API = "/api/v1"


def limited(tmp_path: Path, urls: DatabaseUrls, **limits: int) -> Any:
    """Run an application with limits."""
    return running(make_settings(tmp_path, urls, rate_limits="on", limits=LimitSettings(**limits)))


async def signed_up(http: httpx.AsyncClient) -> dict[str, Any]:
    data: dict[str, Any] = (await http.post(f"{API}/auth/signup", json=sign_up_body())).json()["data"]
    http.cookies.clear()
    return data


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def over(answer: httpx.Response, limit: str) -> None:
    assert (answer.status_code, answer.json()["error"]) == (429, "rate_limited"), answer.text
    assert answer.json()["details"] == {"limit": limit}
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert answer.headers["RateLimit-Policy"].startswith(f'"{limit}";q=')
    assert re.fullmatch(rf'"{limit}";r=0;t=\d+', answer.headers["RateLimit"])


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("203.0.113.5", "203.0.113.5"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("::ffff:203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"), (None, "-"), ("unix", "unix"),
    ],
)  # fmt: skip
def test_what_counts_as_one_place(address: str | None, place: str) -> None:
    assert network_of(address) == place


async def test_by_user_whatever_the_session(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, api_per_minute=5) as app, http_client(app) as http:
        one, two = await signed_up(http), await signed_up(http)
        answers = [await http.get(f"{API}/tasks", headers=bearer(one["access_token"])) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert [answer.headers["RateLimit"].split(";")[1] for answer in answers[:5]] == [
            f"r={n}" for n in (4, 3, 2, 1, 0)
        ]
        assert answers[0].headers["RateLimit-Policy"] == '"user";q=5;w=60'
        over(answers[5], "user")
        # Another session of the same user is no way around; another user is not concerned.
        again = (await http.post(f"{API}/auth/refresh", json={"refresh_token": one["refresh_token"]})).json()["data"]
        over(await http.get(f"{API}/tasks", headers=bearer(again["access_token"])), "user")
        assert (await http.get(f"{API}/tasks", headers=bearer(two["access_token"]))).status_code == 200


async def test_by_key_and_by_workspace(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, key_per_minute=3, workspace_per_minute=12) as app, http_client(app) as http:
        user = await signed_up(http)
        made = [
            await http.post(f"{API}/api-keys", json={"name": "k"}, headers=bearer(user["access_token"]))
            for _ in range(3)
        ]
        keys = [answer.json()["data"]["key"] for answer in made]
        for key in keys[:2]:
            statuses = [(await http.get(f"{API}/tasks", headers=bearer(key))).status_code for _ in range(4)]
            assert statuses == [200] * 3 + [429]
        # Three and eight were counted for the workspace.
        assert (await http.get(f"{API}/tasks", headers=bearer(keys[2]))).status_code == 200
        over(await http.get(f"{API}/tasks", headers=bearer(keys[2])), "workspace")


async def test_what_is_refused_counts_too(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, api_per_minute=4) as app, http_client(app) as http:
        headers = bearer((await signed_up(http))["access_token"])
        for path in (f"/tasks/{uuid4()}", "/tasks/x", "/tasks?page=0", f"/conversations/{uuid4()}"):
            assert (await http.get(API + path, headers=headers)).status_code in {404, 422}
        over(await http.get(f"{API}/me", headers=headers), "user")


async def test_random_credentials_share_one_bucket(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, unverified_per_minute=5) as app, http_client(app) as http:
        good = (await signed_up(http))["access_token"]
        # Without any nothing is tried, and nothing counted.
        for _ in range(10):
            assert (await http.get(f"{API}/me")).status_code == 401
        statuses = [(await http.get(f"{API}/me", headers=bearer(f"x{uuid4()}"))).status_code for _ in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        # Not even a good one is looked at from there for a while: it would be a way to tell them apart.
        over(await http.get(f"{API}/me", headers=bearer(good)), "unverified")


async def test_every_route_is_limited(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, api_per_minute=1) as app, http_client(app) as http:
        user = await signed_up(http)
        account = Account(http, "", user["user"]["id"], user["workspace"]["id"], "", "")
        headers = bearer(user["access_token"])
        assert (await http.get(f"{API}/me", headers=headers)).status_code == 200
        tried = 0
        for method, path, operation in operations(app):
            if operation.get("x-permission") == "public":
                continue
            over(await http.request(method, filled(path, account), headers=headers), "user")
            tried += 1
        assert tried > 45


async def test_sign_ups_refreshes_sends_and_running_replies(tmp_path: Path, urls: DatabaseUrls) -> None:
    limits = {"signup_per_hour": 2, "refresh_per_minute": 2, "sends_per_minute": 6, "running_replies": 2}
    async with limited(tmp_path, urls, **limits) as app, http_client(app) as http:
        user = await signed_up(http)
        await signed_up(http)
        answer = await http.post(f"{API}/auth/signup", json=sign_up_body())
        assert (answer.status_code, answer.json()["details"]) == (429, {"limit": "signup"})
        token = user["refresh_token"]
        for _ in range(2):
            token = (await http.post(f"{API}/auth/refresh", json={"refresh_token": token})).json()["data"][
                "refresh_token"
            ]
        over(await http.post(f"{API}/auth/refresh", json={"refresh_token": token}), "refresh")

        headers = bearer(user["access_token"])
        made = [await http.post(f"{API}/conversations", json={}, headers=headers) for _ in range(3)]
        ids = [answer.json()["data"]["id"] for answer in made]
        slow = {"text": "count to 400"}
        first = [await http.post(f"{API}/conversations/{id_}/messages", json=slow, headers=headers) for id_ in ids]
        assert [answer.status_code for answer in first] == [202, 202, 429]
        assert first[2].json()["error"] == "too_many_replies"
        async with socket(app, {"token": user["access_token"]}) as peer:
            assert (await peer.receive_json(timeout=5))["t"] == "welcome"
            codes = []
            for number in range(4):
                frame = {"t": "chat.send", "id": number, "ch": f"conversation:{ids[2]}", "cid": str(uuid4()),
                         "parts": [{"type": "text", "text": "Hi"}]}  # fmt: skip
                await peer.send_json(frame)
                codes.append(await peer.receive_json(timeout=5))
        assert [answer["code"] for answer in codes] == ["rate_limited"] * 4
        assert codes[3]["retry_after_ms"] >= 1000


async def handshake(app: FastAPI, **extensions: dict[str, Any]) -> list[Any]:
    """Begin a handshake as a server does, and return what the application sends at first."""
    sent: list[Any] = []
    told = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if sent:
            await told.wait()
            return {"type": "websocket.disconnect", "code": 1000}
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)
        told.set()

    scope = {
        "type": "websocket", "path": f"{API}/realtime", "raw_path": b"", "query_string": b"", "root_path": "", "scheme": "ws",
        "headers": [], "subprotocols": ["parley.v1"], "client": ("203.0.113.5", 1), "server": ("x", 1), "extensions": extensions,
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


async def test_handshakes(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, handshakes_per_minute=2) as app:
        for _ in range(2):
            assert (await handshake(app))[0]["type"] == "websocket.accept"
        (start, body) = await handshake(app, **{"websocket.http.response": {}})
        assert (start["status"], body["body"]) == (429, b"Too many connections.")
        assert int(dict(start["headers"])[b"retry-after"]) >= 1
        # A server that can answer in no other way closes.
        assert await handshake(app) == [{"type": "websocket.close", "code": 4429}]


async def test_fifty_at_once_pass_no_more_than_the_limit(tmp_path: Path, urls: DatabaseUrls) -> None:
    async with limited(tmp_path, urls, api_per_minute=20) as app, http_client(app) as http:
        headers = bearer((await signed_up(http))["access_token"])
        answers = await asyncio.gather(*(http.get(f"{API}/models", headers=headers) for _ in range(50)))
        assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 30
