"""An issuer's keys: fetched seldom, kept while it is away, and never what they are not."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from parley.core import clock
from parley.core.http import create_http_client
from parley.identity import jwks
from parley.identity.issuers import Issuer
from parley.identity.jwks import STALE_S, TTL_S, UNKNOWN_KEY_S, Jwks
from tests.identity.issuers import JwksServer, SigningKey, clerk, jwks_server

FIRST, SECOND = SigningKey.make("RS256", "first"), SigningKey.make("RS256", "second")


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with create_http_client() as made:
        yield made


@pytest.fixture
async def server() -> AsyncIterator[JwksServer]:
    async with jwks_server(FIRST) as made:
        yield made


@pytest.fixture
def keys(server: JwksServer, http: httpx.AsyncClient) -> Jwks:
    return Jwks(Issuer.model_validate(clerk(server.url, FIRST).entry), http)


async def test_a_thousand_unknown_names_cost_one_fetch(server: JwksServer, keys: Jwks) -> None:
    assert await keys.find("first") is not None
    with clock.shifted(UNKNOWN_KEY_S + 1):
        assert set(await asyncio.gather(*(keys.find(str(uuid4())) for _ in range(1000)))) == {None}
        assert server.asked == 2
        assert await keys.find("first") is not None
    assert server.asked == 2


async def test_a_new_key_is_found_after_five_minutes_and_a_gone_one_is_not(server: JwksServer, keys: Jwks) -> None:
    assert await keys.find("first") is not None
    server.keys = [SECOND]
    with clock.shifted(UNKNOWN_KEY_S - 1):
        assert await keys.find("second") is None
    assert server.asked == 1
    with clock.shifted(UNKNOWN_KEY_S + 1):
        assert await keys.find("second") is not None
        assert await keys.find("first") is None
    assert server.asked == 2


async def test_keys_are_fetched_anew_after_an_hour(server: JwksServer, keys: Jwks) -> None:
    await keys.find("first")
    with clock.shifted(TTL_S - 1):
        await keys.find("first")
        assert server.asked == 1
    with clock.shifted(TTL_S + 1):
        await keys.find("first")
        assert server.asked == 2


async def test_those_who_wait_at_the_same_time_wait_for_one_fetch(server: JwksServer, keys: Jwks) -> None:
    server.held = asyncio.Event()
    waiting = asyncio.gather(*(keys.find("first") for _ in range(50)))
    await server.reached.wait()
    server.held.set()
    assert None not in await waiting
    assert server.asked == 1


async def test_an_issuer_that_is_away_keeps_its_keys_for_a_day(server: JwksServer, keys: Jwks) -> None:
    assert await keys.find("first") is not None
    server.status = 503
    with clock.shifted(TTL_S + 1):
        assert await keys.find("first") is not None
        assert await keys.find("unknown") is None
        assert server.asked == 2
    with clock.shifted(STALE_S - 1):
        assert await keys.find("first") is not None
    with clock.shifted(STALE_S + 60):
        assert await keys.find("first") is None
        server.status = 200
    with clock.shifted(STALE_S + 120):
        assert await keys.find("first") is not None


def _document(*entries: Any) -> bytes:
    return json.dumps({"keys": entries}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff\xfe", b"{}", b"[]", b"null", b"1", b'"keys"', b'{"keys": null}', b'{"keys": {}}', b'{"keys": [1]}',
        b"[" * 20_000, _document({"kty": "RSA", "kid": "first"}), _document({"kty": "RSA", "kid": "first", "n": 1}),
        _document({"kty": "oct", "kid": "first", "k": "c2VjcmV0"}),
        _document({**FIRST.jwk, "use": "enc"}), _document({**FIRST.jwk, "alg": "RS512"}),
        _document({**FIRST.jwk, "kid": ["first"]}), _document(SigningKey.make("ES256", "first").jwk),
        _document(SigningKey.make("EdDSA", "first").jwk), _document(FIRST.jwk) + b" " * 65_536,
    ],
    ids=range(20),
)  # fmt: skip
async def test_answers_that_hold_no_key_replace_none(server: JwksServer, keys: Jwks, body: bytes) -> None:
    good, server.body = server.body, body
    assert await keys.find("first") is None
    server.body = good
    with clock.shifted(60):
        assert await keys.find("first") is not None
    server.body = body
    with clock.shifted(60 + TTL_S + 1):
        assert await keys.find("first") is not None


async def test_a_key_that_cannot_be_read_leaves_the_others(server: JwksServer, keys: Jwks) -> None:
    server.body = _document({"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"}, "x", FIRST.jwk)
    assert await keys.find("first") is not None
    assert await keys.find("broken") is None


async def test_no_redirect_is_followed(server: JwksServer, keys: Jwks) -> None:
    async with jwks_server(FIRST) as other:
        server.status, server.headers = 302, {"Location": other.url}
        assert await keys.find("first") is None
        assert (server.asked, other.asked) == (1, 0)


async def test_a_slow_issuer_is_not_waited_for(server: JwksServer, keys: Jwks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jwks._TIMEOUT_S == 5
    monkeypatch.setattr(jwks, "_TIMEOUT_S", 0.05)
    server.held = asyncio.Event()
    assert await keys.find("first") is None
    server.held.set()
    server.held = None
    with clock.shifted(60):
        assert await keys.find("first") is not None


async def test_a_token_without_a_name_gets_the_only_key(server: JwksServer, keys: Jwks) -> None:
    assert await keys.find(None) is not None
    server.keys = [FIRST, SECOND]
    with clock.shifted(TTL_S + 1):
        assert await keys.find(None) is None
