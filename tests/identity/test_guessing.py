"""Guessing passwords: how often, from where, and that it never keeps the owner out."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.api_limits import network_of
from parley.core.db import Database, DatabaseUrls
from parley.core.origin import origin
from parley.core.rate_limits import RateLimits, TooMany
from parley.core.settings import LimitSettings
from parley.identity.guessing import IN_A_ROW, Guessing
from parley.identity.one_time_tokens import Purpose
from parley.identity.passwords import Passwords, Verdict
from tests.conftest import make_settings, running
from tests.identity.conftest import PASSWORD, statements
from tests.jobs.conftest import until

API = "/api/v1"
WRONG = "wrong horse 1"
ADA, NOBODY = "ada@example.com", "nobody@example.com"
HOME = "198.51.100.1"


def at(app: FastAPI, address: str) -> httpx.AsyncClient:
    """Return a client at an address."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=(address, 1234))
    return httpx.AsyncClient(transport=transport, base_url="http://parley.test")


@pytest.fixture
async def app(tmp_path: Path, urls: DatabaseUrls) -> AsyncIterator[FastAPI]:
    settings = make_settings(tmp_path, urls, rate_limits="on")
    started, done = asyncio.Event(), asyncio.Event()
    made: list[FastAPI] = []

    # A task of its own: set-up and tear-down of a fixture may run in different tasks.
    async def run() -> None:
        async with running(settings) as application:
            made.append(application)
            started.set()
            await done.wait()

    task = asyncio.create_task(run())
    waiter = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    body = {"email": ADA, "password": PASSWORD, "confirmPassword": PASSWORD}
    assert (await at(made[0], HOME).post(f"{API}/auth/signup", json=body)).status_code == 201
    yield made[0]
    done.set()
    await task


async def try_at(app: FastAPI, address: str, email: str = ADA, password: str = WRONG, **options: Any) -> httpx.Response:
    body = {"email": email, "password": password}
    return await at(app, address).post(f"{API}/auth/signin", json=body, **options)


async def codes(app: FastAPI, address: str, count: int, email: str = ADA, password: str = WRONG) -> list[int]:
    return [(await try_at(app, address, email, password)).status_code for _ in range(count)]


async def test_five_from_one_place_and_then_not_even_the_right_one(app: FastAPI) -> None:
    stranger = "203.0.113.5"
    for email in (ADA, NOBODY, "not an address"):
        assert await codes(app, stranger, 6, email) == [401] * 5 + [429], email
        # Two bad accounts of five and one more: still below the limit of the address.
        answer = await try_at(app, stranger, email, PASSWORD)
        assert answer.status_code == 429
        assert answer.json()["error"] == "rate_limited"
        assert 0 < int(answer.headers["Retry-After"]) <= 900
    # The owner at home does not notice.
    assert (await try_at(app, HOME, ADA, PASSWORD)).status_code == 200


async def test_the_right_password_begins_anew(app: FastAPI) -> None:
    for _ in range(3):
        assert await codes(app, HOME, 4) == [401] * 4
        assert (await try_at(app, HOME, ADA, PASSWORD)).status_code == 200


async def test_twenty_from_one_address_over_all_accounts(app: FastAPI) -> None:
    stranger = "203.0.113.6"
    tried = [(await try_at(app, stranger, f"user{number}@example.com")).status_code for number in range(22)]
    assert tried == [401] * 20 + [429] * 2
    assert (await try_at(app, stranger, ADA, PASSWORD)).status_code == 429
    assert (await try_at(app, "203.0.113.7", ADA, PASSWORD)).status_code == 200


async def test_a_network_of_ipv6_is_one_place(app: FastAPI) -> None:
    tried = [
        (await try_at(app, f"2001:db8:1:2::{number:x}", f"user{number}@example.com")).status_code
        for number in range(1, 23)
    ]
    assert tried == [401] * 20 + [429] * 2
    assert (await try_at(app, "2001:db8:1:2:ffff::1", ADA, PASSWORD)).status_code == 429
    assert (await try_at(app, "2001:db8:1:3::1", ADA, PASSWORD)).status_code == 200


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        (None, "-"),
        ("a socket", "a socket"),
    ],
)
def test_what_counts_as_one_place(address: str | None, place: str) -> None:
    assert network_of(address) == place


async def test_a_known_device_gets_in_while_strangers_at_its_address_fail(app: FastAPI) -> None:
    laptop = at(app, HOME)
    body = {"email": ADA, "password": PASSWORD}
    assert (await laptop.post(f"{API}/auth/signin", json=body)).status_code == 200
    device = laptop.cookies["parley_device"]
    assert await codes(app, HOME, 6) == [401] * 5 + [429]
    for number in range(20):
        await try_at(app, HOME, f"user{number}@example.com")
    assert (await try_at(app, HOME, ADA, PASSWORD)).status_code == 429
    known = {"Cookie": f"parley_device={device}"}
    assert (await try_at(app, HOME, ADA, PASSWORD, headers=known)).status_code == 200
    # It has a limit of its own, and opens nothing by itself.
    tried = [(await try_at(app, HOME, headers=known)).status_code for _ in range(6)]
    assert tried == [401] * 5 + [429]
    # Nobody else's account, and nothing that was tampered with.
    for proof in (device[:-4] + "AAAA", device[:-1], "x" * len(device), "é" * len(device)):
        answer = await try_at(app, HOME, ADA, PASSWORD, headers={b"Cookie": b"parley_device=" + proof.encode()})
        assert answer.status_code == 429
    assert (await try_at(app, HOME, NOBODY, PASSWORD, headers=known)).status_code == 429


async def test_a_device_is_forgotten_with_the_password_and_after_a_year(
    app: FastAPI, admin: asyncpg.Connection
) -> None:
    service = app.state.identity
    user_id = await admin.fetchval("SELECT id FROM users")
    since = clock.now()
    proof = service.devices.make(user_id)
    assert service.devices.is_known(proof, user_id, password_since=since)
    with clock.shifted(366 * 86400):
        assert not service.devices.is_known(proof, user_id, password_since=since)
    with clock.shifted(5):
        assert not service.devices.is_known(proof, user_id, password_since=clock.now())


async def test_fifty_at_once_pass_no_limit(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    original = Passwords.verify

    async def verify(self: Passwords, password: str, hash: str | None) -> Verdict:
        hashed.append(hash)
        return await original(self, password, hash)

    monkeypatch.setattr(Passwords, "verify", verify)
    answers = await asyncio.gather(*(try_at(app, "203.0.113.8") for _ in range(50)))
    assert sorted(answer.status_code for answer in answers) == [401] * 5 + [429] * 45
    assert len(hashed) == 5
    hashed.clear()
    # And over many accounts the limit of the address.
    many = [f"user{number}@example.com" for number in range(50)]
    answers = await asyncio.gather(*(try_at(app, "203.0.113.9", email) for email in many))
    assert len(hashed) <= 20
    assert [answer.status_code for answer in answers].count(429) == 50 - len(hashed)


class _Slow(RateLimits):
    """Limits that answer over a network: others come in between."""

    async def hit(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        return await super().hit(*args, **options)

    async def peek(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        found = await super().peek(*args, **options)
        await asyncio.sleep(0)
        return found


async def test_nor_where_limits_are_counted_elsewhere() -> None:
    guessing = Guessing(_Slow(), LimitSettings())
    under_way = 0

    async def guess(number: int) -> bool:
        nonlocal under_way
        try:
            async with guessing.attempt(f"user{number}", known_device=False, failures=None, known_place=False):
                under_way += 1
                await asyncio.sleep(0.01)
        except TooMany:
            return False
        return True

    with origin("203.0.113.10", None):
        passed = await asyncio.gather(*(guess(number) for number in range(60)))
    assert sum(passed) == under_way <= 20
    assert not guessing._under_way


async def test_after_an_error_of_ours_the_address_has_not_guessed() -> None:
    limits = RateLimits()
    guessing = Guessing(limits, LimitSettings())
    with origin("203.0.113.11", None):
        for number in range(30):
            with pytest.raises(ZeroDivisionError):
                async with guessing.attempt(f"user{number}", known_device=False, failures=None, known_place=False):
                    raise ZeroDivisionError
    assert not guessing._under_way


async def test_a_hundred_in_a_row_close_the_account_but_for_known_places(
    app: FastAPI, admin: asyncpg.Connection
) -> None:
    phone = at(app, "198.51.100.77")
    answer = await phone.post(f"{API}/auth/signin", json={"email": ADA, "password": PASSWORD})
    device = {"Cookie": f"parley_device={phone.cookies['parley_device']}"}
    bearer = {"Authorization": f"Bearer {answer.json()['data']['access_token']}"}
    for email in (ADA, NOBODY):
        for number in range(20):
            address = f"203.0.{113 if email == ADA else 114}.{number}"
            assert await codes(app, address, 5, email) == [401] * 5
    assert await admin.fetchval("SELECT failures FROM credentials") == IN_A_ROW
    # Alike for an account that does not exist, also with the right password.
    answers = [await try_at(app, "192.0.2.1", email, PASSWORD) for email in (ADA, NOBODY)]
    assert [answer.status_code for answer in answers] == [429, 429]
    assert_alike(*answers)
    # Whoever was signed in stays so, and the places where the owner has been are open.
    assert (await at(app, HOME).get(f"{API}/me", headers=bearer)).status_code == 200
    assert (await try_at(app, "192.0.2.2", ADA, PASSWORD, headers=device)).status_code == 200
    assert await admin.fetchval("SELECT failures FROM credentials") == 0
    for by in ("place", "reset"):
        await admin.execute("UPDATE credentials SET failures = 100")
        assert (await try_at(app, "192.0.2.3", ADA, PASSWORD)).status_code == 429
        if by == "place":
            assert (await try_at(app, HOME, ADA, PASSWORD)).status_code == 200
    service = app.state.passwords
    async with app.state.database.system_unit_of_work() as unit:
        user_id = await admin.fetchval("SELECT id FROM users")
        token = await service._tokens.mint(unit, user_id, Purpose.RESET_PASSWORD, life=timedelta(minutes=30), email=ADA)
    await service.reset(token, "another horse 2")
    assert (await try_at(app, "192.0.2.3", ADA, "another horse 2")).status_code == 200


def assert_alike(first: httpx.Response, second: httpx.Response) -> None:
    assert first.status_code == second.status_code
    assert {**first.json(), "meta": None} == {**second.json(), "meta": None}
    varying = {"x-request-id", "date"}
    one, two = [{k: v for k, v in answer.headers.items() if k not in varying} for answer in (first, second)]
    for name in ("retry-after", "ratelimit"):
        # Seconds that pass between the two.
        assert (name in one) == (name in two)
        one.pop(name, None), two.pop(name, None)
    assert one == two


async def test_known_and_unknown_accounts_answer_alike(
    app: FastAPI, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def quiet() -> bool:
        return bool(await admin.fetchval("SELECT bool_and(status = 'completed') FROM jobs WHERE kind = 'mail'"))

    # Jobs look people up too.
    await until(quiet)
    database: Database = app.state.database
    hashes: list[str | None] = []
    original = Passwords.verify

    async def verify(self: Passwords, password: str, hash: str | None) -> Verdict:
        hashes.append(hash)
        return await original(self, password, hash)

    monkeypatch.setattr(Passwords, "verify", verify)
    for number in range(6):
        sent = []
        answers = []
        for email in (ADA, NOBODY):
            hashes.clear()
            with statements(database) as seen:
                answers.append(await try_at(app, f"203.0.113.{100 + number // 3}", email))
            sent.append(([" ".join(statement.split()[:3]) for statement in seen], len(hashes)))
        assert_alike(*answers)
        assert sent[0] == sent[1]
        assert sent[0][1] == 1


async def test_known_and_unknown_accounts_take_as_long(app: FastAPI) -> None:
    times: dict[str, list[float]] = {ADA: [], NOBODY: []}
    for number in range(40):
        for email in (ADA, NOBODY) if number % 2 else (NOBODY, ADA):
            began = time.perf_counter()
            answer = await try_at(app, f"203.0.113.{number}", email)
            times[email].append(time.perf_counter() - began)
            assert answer.status_code == 401
    known, unknown = statistics.median(times[ADA]), statistics.median(times[NOBODY])
    # Without a hash for unknown accounts it would be less than half.
    assert 0.7 < unknown / known < 1.4


async def test_sign_ins_of_one_account_at_once_all_get_in(app: FastAPI, admin: asyncpg.Connection) -> None:
    """Those that follow a failure write to one row; none waits for another that waits for it."""
    for turn in range(10):
        await admin.execute("UPDATE credentials SET failures = 3")
        answers = await asyncio.gather(*(try_at(app, f"203.0.{turn}.{n}", ADA, PASSWORD) for n in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
    assert await admin.fetchval("SELECT failures FROM credentials") == 0
