"""Sessions over HTTP: listed, ended, moved to another workspace."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.revocations import Revocation
from parley.core.settings import Settings
from parley.identity.sessions import device_of
from parley.realtime.service import Realtime
from tests.conftest import Account, SignUp, http_client
from tests.identity.conftest import PASSWORD
from tests.live import greet, live

API = "/api/v1"
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"


async def sign_in(client: httpx.AsyncClient, email: str, user_agent: str = FIREFOX) -> dict[str, Any]:
    body = {"email": email, "password": PASSWORD}
    answer = await client.post(f"{API}/auth/signin", json=body, headers={"User-Agent": user_agent})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def me(client: httpx.AsyncClient, token: str) -> tuple[int, str | None]:
    answer = await client.get(f"{API}/me", headers={"Authorization": f"Bearer {token}"})
    return answer.status_code, answer.json().get("error")


async def listed(account: Account) -> list[dict[str, Any]]:
    answer = await account.http.get(f"{API}/auth/sessions")
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    assert answer.json()["meta"]["total"] == len(rows)
    return rows


@pytest.mark.parametrize(
    ("user_agent", "device"),
    [
        (FIREFOX, "Firefox on Linux"),
        ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36", "Chrome on Windows"),
        ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36 Edg/142.0.0.0", "Edge on Windows"),
        ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.0 Safari/605.1.15", "Safari on macOS"),
        ("Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.0 Mobile/15E148 Safari/604.1", "Safari on iPhone"),
        ("Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Mobile Safari/537.36", "Chrome on Android"),
        ("parley-cli/0.1.0 (linux)", "parley-cli"),
        ("curl/8.9", "curl"),
        ("x" * 400, "x" * 60),
        ("", "Unknown device"),
        (None, "Unknown device"),
    ],
)  # fmt: skip
def test_what_a_person_would_call_the_device(user_agent: str | None, device: str) -> None:
    assert device_of(user_agent) == device


async def test_a_user_sees_their_own_sessions(client: httpx.AsyncClient, alice: Account, bob: Account) -> None:
    with clock.shifted(-120):
        await sign_in(client, alice.email)
        await sign_in(client, alice.email, "curl/8.9")
    first, *others = await listed(alice)
    assert first["current"] is True
    assert [row["current"] for row in others] == [False, False]
    assert sorted(row["device"] for row in others) == ["Firefox on Linux", "curl"]
    for row in (first, *others):
        assert set(row) == {"id", "device", "user_agent", "address", "cookie", "created_at", "last_used_at", "expires_at", "current", "workspace"}  # fmt: skip
        assert row["workspace"]["id"] == str(alice.workspace_id)
        assert row["address"] == "127.0.0.1"
        assert row["cookie"] is False
    assert {row["id"] for row in await listed(bob)}.isdisjoint({first["id"], *(row["id"] for row in others)})
    page = (await alice.http.get(f"{API}/auth/sessions?per_page=1&page=2")).json()
    assert ([row["id"] for row in page["data"]], page["meta"]["total"]) == ([others[0]["id"]], 3)


async def test_a_session_that_has_expired_or_ended_is_not_listed(client: httpx.AsyncClient, alice: Account) -> None:
    with clock.shifted(-8 * 86400):
        await sign_in(client, alice.email, "the old one/1")
    ended = await sign_in(client, alice.email, "the ended one/1")
    await client.post(f"{API}/auth/signout", headers={"Authorization": f"Bearer {ended['access_token']}"})
    assert [row["current"] for row in await listed(alice)] == [True]


async def test_ending_one(client: httpx.AsyncClient, alice: Account, admin: asyncpg.Connection) -> None:
    other = await sign_in(client, alice.email)
    assert await me(client, other["access_token"]) == (200, None)
    (id_,) = [row["id"] for row in await listed(alice) if not row["current"]]
    assert (await alice.http.delete(f"{API}/auth/sessions/{id_}")).status_code == 204
    # At once, although it was in the memory of this process.
    assert await me(client, other["access_token"]) == (401, "session_revoked")
    answer = await client.post(f"{API}/auth/refresh", json={"refresh_token": other["refresh_token"]})
    assert (answer.status_code, answer.json()["error"]) == (401, "session_revoked")
    assert (await alice.http.get(f"{API}/me")).status_code == 200
    again = await alice.http.delete(f"{API}/auth/sessions/{id_}")
    assert (again.status_code, again.json()["error"]) == (404, "session_not_found")
    row = await admin.fetchrow("SELECT user_id, target, outcome FROM audit_events WHERE action = 'session.revoked'")
    assert row is not None
    assert tuple(row) == (alice.user_id, id_, "success")


async def test_another_users_session_is_as_good_as_none(
    alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    (theirs,) = await listed(bob)
    answers = [await alice.http.delete(f"{API}/auth/sessions/{id_}") for id_ in (theirs["id"], uuid4())]
    for answer in answers:
        assert answer.status_code == 404
    first, second = [{**answer.json(), "meta": None} for answer in answers]
    assert first == second
    assert (await bob.http.get(f"{API}/me")).status_code == 200
    assert await admin.fetchval("SELECT count(*) FROM sessions WHERE revoked_at IS NOT NULL") == 0
    assert (await alice.http.delete(f"{API}/auth/sessions/nonsense")).status_code == 422


@pytest.mark.parametrize("keep", [True, False])
async def test_ending_all(client: httpx.AsyncClient, alice: Account, bob: Account, keep: bool) -> None:
    others = [await sign_in(client, alice.email) for _ in range(3)]
    answer = await alice.http.delete(f"{API}/auth/sessions", params={"keep_current": keep})
    assert answer.status_code == 204
    for other in others:
        assert await me(client, other["access_token"]) == (401, "session_revoked")
    assert await me(client, alice.access_token) == ((200, None) if keep else (401, "session_revoked"))
    answer = await client.post(f"{API}/auth/refresh", json={"refresh_token": alice.refresh_token})
    assert answer.status_code == (200 if keep else 401)
    assert (await bob.http.get(f"{API}/me")).status_code == 200
    assert (await sign_in(client, alice.email))["access_token"]


async def test_the_last_use_is_known_to_the_minute_without_a_write_per_request(
    alice: Account, admin: asyncpg.Connection
) -> None:
    used = []
    for second in range(0, 181, 3):
        with clock.shifted(second):
            for _ in range(2):
                assert (await alice.http.get(f"{API}/me")).status_code == 200
            used.append(await admin.fetchval("SELECT last_used_at FROM sessions"))
            assert clock.now() - used[-1] < timedelta(seconds=61)
    # Of a hundred and twenty requests in three minutes.
    assert 3 <= len(set(used)) <= 7


async def join(admin: asyncpg.Connection, workspace_id: UUID, user_id: UUID, role: str = "member") -> None:
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, $3)", workspace_id, user_id, role
    )


async def test_a_switch(client: httpx.AsyncClient, alice: Account, bob: Account, admin: asyncpg.Connection) -> None:
    await join(admin, bob.workspace_id, alice.user_id, "viewer")
    elsewhere = await sign_in(client, alice.email)
    answer = await alice.http.post(f"{API}/auth/switch", json={"workspace_id": str(bob.workspace_id)})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert (data["workspace"]["id"], data["workspace"]["role"]) == (str(bob.workspace_id), "viewer")
    # The old token at once, the new one everywhere; the other session stays where it is.
    assert (await me(client, alice.access_token))[0] == 401
    assert await me(client, data["access_token"]) == (200, None)
    assert await me(client, elsewhere["access_token"]) == (200, None)
    refreshed = await client.post(f"{API}/auth/refresh", json={"refresh_token": data["refresh_token"]})
    assert refreshed.status_code == 200
    assert refreshed.json()["data"]["workspace"]["id"] == str(bob.workspace_id)
    row = await admin.fetchrow(
        "SELECT workspace_id, user_id, target FROM audit_events WHERE action = 'session.switched'"
    )
    assert row is not None
    assert tuple(row) == (bob.workspace_id, alice.user_id, str(bob.workspace_id))
    # Back again, and signing in goes where the user was last.
    bearer = {"Authorization": f"Bearer {refreshed.json()['data']['access_token']}"}
    back = await client.post(f"{API}/auth/switch", json={"workspace_id": str(alice.workspace_id)}, headers=bearer)
    assert back.status_code == 200
    assert (await sign_in(client, alice.email))["workspace"]["id"] == str(alice.workspace_id)


async def test_the_token_from_before_a_switch_is_worth_nothing_after_the_grace(
    client: httpx.AsyncClient, alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    await join(admin, bob.workspace_id, alice.user_id)
    body = {"workspace_id": str(bob.workspace_id)}
    data = (await alice.http.post(f"{API}/auth/switch", json=body)).json()["data"]
    agent = {"User-Agent": alice.http.headers["User-Agent"]}
    # Whoever lost the answer gets the same token once more.
    again = await client.post(f"{API}/auth/refresh", json={"refresh_token": alice.refresh_token}, headers=agent)
    assert again.json()["data"]["refresh_token"] == data["refresh_token"]
    with clock.shifted(31):
        answer = await client.post(f"{API}/auth/refresh", json={"refresh_token": alice.refresh_token}, headers=agent)
    assert (answer.status_code, answer.json()["error"]) == (401, "session_revoked")


async def test_a_workspace_that_one_is_not_in_is_as_good_as_none(
    alice: Account, bob: Account, admin: asyncpg.Connection
) -> None:
    before = await admin.fetch("SELECT * FROM sessions ORDER BY id")
    answers = [
        await alice.http.post(f"{API}/auth/switch", json={"workspace_id": str(id_)})
        for id_ in (bob.workspace_id, uuid4())
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert {**answers[0].json(), "meta": None} == {**answers[1].json(), "meta": None}
    assert await admin.fetch("SELECT * FROM sessions ORDER BY id") == before
    assert (await alice.http.get(f"{API}/me")).status_code == 200


async def test_switching_a_session_that_ends_meanwhile(alice: Account, bob: Account, admin: asyncpg.Connection) -> None:
    await join(admin, bob.workspace_id, alice.user_id)
    assert (await alice.http.get(f"{API}/me")).status_code == 200
    # Nobody announces this: the process still takes the token.
    await admin.execute("UPDATE sessions SET revoked_at = now()")
    answer = await alice.http.post(f"{API}/auth/switch", json={"workspace_id": str(bob.workspace_id)})
    assert (answer.status_code, answer.json()["error"]) == (401, "session_revoked")
    assert (
        await admin.fetchval("SELECT workspace_id FROM sessions WHERE user_id = $1", alice.user_id)
        == alice.workspace_id
    )


async def test_sockets_of_the_old_workspace_close_and_others_stay(
    settings: Settings, admin: asyncpg.Connection
) -> None:
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url) as http:
        people = []
        for name in ("ada", "bob"):
            body = {"email": f"{name}@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
            people.append((await http.post(f"{API}/auth/signup", json=body)).json()["data"])
        ada, bob = people
        await join(admin, UUID(bob["workspace"]["id"]), UUID(ada["user"]["id"]))
        other_device = await sign_in(http, "ada@example.com")
        sockets = [await greet(server, data["access_token"]) for data in (ada, other_device, bob)]
        bearer = {"Authorization": f"Bearer {ada['access_token']}"}
        body = {"workspace_id": bob["workspace"]["id"]}
        new = (await http.post(f"{API}/auth/switch", json=body, headers=bearer)).json()["data"]
        assert await sockets[0].closed() == 4403
        sockets[0] = await greet(server, new["access_token"])
        # The news comes round once more over PostgreSQL, and does not reach what belongs to the new workspace.
        heard = asyncio.Event()
        server.app.state.revocations.subscribe(lambda _: heard.set())
        await admin.execute(
            "SELECT pg_notify('parley_revoked', $1)",
            Revocation("switch", session_of(server.app, new["access_token"]), UUID(body["workspace_id"])).to_text(),
        )
        async with asyncio.timeout(5):
            await heard.wait()
        for socket in sockets:
            await socket.send(t="unheard.of", id=1)
            assert (await socket.receive())["t"] == "err"
            await socket.connection.close()


def session_of(app: FastAPI, token: str) -> UUID:
    service = app.state.identity
    found: UUID = service.sessions._tokens.verify(token).session_id
    return found


class _Holder:
    def __init__(self, scope: Any) -> None:
        self.scope = scope
        self.ended: list[tuple[int, str]] = []

    def end(self, code: int, reason: str) -> None:
        self.ended.append((code, reason))


async def test_one_that_cannot_be_looked_at_again_is_closed_and_the_others_are_looked_at(
    app: FastAPI, alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one whose revocation was missed; whoever comes back is verified anew."""
    realtime: Realtime = app.state.realtime
    scope = (await realtime.authenticator.authenticate(alice.access_token)).scope
    holders = [_Holder(scope) for _ in range(20)]
    original = realtime.authenticator.reauthenticate
    seen = []

    async def failing(given: Any) -> Any:
        seen.append(given)
        if len(seen) == 3:
            raise ConnectionResetError
        return await original(given)

    monkeypatch.setattr(realtime.authenticator, "reauthenticate", failing)
    await realtime._reauthenticate(holders)  # type: ignore[arg-type]  # a list is invariant
    assert [holder.ended for holder in holders if holder.ended] == [[(4000, "look again")]]
    assert len(seen) == 20


async def test_a_session_is_written_down_from_start_to_end(
    client: httpx.AsyncClient, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    ada = await sign_up("ada@example.com")
    wrong = {"email": ada.email, "password": "wrong horse 1"}
    await client.post(f"{API}/auth/signin", json=wrong)
    await client.post(f"{API}/auth/signin", json={**wrong, "email": "nobody@example.com"})
    await client.post(f"{API}/auth/signout", headers={"Authorization": f"Bearer {ada.access_token}"})
    rows = await admin.fetch("SELECT action, outcome, user_id, address FROM audit_events ORDER BY id")
    assert [tuple(row) for row in rows] == [
        ("account.created", "success", ada.user_id, "127.0.0.1"),
        ("session.started", "success", ada.user_id, "127.0.0.1"),
        ("session.refused", "failure", ada.user_id, "127.0.0.1"),
        ("session.refused", "failure", None, "127.0.0.1"),
        ("session.ended", "success", ada.user_id, "127.0.0.1"),
    ]
    text = str(await admin.fetch("SELECT e::text FROM audit_events e"))
    for secret in (PASSWORD, "wrong horse", ada.access_token, ada.refresh_token):
        assert secret not in text


async def test_only_a_user_with_a_session_comes_here(app: FastAPI) -> None:
    async with http_client(app) as stranger:
        for method, path in (("GET", "sessions"), ("DELETE", "sessions"), ("POST", "switch")):
            answer = await stranger.request(method, f"{API}/auth/{path}", json={"workspace_id": str(uuid4())})
            assert answer.status_code == 401
