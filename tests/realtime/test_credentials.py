"""Credentials in `hello` and on a live socket."""

import asyncio
from typing import Any

import asyncpg
import httpx
import pytest

from parley.core import clock
from parley.core.revocations import Revocation
from tests.conftest import Account, TestDatabases
from tests.realtime.conftest import LiveServer, Peer, Serve, conversation_of
from tests.realtime.steps import hello_code, ticket_of


async def test_a_ticket_is_good_once(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    assert await hello_code(live_server, {"ticket": ticket}) == 0
    assert await hello_code(live_server, {"ticket": ticket}) == 4401


async def test_of_50_at_once_one_gets_in(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    codes = await asyncio.gather(*(hello_code(live_server, {"ticket": ticket}) for _ in range(50)))
    assert sorted(codes) == [0] + [4401] * 49


async def test_a_ticket_of_30_seconds_ago_is_4401(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    with clock.shifted(30.1):
        assert await hello_code(live_server, {"ticket": ticket}) == 4401
    assert await hello_code(live_server, {"ticket": ticket}) == 4401


async def test_a_ticket_dies_with_its_session(live_server: LiveServer, eve: Account) -> None:
    ticket = await ticket_of(eve)
    assert (await eve.http.post("/api/v1/auth/signout")).status_code == 204
    assert await hello_code(live_server, {"ticket": ticket}) == 4401


async def test_a_ticket_is_for_its_own_user(live_server: LiveServer, ada: Account, bob: Account) -> None:
    async with live_server.open() as peer:
        await peer.send("hello", v=1, auth={"ticket": await ticket_of(bob)})
        welcome = await peer.read()
        assert (welcome["user"], welcome["workspace"]) == (str(bob.user_id), str(bob.workspace_id))
    # The workspace in a ticket is only where the look-up starts.
    secret = await ticket_of(bob)
    import base64

    raw = base64.urlsafe_b64decode(secret.removeprefix("tk_"))
    moved = "tk_" + base64.urlsafe_b64encode(ada.workspace_id.bytes + raw[16:]).decode()
    assert await hello_code(live_server, {"ticket": moved}) == 4401


async def test_bad_credentials_are_4401(live_server: LiveServer, ada: Account) -> None:
    head, claims, signature = ada.access_token.split(".")
    bad: list[dict[str, Any]] = [
        {}, {"token": ""}, {"token": "x"}, {"token": "a.b.c"}, {"token": f"{head}.{claims}.{signature[::-1]}"},
        {"token": "eyJhbGciOiJub25lIn0.e30."}, {"token": "é"}, {"token": "\x00"}, {"token": ada.refresh_token},
        {"ticket": "x"}, {"ticket": "tk_"}, {"ticket": "tk_" + "A" * 64}, {"ticket": "tk_é"}, {"ticket": "tk_\x00"},
        {"ticket": ada.access_token}, {"api_key": "x"}, {"api_key": "parley_sk_" + "a" * 40}, {"password": "x"},
        {"token": ada.access_token, "ticket": "tk_x"}, {"token": ada.access_token, "api_key": "x"},
        {"token": None, "ticket": None},
    ]  # fmt: skip
    for auth in bad:
        assert await hello_code(live_server, auth) == 4401, auth


async def test_an_expired_token_is_4401(live_server: LiveServer, ada: Account) -> None:
    with clock.shifted(15 * 60 + 1):
        assert await hello_code(live_server, {"token": ada.access_token}) == 4401


async def test_two_credentials_do_not_spend_the_ticket(live_server: LiveServer, ada: Account) -> None:
    ticket = await ticket_of(ada)
    assert await hello_code(live_server, {"ticket": ticket, "token": ada.access_token}) == 4401
    assert await hello_code(live_server, {"ticket": ticket}) == 0


async def test_a_credential_that_runs_out_is_told_and_then_4004(serve_with: Serve) -> None:
    # The connection looks at its clocks as often as the shortest of them needs.
    quick = {"ack_timeout_s": 0.4}
    async with serve_with(realtime=quick) as server, server.sign_up() as account, server.join(account) as peer:
        expires_at = peer.seen[0]["expires_at"]
        with clock.shifted(15 * 60 - 30):
            expiring = await peer.until("auth.expiring")
            assert expiring["at"] == expires_at
        with clock.shifted(15 * 60 + 1):
            assert await peer.code() == 4004


async def test_renewal_in_place(live_server: LiveServer, eve: Account, bob: Account) -> None:
    async with live_server.join(eve) as peer:
        with clock.shifted(10 * 60):
            answer = await eve.http.post("/api/v1/auth/refresh", json={"refresh_token": eve.refresh_token})
            renewed = answer.json()["data"]["access_token"]
            ok = await peer.ask("auth", auth={"token": renewed})
            assert ok["t"] == "ok"
            assert ok["expires_at"] > peer.seen[0]["expires_at"] + 9 * 60
        with clock.shifted(20 * 60):
            # The old credential has run out, the new one has not.
            await peer.alive()
        assert (await peer.ask("auth", auth={"ticket": await ticket_of(eve)}))["t"] == "ok"
        await peer.send("auth", id=1, auth={"token": bob.access_token})
        assert await peer.code() == 4403


@pytest.mark.parametrize("auth", [{"token": "x"}, {}, {"ticket": "tk_" + "A" * 64}, {"token": "x", "ticket": "y"}])
async def test_a_renewal_that_does_not_hold_is_4401(
    live_server: LiveServer, ada: Account, auth: dict[str, str]
) -> None:
    async with live_server.join(ada) as peer:
        answer = await peer.ask("auth", auth=auth)
        assert (answer["t"], answer["code"]) == ("err", "unauthenticated")
        assert await peer.code() == 4401


async def test_a_revoked_session_loses_its_socket(live_server: LiveServer, eve: Account) -> None:
    """W-10: what signs out must not go on reading and writing until its token would have run out."""
    channel = await conversation_of(eve)
    async with live_server.join(eve) as peer, live_server.join(eve) as idle:
        assert (await peer.sub(channel))["t"] == "subbed"
        assert (await eve.http.post("/api/v1/auth/signout")).status_code == 204
        assert await idle.code(within_s=8) in {4401, 4403}
        assert await peer.code(within_s=8) in {4401, 4403}


async def test_it_is_told_a_minute_before_and_not_sooner(serve_with: Serve) -> None:
    async with serve_with(realtime={"ack_timeout_s": 0.4}) as server, server.sign_up() as account:
        async with server.join(account) as peer:
            (connection,) = server.realtime.connections
            with clock.shifted(15 * 60 - 90):
                # A look at the clocks that comes too early to tell.
                connection._tick()
                await peer.alive()
                assert not [frame for frame in peer.seen if frame["t"] == "auth.expiring"]
            with clock.shifted(15 * 60 - 59):
                expiring = await peer.until("auth.expiring")
                assert 0 < expiring["at"] - clock.timestamp() <= 60
            # Once.
            with clock.shifted(15 * 60 - 50):
                connection._tick()
                await peer.alive()
            assert len([frame for frame in peer.seen if frame["t"] == "auth.expiring"]) == 1


async def test_the_clock_is_looked_at_when_the_minute_begins(live_server: LiveServer, eve: Account) -> None:
    """With usual settings too, where the next look could be seconds away."""
    with clock.shifted(15 * 60 - 60.4):
        async with live_server.open() as peer:
            await peer.send("hello", v=1, auth={"token": eve.access_token})
            await peer.until("auth.expiring", within_s=3)


async def test_who_renews_in_time_is_told_anew_and_stays(serve_with: Serve) -> None:
    async with serve_with(realtime={"ack_timeout_s": 0.4}) as server, server.sign_up() as account:
        async with server.join(account) as peer:
            await peer.sub("tasks")
            with clock.shifted(15 * 60 - 30):
                await peer.until("auth.expiring")
                answer = await account.http.post("/api/v1/auth/refresh", json={"refresh_token": account.refresh_token})
                renewed = answer.json()["data"]["access_token"]
                account.http.headers["Authorization"] = f"Bearer {renewed}"
                until = (await peer.ask("auth", auth={"token": renewed}))["expires_at"]
                # Both are whole seconds of their own moments.
                assert abs(until - (peer.seen[0]["expires_at"] + 15 * 60 - 30)) <= 1
            with clock.shifted(15 * 60 + 30):
                # What was subscribed goes on.
                await account.http.post("/api/v1/tasks", json={"title": "milk"})
                await peer.event("task.created")
            with clock.shifted(29 * 60):
                assert (await peer.until("auth.expiring"))["at"] == until
            with clock.shifted(30 * 60):
                assert await peer.code() == 4004


async def test_the_same_user_in_another_workspace_is_4403(live_server: LiveServer, eve: Account) -> None:
    async with live_server.join(eve) as peer:
        made = await eve.http.post("/api/v1/workspaces", json={"name": "second"})
        assert made.status_code == 201, made.text
        body = {"email": eve.email, "password": "correct horse 1"}
        async with httpx.AsyncClient(base_url=live_server.base) as client:
            data = (await client.post("/api/v1/auth/signin", json=body)).json()["data"]
            client.headers["Authorization"] = f"Bearer {data['access_token']}"
            moved = await client.post("/api/v1/auth/switch", json={"workspace_id": made.json()["data"]["id"]})
            assert moved.status_code == 200, moved.text
        await peer.alive()
        await peer.send("auth", id=1, auth={"token": moved.json()["data"]["access_token"]})
        assert await peer.code() == 4403


async def test_a_renewal_with_other_rights_starts_anew(live_server: LiveServer, eve: Account) -> None:
    """What is subscribed was judged by the rights of the first credential."""
    made = await eve.http.post("/api/v1/api-keys", json={"name": "x", "scopes": ["realtime:connect"]})
    assert made.status_code == 201, made.text
    async with live_server.join(eve) as peer:
        await peer.sub("tasks")
        await peer.send("auth", id=1, auth={"api_key": made.json()["data"]["key"]})
        closed = await peer.closed()
        assert (closed.code, closed.reason) == (4000, "rights changed")


async def test_who_signs_out_while_renewing_does_not_stay(
    live_server: LiveServer, eve: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"email": eve.email, "password": "correct horse 1"}
    async with httpx.AsyncClient(base_url=live_server.base) as client:
        token = (await client.post("/api/v1/auth/signin", json=body)).json()["data"]["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        async with live_server.join(eve) as peer:
            original = live_server.realtime.authenticate

            async def then_signs_out(auth: Any) -> Any:
                credential = await original(auth)
                assert (await client.post("/api/v1/auth/signout")).status_code == 204
                return credential

            monkeypatch.setattr(live_server.realtime, "authenticate", then_signs_out)
            await peer.send("auth", id=1, auth={"token": token})
            assert await peer.code() == 4403


async def test_a_resume_is_judged_anew(live_server: LiveServer, eve: Account, databases: TestDatabases) -> None:
    kept, gone = await conversation_of(eve), await conversation_of(eve)
    async with live_server.join(eve) as peer:
        since = {}
        for channel in (kept, gone):
            subbed = await peer.sub(channel)
            since[channel] = {"ep": subbed["ep"], "seq": subbed["head"]}
    assert (await eve.http.delete(f"/api/v1/conversations/{gone[13:]}")).status_code == 204
    async with live_server.open() as peer:
        subs = [{"ch": channel, "since": since[channel]} for channel in (kept, gone)]
        await peer.send("hello", v=1, auth={"token": eve.access_token}, subs=subs)
        answers = {}
        for _ in subs:
            answers.update({(frame := await until_either(peer))["ch"]: frame})
        assert (answers[kept]["t"], answers[kept]["recovered"]) == ("subbed", True)
        assert (answers[gone]["t"], answers[gone]["code"]) == ("err", "not_found")
    # Out of the workspace: not even welcome.
    connection = await asyncpg.connect(databases.postgres.admin_url(live_server.urls.name))
    try:
        await connection.execute("DELETE FROM memberships WHERE user_id = $1", eve.user_id)
    finally:
        await connection.close()
    live_server.app.state.revocations._hand_on(Revocation("membership", eve.workspace_id, eve.user_id))
    async with live_server.open() as peer:
        await peer.send("hello", v=1, auth={"token": eve.access_token}, subs=[{"ch": kept, "since": since[kept]}])
        assert await peer.code() in {4401, 4403}
        assert not [frame for frame in peer.seen if frame["t"] != "err"]


async def until_either(peer: Peer) -> dict[str, Any]:
    """Return the next `subbed` or `err`."""
    while (frame := await peer.read())["t"] not in {"subbed", "err"}:
        pass
    return frame
