"""Invitations: for whoever proves to have the address, once."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from fastapi import FastAPI

from parley.core import clock
from parley.core.mail import Mail
from parley.core.settings import Settings
from parley.main import create_app
from tests.conftest import Account, http_client
from tests.jobs.conftest import until

API = "/api/v1"


@dataclass
class Box:
    """A mailer that keeps what it is given."""

    mails: list[Mail] = field(default_factory=list)

    async def send(self, mail: Mail) -> None:
        self.mails.append(mail)

    async def token_for(self, address: str, *, number: int = 1) -> str:
        """Wait for an invitation to an address and return its token."""

        async def there() -> bool:
            return len(self._to(address)) >= number

        await until(there, timeout_s=10)
        text = self._to(address)[number - 1].text
        found = re.search(r"#token=(parley_in_[\w=-]+)", text)
        assert found is not None
        # The code beside the link is the same.
        assert text.count(found[1]) == 2
        return found[1]

    def _to(self, address: str) -> list[Mail]:
        return [mail for mail in self.mails if mail.to == address and "invited" in mail.subject]


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[FastAPI]:
    """An application whose mails stay here."""
    made = create_app(settings)
    made.state.mailer = Box()
    started, done = asyncio.Event(), asyncio.Event()

    async def run() -> None:
        async with made.router.lifespan_context(made):
            started.set()
            await done.wait()

    task = asyncio.create_task(run())
    await asyncio.wait({task, asyncio.ensure_future(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
    yield made
    done.set()
    await task


@pytest.fixture
def box(app: FastAPI) -> Box:
    made: Box = app.state.mailer
    return made


async def invite(account: Account, email: str, **more: Any) -> dict[str, Any]:
    answer = await account.http.post(
        f"{API}/workspaces/{account.workspace_id}/invitations", json={"email": email, **more}
    )
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()["data"]
    return made


async def accept(account: Account, token: str) -> tuple[int, Any]:
    answer = await account.http.post(f"{API}/invitations/accept", json={"token": token})
    body = answer.json()
    return answer.status_code, body["data"]["workspace"] if answer.is_success else body["error"]


async def test_who_has_the_address_joins(alice: Account, bob: Account, box: Box, admin: asyncpg.Connection) -> None:
    made = await invite(alice, "Bob@Example.org", role="admin")
    assert set(made) == {"id", "email", "role", "invited_by", "created_at", "expires_at"}
    assert (made["email"], made["role"]) == ("Bob@Example.org", "admin")
    token = await box.token_for("Bob@Example.org")
    assert await admin.fetchval("SELECT email_verified FROM users WHERE id = $1", bob.user_id) is False

    workspace = {"id": str(alice.workspace_id), "name": "alice's workspace", "role": "admin"}
    assert await accept(bob, token) == (200, workspace)
    # The session stays where it is.
    assert (await bob.http.get(f"{API}/me")).json()["data"]["workspace"]["id"] == str(bob.workspace_id)
    assert [row["name"] for row in (await bob.http.get(f"{API}/workspaces")).json()["data"]] == [
        "bob's workspace", "alice's workspace",
    ]  # fmt: skip
    # Holding the token proved the address.
    assert await admin.fetchval("SELECT email_verified FROM users WHERE id = $1", bob.user_id) is True
    # Twice is no error, and nothing more.
    assert await accept(bob, token) == (200, workspace)
    assert await admin.fetchval("SELECT count(*) FROM memberships WHERE user_id = $1", bob.user_id) == 2
    listed = await alice.http.get(f"{API}/workspaces/{alice.workspace_id}/invitations")
    assert listed.json()["meta"]["total"] == 0


async def test_nobody_else_joins_and_nothing_is_revealed(alice: Account, bob: Account, box: Box, sign_up: Any) -> None:
    await invite(alice, "grace@example.com")
    token = await box.token_for("grace@example.com")
    answer = await bob.http.post(f"{API}/invitations/accept", json={"token": token})
    assert (answer.status_code, answer.json()["error"]) == (403, "invitation_for_another")
    assert "grace" not in answer.text
    assert "alice" not in answer.text
    # The one it was for still can.
    grace = await sign_up("grace@example.com")
    assert (await accept(grace, token))[0] == 200


async def test_twenty_at_once_make_one_member(
    alice: Account, bob: Account, box: Box, admin: asyncpg.Connection
) -> None:
    await invite(alice, bob.email)
    token = await box.token_for(bob.email)
    answers = await asyncio.gather(*(accept(bob, token) for _ in range(20)))
    assert {status for status, _ in answers} == {200}
    assert await admin.fetchval("SELECT count(*) FROM memberships WHERE workspace_id = $1", alice.workspace_id) == 2
    assert await admin.fetchval("SELECT count(*) FROM audit_events WHERE action = 'invitation.accepted'") == 1


async def test_a_new_one_replaces_the_open_one(alice: Account, bob: Account, box: Box) -> None:
    first = await invite(alice, bob.email, role="viewer")
    old = await box.token_for(bob.email)
    second = await invite(alice, bob.email.upper(), role="member")
    new = await box.token_for(bob.email.upper())
    assert first["id"] != second["id"]
    assert await accept(bob, old) == (422, "link_invalid")
    assert (await accept(bob, new))[1]["role"] == "member"


async def test_what_was_taken_back_or_is_over_is_not_accepted(
    alice: Account, bob: Account, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{API}/workspaces/{alice.workspace_id}/invitations"
    made = await invite(alice, bob.email)
    token = await box.token_for(bob.email)
    assert (await alice.http.delete(f"{path}/{made['id']}")).status_code == 204
    assert (await alice.http.delete(f"{path}/{made['id']}")).status_code == 404
    assert await accept(bob, token) == (422, "link_invalid")

    await invite(alice, bob.email)
    token = await box.token_for(bob.email, number=2)
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + timedelta(days=7, minutes=1))
    assert await accept(bob, token) == (422, "link_invalid")


@pytest.mark.parametrize(
    "token", ["", "x", "parley_in_", "parley_in_" + "A" * 80, "parley_in_" + "é" * 80, "parley_in_" + "A" * 81]
)
async def test_what_is_no_token_is_not_accepted(alice: Account, token: str) -> None:
    assert await accept(alice, token) == (422, "link_invalid")


async def test_a_member_is_not_invited_and_nobody_above_oneself(
    alice: Account, bob: Account, box: Box, app: FastAPI
) -> None:
    path = f"{API}/workspaces/{alice.workspace_id}/invitations"
    answer = await alice.http.post(path, json={"email": alice.email.upper()})
    assert (answer.status_code, answer.json()["error"]) == (409, "already_member")
    await invite(alice, bob.email, role="admin")
    await accept(bob, await box.token_for(bob.email))
    switched = await bob.http.post(f"{API}/auth/switch", json={"workspace_id": str(alice.workspace_id)})
    async with http_client(app) as http:
        http.headers["Authorization"] = f"Bearer {switched.json()['data']['access_token']}"
        answer = await http.post(path, json={"email": "x@example.com", "role": "owner"})
        assert (answer.status_code, answer.json()["error"]) == (403, "role_not_allowed")
        assert (await http.post(path, json={"email": "x@example.com", "role": "admin"})).status_code == 201


async def test_no_table_and_no_answer_holds_the_token(
    alice: Account, bob: Account, box: Box, admin: asyncpg.Connection
) -> None:
    made = await invite(alice, bob.email)
    token = await box.token_for(bob.email)
    assert "parley_in_" not in str(made)
    for (table,) in await admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        rows = await admin.fetch(f"SELECT to_jsonb(t)::text FROM {table} t")
        assert not [table for (text,) in rows if token[-40:] in text]


async def test_names_that_people_choose_stay_in_their_place(alice: Account, box: Box) -> None:
    await alice.http.patch(f"{API}/workspaces/{alice.workspace_id}", json={"name": "Evil\r\nBcc: x@evil.example\r\n"})
    await alice.http.patch(f"{API}/me", json={"name": "{token} {0}\nhttp://evil.example"})
    await invite(alice, "grace@example.com")
    await box.token_for("grace@example.com")
    mail = next(mail for mail in box.mails if mail.to == "grace@example.com")
    assert "\n" not in mail.subject.strip()
    assert "\nhttp://evil" not in mail.text
