"""Refresh tokens against the database: one successor, whatever the clients and the network do."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from parley.core import clock
from parley.core.db import Database
from parley.core.origin import origin
from parley.core.secrets import key_ring
from parley.core.settings import Settings
from parley.identity.errors import RefreshInvalid, SessionExpired, SessionRevoked, SessionUnknown, TokenInvalid
from parley.identity.refresh import RefreshTokens
from parley.identity.schemas import TokenAnswer
from parley.identity.service import IdentityService
from parley.identity.session_repository import Rotation, UnscopedSessionRepository
from parley.identity.setup import Identity, build_identity
from tests.identity.conftest import PASSWORD, SECRET, sign_up, statements
from tests.jobs.conftest import until
from tests.live import LiveServer, live

DAY_S = 86_400
REFRESH_TOKENS = RefreshTokens(key_ring((SECRET,), "refresh-token"))


async def refresh_from(service: IdentityService, token: str, user_agent: str | None) -> TokenAnswer:
    with origin("203.0.113.7", user_agent):
        return await service.sessions.refresh(token)


def session_of(token: str) -> UUID:
    return REFRESH_TOKENS.parse(token).session_id


async def row_of(admin: asyncpg.Connection, token: str) -> Any:
    return await admin.fetchrow("SELECT * FROM sessions WHERE id = $1", session_of(token))


async def test_a_refresh_gives_a_new_pair_for_the_same_session(
    service: IdentityService, identity: Identity, ada: TokenAnswer
) -> None:
    answer = await service.sessions.refresh(ada.refresh_token)
    assert answer.refresh_token != ada.refresh_token
    assert answer.access_token != ada.access_token
    assert (answer.user, answer.workspace) == (ada.user, ada.workspace)
    assert session_of(answer.refresh_token) == session_of(ada.refresh_token)
    await identity.authenticator.authenticate(answer.access_token)


async def families_of(service: IdentityService, ada: TokenAnswer, count: int) -> list[str]:
    """Return the refresh tokens of so many sessions."""
    signed_in = [await service.sign_in(email=str(ada.user.email), password=PASSWORD) for _ in range(count - 1)]
    return [ada.refresh_token, *(answer.refresh_token for answer in signed_in)]


async def test_of_forty_at_once_each_of_fifty_families_gets_one_successor(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    families = await families_of(service, ada, 50)
    answers: list[TokenAnswer] = []
    # A few families at a time: callers who would wait long for the database are told to come back.
    for start in range(0, 50, 5):
        some = families[start : start + 5]
        answers += await asyncio.gather(*(service.sessions.refresh(token) for _ in range(40) for token in some))
    successors: dict[UUID, set[str]] = {session_of(token): set() for token in families}
    for answer in answers:
        successors[session_of(answer.refresh_token)].add(answer.refresh_token)
    assert [len(found) for found in successors.values()] == [1] * 50
    assert not {token for found in successors.values() for token in found} & set(families)
    rows = await admin.fetch("SELECT counter, revoked_at FROM sessions")
    assert [(row["counter"], row["revoked_at"]) for row in rows] == [(1, None)] * 50


async def test_a_swap_that_compares_nothing_would_be_seen(
    service: IdentityService, ada: TokenAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def advance(self: UnscopedSessionRepository, session_id: UUID, *_: object, **__: object) -> Any:
        connection = await self._unit.driver()
        sql = "UPDATE sessions SET counter = counter + 1 WHERE id = $1 RETURNING counter"
        return Rotation.ROTATED, await connection.fetchval(sql, session_id)

    monkeypatch.setattr(UnscopedSessionRepository, "rotate", advance)
    answers = await asyncio.gather(*(service.sessions.refresh(ada.refresh_token) for _ in range(10)))
    assert len({answer.refresh_token for answer in answers}) == 10


async def test_a_client_that_lost_the_answer_gets_it_again(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    lost = await service.sessions.refresh(ada.refresh_token)
    with clock.shifted(29):
        again = await service.sessions.refresh(ada.refresh_token)
    assert again.refresh_token == lost.refresh_token
    assert (await row_of(admin, lost.refresh_token))["counter"] == 1
    assert (await service.sessions.refresh(again.refresh_token)).refresh_token != again.refresh_token


async def test_reuse_after_the_grace_ends_the_session_for_the_newest_too(
    service: IdentityService, identity: Identity, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    newest = await service.sessions.refresh(ada.refresh_token)
    await identity.authenticator.authenticate(newest.access_token)
    with clock.shifted(31):
        with pytest.raises(SessionRevoked):
            await service.sessions.refresh(ada.refresh_token)
        row = await row_of(admin, newest.refresh_token)
        assert row["revoked_at"] is not None
        assert row["revoke_reason"] == "reuse"
        with pytest.raises(SessionRevoked):
            await service.sessions.refresh(newest.refresh_token)
    # At once, although the session was in the cache.
    with pytest.raises(SessionRevoked):
        await identity.authenticator.authenticate(newest.access_token)


async def test_the_grace_ends_to_the_second(service: IdentityService, ada: TokenAnswer) -> None:
    await service.sessions.refresh(ada.refresh_token)
    with clock.shifted(30), pytest.raises(SessionRevoked):
        await service.sessions.refresh(ada.refresh_token)


async def test_two_back_is_reuse_even_within_the_grace(service: IdentityService, ada: TokenAnswer) -> None:
    first = await service.sessions.refresh(ada.refresh_token)
    second = await service.sessions.refresh(first.refresh_token)
    with pytest.raises(SessionRevoked):
        await service.sessions.refresh(ada.refresh_token)
    with pytest.raises(SessionRevoked):
        await service.sessions.refresh(second.refresh_token)


async def test_another_client_gets_no_grace(service: IdentityService, ada: TokenAnswer) -> None:
    mine = await refresh_from(service, ada.refresh_token, "Firefox")
    again = await refresh_from(service, ada.refresh_token, "Firefox")
    assert again.refresh_token == mine.refresh_token
    with pytest.raises(SessionRevoked):
        await refresh_from(service, ada.refresh_token, "curl")
    with pytest.raises(SessionRevoked):
        await refresh_from(service, mine.refresh_token, "Firefox")


async def test_a_client_may_change_its_name_between_refreshes(service: IdentityService, ada: TokenAnswer) -> None:
    first = await refresh_from(service, ada.refresh_token, "Firefox 1\x00" + "x" * 500)
    second = await refresh_from(service, first.refresh_token, "Firefox 2")
    assert (await refresh_from(service, second.refresh_token, None)).refresh_token


async def test_reuse_that_races_a_rotation_always_ends_the_session(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    async def settle(token: str) -> object:
        try:
            return await service.sessions.refresh(token)
        except SessionRevoked as error:
            return error

    for turn in range(100):
        old = (await service.sign_in(email=str(ada.user.email), password=PASSWORD)).refresh_token
        newest = (await service.sessions.refresh(old)).refresh_token
        with clock.shifted(31):
            pair = [old, newest] if turn % 2 else [newest, old]
            outcomes = await asyncio.gather(*(settle(token) for token in pair))
            assert isinstance(outcomes[pair.index(old)], SessionRevoked)
            assert (await row_of(admin, old))["revoke_reason"] == "reuse"
            for token in (newest, *(o.refresh_token for o in outcomes if isinstance(o, TokenAnswer))):
                with pytest.raises(SessionRevoked):
                    await service.sessions.refresh(token)


async def test_the_idle_limit(service: IdentityService, ada: TokenAnswer) -> None:
    with clock.shifted(7 * DAY_S - 5):
        newer = await service.sessions.refresh(ada.refresh_token)
    with clock.shifted(14 * DAY_S), pytest.raises(SessionExpired):
        await service.sessions.refresh(newer.refresh_token)


async def test_rotation_never_extends_the_absolute_limit(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    created = (await row_of(admin, ada.refresh_token))["absolute_expires_at"]
    token = ada.refresh_token
    for day in (6, 12, 18, 24, 29):
        with clock.shifted(day * DAY_S):
            token = (await service.sessions.refresh(token)).refresh_token
    row = await row_of(admin, token)
    assert row["absolute_expires_at"] == created
    assert row["idle_expires_at"] == created
    with clock.shifted(30 * DAY_S), pytest.raises(SessionExpired):
        await service.sessions.refresh(token)


async def test_a_token_ahead_of_a_restored_database_revokes_nothing(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    newer = await service.sessions.refresh(ada.refresh_token)
    await admin.execute("UPDATE sessions SET counter = 0")
    with pytest.raises(SessionUnknown) as caught:
        await service.sessions.refresh(newer.refresh_token)
    assert caught.value.code == "session_unknown"
    assert (await row_of(admin, newer.refresh_token))["revoked_at"] is None
    assert (await service.sessions.refresh(ada.refresh_token)).refresh_token == newer.refresh_token


async def test_a_forged_token_changes_nothing(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    other = RefreshTokens(key_ring(("another secret",), "refresh-token"))
    row = await row_of(admin, ada.refresh_token)
    for counter in (0, 1, 5):
        # Whoever has a copy of the database has the salt; without the key it is worth nothing.
        for forged in (
            other.make(row["id"], counter, salt=row["salt"]),
            REFRESH_TOKENS.make(row["id"], counter, salt=b""),
        ):
            with pytest.raises(RefreshInvalid):
                await service.sessions.refresh(forged)
    assert await row_of(admin, ada.refresh_token) == row


async def test_an_unknown_session_and_garbage_are_invalid(service: IdentityService) -> None:
    unknown = REFRESH_TOKENS.make(UUID(int=7), 0, salt=b"s" * 16)
    for token in (unknown, "", "parley_rt_", "x" * 86, "parley_rt_" + "A" * 76, "parley_rt_" + "é" * 76):
        with pytest.raises(RefreshInvalid):
            await service.sessions.refresh(token)


async def test_nothing_of_a_token_is_stored(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    newest = await service.sessions.refresh(ada.refresh_token)
    dump = ""
    for (table,) in await admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        dump += str(await admin.fetch(f"SELECT t::text FROM {table} t"))
    for token in (ada.refresh_token, newest.refresh_token):
        presented = REFRESH_TOKENS.parse(token)
        assert token not in dump
        assert presented.mac.hex() not in dump
    assert ada.access_token not in dump
    assert PASSWORD not in dump
    assert str(ada.user.id) in dump


async def test_membership_gone_ends_the_refresh(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await admin.execute("DELETE FROM memberships")
    with pytest.raises(SessionRevoked):
        await service.sessions.refresh(ada.refresh_token)


async def test_secrets_rotate_without_signing_anyone_out(
    database: Database, settings: Settings, service: IdentityService, ada: TokenAnswer
) -> None:
    both = build_identity(database, settings, ("the next key of these tests", SECRET))
    await both.authenticator.authenticate(ada.access_token)
    newer = await both.service.sessions.refresh(ada.refresh_token)
    assert REFRESH_TOKENS.parse(newer.refresh_token).kid != REFRESH_TOKENS.parse(ada.refresh_token).kid
    await both.close()
    alone = build_identity(database, settings, ("the next key of these tests",))
    await alone.authenticator.authenticate(newer.access_token)
    assert (await alone.service.sessions.refresh(newer.refresh_token)).refresh_token
    with pytest.raises(TokenInvalid):
        await alone.authenticator.authenticate(ada.access_token)
    with pytest.raises(RefreshInvalid):
        await alone.service.sessions.refresh(ada.refresh_token)
    await alone.close()


async def test_a_refresh_is_two_statements(database: Database, service: IdentityService, ada: TokenAnswer) -> None:
    with statements(database) as sent:
        await service.sessions.refresh(ada.refresh_token)
    assert len(sent) == 2, sent


async def test_the_owner_is_told_of_a_reuse_once(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    query = "SELECT count(*) FROM jobs WHERE payload->>'template' = 'session_reused' AND payload->>'user_id' = $1"
    newest = await service.sessions.refresh(ada.refresh_token)
    assert await admin.fetchval(query, str(ada.user.id)) == 0
    with clock.shifted(31):
        for token in (ada.refresh_token, ada.refresh_token, newest.refresh_token):
            with pytest.raises(SessionRevoked):
                await service.sessions.refresh(token)
    assert await admin.fetchval(query, str(ada.user.id)) == 1
    events = await admin.fetch("SELECT outcome, user_id, target FROM audit_events WHERE action = 'session.reused'")
    assert [tuple(event) for event in events] == [("failure", ada.user.id, str(session_of(ada.refresh_token)))]


async def refresh_over_http(port: int, token: str) -> tuple[int, dict[str, Any]]:
    async with httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{port}/api/v1/auth/refresh"
        answer = await http.post(url, json={"refresh_token": token}, headers={"User-Agent": "a client"}, timeout=30)
        return answer.status_code, answer.json()


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[LiveServer]:
    started, done = asyncio.Event(), asyncio.Event()
    made: list[LiveServer] = []

    # A task of its own: set-up and tear-down of a fixture may run in different tasks.
    async def run() -> None:
        async with live(settings) as running:
            made.append(running)
            started.set()
            await done.wait()

    task = asyncio.create_task(run())
    waiter = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    yield made[0]
    done.set()
    await task


async def test_over_http_forty_at_once_get_one_successor(server: LiveServer, admin: asyncpg.Connection) -> None:
    service: IdentityService = server.app.state.identity
    ada = await sign_up(service)
    families = await families_of(service, ada, 5)
    answers = await asyncio.gather(*(refresh_over_http(server.port, token) for _ in range(40) for token in families))
    assert {status for status, _ in answers} == {200}
    assert len({body["data"]["refresh_token"] for _, body in answers}) == 5
    assert [row[0] for row in await admin.fetch("SELECT counter FROM sessions")] == [1] * 5


async def test_over_http_a_client_whose_connection_broke_gets_the_same_successor(
    server: LiveServer, admin: asyncpg.Connection
) -> None:
    ada = await sign_up(server.app.state.identity)
    body = json.dumps({"refresh_token": ada.refresh_token})
    head = (
        "POST /api/v1/auth/refresh HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a client\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write((head + body).encode())
    await writer.drain()

    async def advanced() -> bool:
        return bool(await admin.fetchval("SELECT counter = 1 FROM sessions"))

    # The request was served, and nobody is there to read the answer.
    await until(advanced)
    writer.transport.abort()
    first, second = [await refresh_over_http(server.port, ada.refresh_token) for _ in range(2)]
    assert (first[0], second[0]) == (200, 200)
    assert first[1]["data"]["refresh_token"] == second[1]["data"]["refresh_token"]
    assert await admin.fetchval("SELECT counter FROM sessions") == 1
    status, third = await refresh_over_http(server.port, first[1]["data"]["refresh_token"])
    assert (status, await admin.fetchval("SELECT counter FROM sessions")) == (200, 2)
    assert third["data"]["refresh_token"] != first[1]["data"]["refresh_token"]
