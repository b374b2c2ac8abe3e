"""Forged, confused and malformed credentials against every kind of issuer: each is a 401 and never a 500."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI
from httpx_ws import WebSocketDisconnect
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parley.core import clock
from parley.core.db import DatabaseUrls
from parley.core.secrets import key_ring, load_secrets
from tests.conftest import TestDatabases, http_client
from tests.identity.issuers import (
    SECRET,
    JwksServer,
    Made,
    SigningKey,
    better_auth,
    clerk,
    jwks_server,
    shared_secret,
)
from tests.identity.test_issuers import bearer, me, service, socket

RSA, ED, EC = SigningKey.make("RS256"), SigningKey.make("EdDSA"), SigningKey.make("ES256")
STRANGER = {made.algorithm: SigningKey.make(made.algorithm) for made in (RSA, ED, EC)}
ISSUERS = ("own", "clerk", "better", "oidc", "shared", "plain")
ISS, AUD = "parley", "parley-api"


def segment(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def compact(header: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    """Put a token together by hand: libraries refuse to make some of these."""
    # Our own headers have one spelling: without spaces.
    parts = [
        part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
        for part in (header, claims)
    ]
    content = ".".join(segment(part) for part in parts)
    return f"{content}.{segment(sign(content.encode()))}"


def mac(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda content: hmac.new(secret, content, hashlib.sha256).digest()


def signer(key: SigningKey) -> Callable[[bytes], bytes]:
    algorithm = jwt.get_algorithm_by_name(key.algorithm)
    return lambda content: algorithm.sign(content, key.private)


@dataclass
class World:
    """An application that takes tokens of every kind of issuer, and a server that nobody may ask."""

    app: FastAPI
    made: dict[str, Made]
    canary: JwksServer
    own: tuple[str, dict[str, Any], dict[str, Any], bytes]
    session: dict[str, Any]

    def good(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the header and the claims of a token that is taken."""
        if name == "own":
            return dict(self.own[1]), dict(self.own[2])
        made = self.made[name]
        return {"alg": made.algorithm, "typ": "JWT", **({"kid": made.key.kid} if made.key else {})}, made.claims()

    def sign(self, name: str, header: dict[str, Any], claims: Any) -> str:
        """Sign as the issuer itself would, whatever the header says."""
        if name == "own":
            return compact(header, claims, mac(self.own[3]))
        key = self.made[name].key
        if key is None:
            return compact(header, claims, mac(SECRET.encode()))
        return compact(header, claims, signer(key))

    async def refused(self, token: str) -> httpx.Response:
        answer = await me(self.app, token)
        assert answer.status_code == 401, (answer.status_code, token[:200])
        assert answer.headers["www-authenticate"] == "Bearer"
        return answer


@pytest.fixture(scope="module")
async def world(databases: TestDatabases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    urls = await databases.create()
    ready: asyncio.Future[World] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()
    # A task of its own: a fixture's set-up and tear-down may run in different tasks, which task groups refuse.
    task = asyncio.create_task(_run(urls, tmp_path_factory.mktemp("attacks"), ready, done))
    waiting: set[asyncio.Future[Any]] = {task, ready}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    yield ready.result()
    done.set()
    await task
    await databases.drop(urls)


async def _run(urls: DatabaseUrls, folder: Path, ready: "asyncio.Future[World]", done: asyncio.Event) -> None:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(jwks_server(key)) for key in (RSA, ED, EC)]
        canary = await stack.enter_async_context(jwks_server(STRANGER["RS256"]))
        oidc: dict[str, Any] = {
            "name": "oidc",
            "issuer": "https://oidc.example.com",
            "algorithm": "ES256",
            "audience": "here",
        }
        oidc |= {"jwks_url": servers[2].url, "create_users": True, "workspace": "personal"}
        every = [
            clerk(servers[0].url, RSA), better_auth(servers[1].url, ED),
            Made("oidc", "https://oidc.example.com", "ES256", oidc, EC, {"aud": "here"}),
            shared_secret(issuer="https://shared.example.com"), shared_secret(issuer=None),
        ]  # fmt: skip
        app = await stack.enter_async_context(service(folder, urls, *every))
        body = {"email": "ada@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        async with http_client(app) as http:
            session = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]
        token = session["access_token"]
        ring = key_ring(load_secrets(app.state.settings), "access-token")
        claims = jwt.decode(token, options={"verify_signature": False})
        own = (token, jwt.get_unverified_header(token), claims, ring.active.value)
        ready.set_result(World(app, {made.name: made for made in every}, canary, own, session))
        await done.wait()


@pytest.mark.parametrize("name", ISSUERS)
async def test_what_the_attacks_start_from_is_taken(world: World, name: str) -> None:
    header, claims = world.good(name)
    answer = await me(world.app, world.sign(name, header, claims))
    assert answer.status_code == 200, answer.text


def _required(name: str) -> list[str]:
    claims = ["exp", "iat", "sub"]
    claims += ["iss", "aud", "wid", "sid"] if name == "own" else []
    # Without it one with the shared secret is a token of the entry for those that have none, which has the same here.
    claims += ["iss"] if name in {"clerk", "better", "oidc"} else []
    claims += ["aud"] if name in {"better", "oidc"} else []
    return claims + (["azp"] if name == "clerk" else [])


@pytest.mark.parametrize(("name", "claim"), [(name, claim) for name in ISSUERS for claim in _required(name)])
async def test_each_claim_is_required(world: World, name: str, claim: str) -> None:
    header, claims = world.good(name)
    del claims[claim]
    await world.refused(world.sign(name, header, claims))


_CLAIMS: dict[str, Callable[[float], dict[str, Any]]] = {
    "expired": lambda now: {"exp": now - 31},
    "made in the future": lambda now: {"iat": now + 60},
    "not yet": lambda now: {"nbf": now + 60},
    "expiry as text": lambda now: {"exp": str(now + 60)},
    "expiry is true": lambda _: {"exp": True},
    "expiry is null": lambda _: {"exp": None},
    "expiry without an end": lambda _: {"exp": float("inf")},
    "expiry is no number": lambda _: {"exp": float("nan")},
    "expiry of 400 digits": lambda _: {"exp": 10**400},
    "expiry in no year that there is": lambda _: {"exp": 10**15},
    "made without a beginning": lambda _: {"iat": float("-inf")},
    "subject is a number": lambda _: {"sub": 1},
    "subject is empty": lambda _: {"sub": ""},
    "subject is a list": lambda _: {"sub": ["user_1"]},
    "subject with NUL": lambda _: {"sub": "user\0"},
    "subject with half a character": lambda _: {"sub": "user\ud800"},
    "subject is long": lambda _: {"sub": "x" * 256},
    "another issuer": lambda _: {"iss": "https://evil.example.com"},
    "issuers": lambda _: {"iss": ["https://clerk.example.com"]},
    "issuer is a number": lambda _: {"iss": 1},
}


# Ours never have `nbf`, which is not read, and hold no longer than their session, whatever they say.
_NOT_OURS = {"not yet", "expiry in no year that there is"}


@pytest.mark.parametrize(
    ("name", "attack"),
    [(name, attack) for name in ISSUERS for attack in _CLAIMS if name != "own" or attack not in _NOT_OURS],
)
async def test_claims_that_do_not_hold(world: World, name: str, attack: str) -> None:
    header, claims = world.good(name)
    await world.refused(world.sign(name, header, {**claims, **_CLAIMS[attack](int(clock.timestamp()))}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("own", {"aud": "other"}), ("better", {"aud": "other"}), ("better", {"aud": []}), ("better", {"aud": 1}),
        ("better", {"aud": {"http://localhost:4000": 1}}), ("oidc", {"aud": ["there"]}), ("clerk", {"azp": "https://evil.example.com"}),
        ("clerk", {"azp": None}), ("clerk", {"azp": ["https://app.example.com"]}), ("clerk", {"sts": "pending"}),
        ("clerk", {"sts": None}), ("own", {"iss": "https://clerk.example.com"}), ("plain", {"iss": ISS, "aud": AUD}),
        ("shared", {"iss": "https://clerk.example.com"}), ("clerk", {"iss": "https://shared.example.com"}),
        ("clerk", {"iss": "https://clerk.example.com/"}), ("clerk", {"iss": None}),
    ],
    ids=range(17),
)  # fmt: skip
async def test_audience_party_and_issuer_are_exact(world: World, name: str, changes: dict[str, Any]) -> None:
    header, claims = world.good(name)
    await world.refused(world.sign(name, header, {**claims, **changes}))


@pytest.mark.parametrize("name", ISSUERS)
async def test_no_algorithm_but_the_one_of_the_issuer(world: World, name: str) -> None:
    header, claims = world.good(name)
    for algorithm in ("none", "None", "NONE", "nOnE", "", None, 1, ["HS256"], "HS512", "RS512", "PS256", "ES384", "x"):
        changed = {**header, "alg": algorithm}
        await world.refused(compact(changed, claims, lambda _: b""))
        await world.refused(world.sign(name, changed, claims))
    await world.refused(compact({k: v for k, v in header.items() if k != "alg"}, claims, lambda _: b""))
    # Another algorithm that we know, under the name of this issuer's key.
    for key in (RSA, ED, EC):
        if name == "own" or world.made[name].algorithm != key.algorithm:
            await world.refused(compact({**header, "alg": key.algorithm}, claims, signer(key)))
    # The right algorithm and another key.
    if name in {"clerk", "better", "oidc"}:
        await world.refused(compact(header, claims, signer(STRANGER[world.made[name].algorithm])))
    else:
        for secret in (b"", b"secret", b"\0" * 32, SECRET.encode()[:-1]):
            await world.refused(compact(header, claims, mac(secret)))


@pytest.mark.parametrize("name", ["clerk", "better", "oidc"])
async def test_a_public_key_is_no_shared_secret(world: World, name: str) -> None:
    header, claims = world.good(name)
    key = world.made[name].key
    assert key is not None
    texts = [key.pem, key.pem.strip(), key.der, base64.b64encode(key.der)]
    texts += [json.dumps(key.jwk).encode(), json.dumps(key.jwk, separators=(",", ":")).encode()]
    texts += [json.dumps({"keys": [key.jwk]}).encode(), b"", b"\0"]
    for text in texts:
        for algorithm in ("HS256", key.algorithm):
            await world.refused(compact({**header, "alg": algorithm}, claims, mac(text)))


@pytest.mark.parametrize("name", ISSUERS)
async def test_keys_come_from_configuration_only(world: World, name: str) -> None:
    header, claims = world.good(name)
    stranger = STRANGER["RS256"]
    url = world.canary.url
    chain = [base64.b64encode(stranger.der).decode()]
    for more in ({"jku": url}, {"x5u": url}, {"jwk": stranger.jwk}, {"x5c": chain}, {"jku": url, "kid": "other"}):
        for algorithm in {"RS256", header["alg"]}:
            changed = {**header, **more, "alg": algorithm}
            await world.refused(compact(changed, claims, signer(stranger)))
    await world.refused(compact({**header, "kid": url}, claims, signer(stranger)))
    assert world.canary.asked == 0


@pytest.mark.parametrize("name", ISSUERS)
async def test_headers_that_are_not_understood(world: World, name: str) -> None:
    header, claims = world.good(name)
    attacks: list[dict[str, Any]] = [
        {"crit": ["exp"]}, {"crit": []}, {"crit": None}, {"crit": "b64"}, {"crit": ["b64"], "b64": False},
        {"crit": ["x"], "x": 1}, {"b64": False},
    ]  # fmt: skip
    if name in {"own", "clerk", "better", "oidc"}:
        kids: list[Any] = ["unknown", "", 1, [], {}, None, "../../etc/passwd", "' OR 1=1 --", "x" * 1000]
        # A name that is none: where there is one key only, that one is meant.
        attacks += [{"kid": kid} for kid in kids if isinstance(kid, str) or name == "own"]
    for more in attacks:
        await world.refused(world.sign(name, {**header, **more}, claims))


@pytest.mark.parametrize("name", ISSUERS)
async def test_a_changed_token(world: World, name: str) -> None:
    header, claims = world.good(name)
    token = world.sign(name, header, claims)
    head, body, signature = token.split(".")
    other = segment(json.dumps({**claims, "sub": "somebody else"}).encode())
    flipped = ("A" if signature[0] != "A" else "B") + signature[1:]
    for attack in (
        f"{head}.{other}.{signature}", f"{head}.{body}.", f"{head}.{body}", f"{head}.{body}.{flipped}", f".{body}.{signature}",
        f"{head}..{signature}", f"{token}.x", f"{head}.{body}.{signature}.{body}.{signature}", "..", ".", f"{head}={body}",
    ):  # fmt: skip
        await world.refused(attack)
    for shape in (b"[]", b"1", b"null", b'"x"', b"{", b"\xff", b"[" * 3000, b"{}"):
        await world.refused(world.sign(name, header, shape))
        await world.refused(compact(shape, claims, mac(SECRET.encode())))


async def test_the_other_kinds_of_secrets_open_nothing(world: World) -> None:
    """Each secret that we hand out is good for its own thing only."""
    http = http_client(world.app, headers=bearer(world.session["access_token"]))
    async with http:
        ticket = (await http.post("/api/v1/realtime/tickets")).json()["data"]["ticket"]
        key = (await http.post("/api/v1/api-keys", json={"name": "k"})).json()["data"]["key"]
        access = world.session["access_token"]
        refresh = world.session["refresh_token"]
        reset = "parley_ot_" + "A" * 43
        invitation = "parley_in_" + "A" * 43
        for other in (ticket, refresh, reset, invitation, key[:-1], f"tk_{access}", f"parley_sk_{access}"):
            await world.refused(other)
        for other in (access, key, ticket, reset):
            answer = await http.post("/api/v1/auth/refresh", json={"refresh_token": other})
            assert answer.status_code == 401, other
    # Under a name of its own kind each is looked at as that, and refused on the socket as well.
    for auth in ({"token": refresh}, {"token": key}, {"ticket": access}, {"ticket": refresh}, {"api_key": access}):
        await _socket_refused(world, auth)


async def test_an_id_token_is_for_another_audience(world: World) -> None:
    header, claims = world.good("oidc")
    await world.refused(world.sign("oidc", header, {**claims, "aud": "a-client", "nonce": "n", "at_hash": "h"}))


@pytest.mark.parametrize("kind", ["JWT", "at+jwt", "jwt", None, 1])
async def test_our_own_are_of_one_type_and_others_may_vary(world: World, kind: Any) -> None:
    header, claims = world.good("own")
    if kind != "at+jwt":
        await world.refused(world.sign("own", {**header, "typ": kind}, claims))
    if kind in {"JWT", "at+jwt", None}:
        header, claims = world.good("clerk")
        token = world.sign("clerk", {**header, "typ": kind} if kind else {"alg": "RS256", "kid": RSA.kid}, claims)
        assert (await me(world.app, token)).status_code == 200


DEEP = segment(b'{"a":' * 200_000)


@pytest.mark.parametrize(
    "value",
    [
        b"", b"Bearer", b"Bearer ", b"Bearer  ", b"Basic YTpi", b"Bearer\t x", b"Bearer x y", b"bearer .",
        b"Bearer " + b"x" * 100_000, b"Bearer " + b"." * 100_000, b"Bearer \x00", b"Bearer a\x00.b.c", b"\x00",
        "Bearer ü.ü.ü".encode(), b"Bearer \xff\xfe.\xff.\xff", f"Bearer {DEEP}.{DEEP}.x".encode(),
        f"Bearer {segment(b'{}')}.{DEEP}.x".encode(), f"Bearer {segment(b'[' * 5000)}.{segment(b'{}')}.x".encode(),
        "Bearer parley_sk_ü".encode(), b"Bearer parley_sk_" + b"A" * 84, b"Bearer eyJhbGciOiJub25lIn0.e30.",
    ],
    ids=range(21),
)  # fmt: skip
async def test_malformed_headers(world: World, value: bytes) -> None:
    async with http_client(world.app) as http:
        answer = await http.get("/api/v1/me", headers=[(b"authorization", value)])
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


_token = st.one_of(
    st.binary(max_size=300),
    st.lists(st.binary(max_size=80).map(lambda raw: segment(raw).encode()), min_size=3, max_size=3).map(b".".join),
    st.tuples(
        st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "jku"]), st.sampled_from(["RS256", "HS256", "key-1", 1, None])),
        st.dictionaries(
            st.sampled_from(["iss", "sub", "exp", "iat", "aud"]),
            st.one_of(st.sampled_from(["https://clerk.example.com", "http://localhost:4000"]), st.integers(), st.floats(), st.none()),
        ),
    ).map(lambda parts: compact(*parts, lambda _: b"x").encode()),
)  # fmt: skip


@given(value=st.one_of(_token, _token.map(b"Bearer ".__add__)))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_header_is_a_401(world: World, value: bytes) -> None:
    async with http_client(world.app) as http:
        answer = await http.get("/api/v1/me", headers=[(b"authorization", value)])
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


async def _socket_refused(world: World, auth: dict[str, Any]) -> None:
    async with socket(world.app, auth) as peer:
        with pytest.raises(WebSocketDisconnect) as ended:
            while True:
                frame = await peer.receive_json(timeout=5)
                assert frame["t"] == "err", frame
        # 4401: not who they say they are; 4400: not a credential at all.
        assert ended.value.code in {4400, 4401}


@pytest.mark.parametrize("name", ISSUERS)
async def test_the_socket_refuses_the_same(world: World, name: str) -> None:
    header, claims = world.good(name)
    now = int(clock.timestamp())
    for token in (
        compact({**header, "alg": "none"}, claims, lambda _: b""), compact(header, claims, mac(RSA.pem)),
        world.sign(name, header, {**claims, "exp": now - 31}), world.sign(name, {**header, "crit": ["x"]}, claims),
        "x" * 5000, "ü.ü.ü", "a\0.b.c",
    ):  # fmt: skip
        await _socket_refused(world, {"token": token})
