"""The HTTP side of the client against a server that the test scripts."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
import pytest

from parley.client import ApiError, ParleyHTTP, ServerUnreachable, Tokens

Answer = Callable[[httpx.Request], httpx.Response]


class Server:
    """Knows which access tokens hold; `answers` are what it says by method and path."""

    def __init__(self) -> None:
        self.holds = {"a0"}
        self.refreshes = 0
        self.requests: list[httpx.Request] = []
        self.answers: dict[str, Answer] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.refreshing = asyncio.Event()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        key = f"{request.method} {request.url.path.removeprefix('/api/v1')}"
        if key in self.answers:
            return self.answers[key](request)
        if key == "POST /auth/refresh":
            self.refreshing.set()
            await self.gate.wait()
            if json.loads(request.content)["refresh_token"] != f"r{self.refreshes}":
                return refusal(401, "refresh_invalid")
            self.refreshes += 1
            self.holds = {f"a{self.refreshes}"}
            return data(session(self.refreshes))
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in self.holds:
            return refusal(401, "unauthenticated")
        return data([])


def session(number: int) -> dict[str, Any]:
    return {
        "user": {"id": "u", "email": "a@example.com"}, "workspace": {"id": "w"}, "access_token": f"a{number}",
        "token_type": "bearer", "expires_in": 900, "refresh_token": f"r{number}",
    }  # fmt: skip


def data(value: Any, status: int = 200, **meta: Any) -> httpx.Response:
    return httpx.Response(status, json={"data": value, "meta": {"request_id": "req", **meta}, "errors": []})


def refusal(status: int, code: str, **headers: str) -> httpx.Response:
    body: dict[str, Any] = {
        "data": None,
        "meta": {},
        "error": code,
        "message": "No.",
        "details": {"field": "x"},
        "errors": [],
    }
    return httpx.Response(status, json=body, headers=headers)


@pytest.fixture
def server() -> Server:
    return Server()


class Kept(list[Tokens | None]):
    """The tokens that were handed over to be kept."""


def client(server: Server, *, now: float = 0, kept: Kept | None = None, expires_at: float = 900) -> ParleyHTTP:
    tokens = Tokens(access_token="a0", refresh_token="r0", expires_at=expires_at)
    return ParleyHTTP(
        "http://parley.test/",
        tokens=tokens,
        on_tokens=None if kept is None else kept.append,
        transport=httpx.MockTransport(server),
        clock=lambda: now,
    )


async def test_signing_up_keeps_the_tokens(server: Server) -> None:
    kept = Kept()
    server.answers["POST /auth/signup"] = lambda _: data(session(7), 201)
    async with client(server, now=1000, kept=kept) as http:
        tokens = await http.sign_up("a@example.com", "correct horse 1", name="A")
    body = json.loads(server.requests[0].content)
    assert body == {
        "email": "a@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1", "name": "A"
    }  # fmt: skip
    assert (tokens.access_token, tokens.expires_at, tokens.user["id"]) == ("a7", 1900, "u")
    assert kept == [tokens]


async def test_an_address_that_has_to_be_confirmed(server: Server) -> None:
    server.answers["POST /auth/signup"] = lambda _: data({}, 202)
    async with client(server) as http:
        with pytest.raises(ApiError) as caught:
            await http.sign_up("a@example.com", "correct horse 1")
    assert caught.value.code == "verification_required"


async def test_a_token_is_renewed_before_it_expires(server: Server) -> None:
    async with client(server, now=871) as http:
        await http.list_conversations()
    assert [request.url.path for request in server.requests] == ["/api/v1/auth/refresh", "/api/v1/conversations"]
    assert server.requests[-1].headers["Authorization"] == "Bearer a1"


async def test_a_token_that_is_refused_is_renewed_once(server: Server) -> None:
    server.holds = set()
    async with client(server) as http:
        assert await http.list_conversations() == []
        assert server.refreshes == 1
        server.answers["GET /conversations"] = lambda _: refusal(401, "unauthenticated")
        with pytest.raises(ApiError):
            await http.list_conversations()
    assert server.refreshes == 2


async def test_requests_at_the_same_moment_share_one_renewal(server: Server) -> None:
    server.holds = set()
    server.gate.clear()
    async with client(server) as http:
        asking = [asyncio.create_task(http.list_conversations()) for _ in range(20)]
        async with asyncio.timeout(5):
            await server.refreshing.wait()  # all were refused, one asks for new tokens
        server.gate.set()
        await asyncio.gather(*asking)
    assert server.refreshes == 1


async def test_a_session_that_is_over_is_forgotten(server: Server) -> None:
    kept = Kept()
    server.refreshes, server.holds = 5, set()
    async with client(server, kept=kept) as http:
        with pytest.raises(ApiError) as caught:
            await http.list_conversations()
        assert (caught.value.status, caught.value.code) == (401, "refresh_invalid")
        assert http.tokens is None
        with pytest.raises(ApiError, match="Not signed in"):
            await http.credentials()
    assert kept == [None]


async def test_signing_out(server: Server) -> None:
    server.answers["POST /auth/signout"] = lambda _: httpx.Response(204)
    async with client(server) as http:
        await http.sign_out()
        assert http.tokens is None


async def test_what_is_asked_and_what_comes_back(server: Server) -> None:
    server.answers |= {
        "POST /conversations": lambda r: data({"id": "c", **json.loads(r.content)}, 201),
        "GET /conversations/c%2F": lambda _: data({"id": "c/"}),
        "GET /conversations/c/messages": lambda r: data([{"id": r.url.params["limit"]}], next_cursor="older"),
        "POST /conversations/c/messages": lambda r: data({"message": {}, "reply": json.loads(r.content)}, 202),
        "POST /replies/r/cancel": lambda _: data({"id": "r"}, 202),
        "POST /replies/r/continue": lambda _: data({"message": {"id": "r"}, "reply": {"id": "new"}}, 202),
        "POST /replies/r/regenerate": lambda _: data({"message": {"id": "q"}, "reply": {"id": "other"}}, 202),
        "POST /realtime/tickets": lambda _: data({"ticket": "tk_1", "expires_in": 30}, 201),
        "GET /models": lambda _: data([{"id": "demo"}]),
    }
    async with client(server) as http:
        assert await http.create_conversation(title="T") == {"id": "c", "title": "T"}
        assert await http.list_messages("c", limit=5, cursor="x") == ([{"id": "5"}], "older")
        turn = await http.send_message("c", "why?", model="demo", cid="0193c0de-9f3a-7bd2-8000-000000000001")
        assert turn["reply"] == {"text": "why?", "model": "demo"}
        assert server.requests[-1].headers["Idempotency-Key"] == "0193c0de-9f3a-7bd2-8000-000000000001"
        assert await http.cancel("r") == {"id": "r"}
        for call, reply, answer in (
            (http.continue_reply, "r", {"message": {"id": "r"}, "reply": {"id": "new"}}),
            (http.regenerate_reply, "r", {"message": {"id": "q"}, "reply": {"id": "other"}}),
        ):
            assert await call(reply, cid="0193c0de-9f3a-7bd2-8000-000000000002") == answer
            assert server.requests[-1].headers["Idempotency-Key"] == "0193c0de-9f3a-7bd2-8000-000000000002"
            await call(reply)
            assert UUID(server.requests[-1].headers["Idempotency-Key"]).version == 4, "one of its own, without one"
        assert await http.credentials() == {"ticket": "tk_1"}
        assert await http.list_models() == [{"id": "demo"}]
        assert http.realtime_url == "ws://parley.test/api/v1/realtime"
        assert ParleyHTTP("https://x.example/base/").realtime_url == "wss://x.example/base/api/v1/realtime"


async def test_an_id_cannot_leave_its_place_in_the_path(server: Server) -> None:
    async with client(server) as http:
        await http.get_conversation("../models")
        await http.continue_reply("../models")
    assert [request.url.raw_path for request in server.requests] == [
        b"/api/v1/conversations/..%2Fmodels", b"/api/v1/replies/..%2Fmodels/continue"
    ]  # fmt: skip


async def test_a_refusal_says_why(server: Server) -> None:
    server.answers["GET /models"] = lambda _: refusal(429, "rate_limited", **{"Retry-After": "3"})
    async with client(server) as http:
        with pytest.raises(ApiError) as caught:
            await http.list_models()
    error = caught.value
    assert (error.status, error.code, error.message) == (429, "rate_limited", "No.")
    assert error.details == {"field": "x", "retry_after_s": 3}


@pytest.mark.parametrize(
    "answer", [httpx.Response(200, html="<p>"), httpx.Response(502, text="bad"), httpx.Response(200, json=[])]
)
async def test_something_that_is_not_parley(server: Server, answer: httpx.Response) -> None:
    server.answers["GET /models"] = lambda _: answer
    async with client(server) as http:
        with pytest.raises(ApiError, match="does not answer like a Parley server"):
            await http.list_models()


async def test_a_server_that_is_not_there(server: Server) -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    server.answers["GET /models"] = away
    async with client(server) as http:
        with pytest.raises(ServerUnreachable, match=r"http://parley\.test does not answer: refused"):
            await http.list_models()
