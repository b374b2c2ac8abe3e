"""Changing and resetting passwords, confirming and changing addresses: with the mails, over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from parley.core import clock
from parley.core.db import DatabaseUrls
from parley.core.settings import AuthSettings, LimitSettings
from parley.identity.one_time_tokens import OneTimeTokens, Purpose
from parley.identity.repository import UnscopedIdentityRepository
from tests.identity.conftest import PASSWORD
from tests.identity.post import API, Site, site, token_of

NEW = "another horse 2"
ADA, EVE = "ada@example.com", "eve@example.com"
CONFIRM, RESET, CHANGED, CHANGING = "Confirm your e-mail", "Choose a new", "password was changed", "about to change"


@pytest.fixture
async def here(tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection) -> AsyncIterator[Site]:
    async with site(tmp_path, urls, admin) as made:
        yield made


async def sign_up(here: Site, email: str = ADA) -> dict[str, Any]:
    answer = await here.call("auth/signup", {"email": email, "password": PASSWORD, "confirmPassword": PASSWORD})
    assert answer.status_code == 201, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def sign_in(here: Site, password: str = PASSWORD, email: str = ADA) -> httpx.Response:
    return await here.call("auth/signin", {"email": email, "password": password})


async def change(here: Site, token: str, current: str = PASSWORD, new: str = NEW) -> httpx.Response:
    body = {"current_password": current, "password": new, "confirmPassword": new}
    return await here.call("auth/password/change", body, token)


async def ask(here: Site, email: str = ADA, count: int = 1) -> str:
    """Ask for a reset, and return the token of the mail."""
    assert (await here.call("auth/password/forgot", {"email": email})).status_code == 202
    return token_of(await here.post.next(email, RESET, count))


async def reset(here: Site, token: str, new: str = NEW) -> httpx.Response:
    return await here.call("auth/password/reset", {"token": token, "password": new, "confirmPassword": new})


async def change_address(here: Site, token: str, email: str, current: str = PASSWORD) -> httpx.Response:
    async with here.client() as http:
        body = {"email": email, "current_password": current}
        return await http.patch(f"{API}/me", json=body, headers={"Authorization": f"Bearer {token}"})


async def me(here: Site, token: str) -> int:
    async with here.client() as http:
        return (await http.get(f"{API}/me", headers={"Authorization": f"Bearer {token}"})).status_code


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


async def test_changing_a_password(here: Site) -> None:
    ada = await sign_up(here)
    other = (await sign_in(here)).json()["data"]
    assert refused(await change(here, ada["access_token"], "wrong horse 1")) == (403, "invalid_credentials")
    assert refused(await change(here, ada["access_token"], new="short1")) == (422, "validation_error")
    assert await me(here, other["access_token"]) == 200
    assert (await change(here, ada["access_token"])).status_code == 204
    # This session goes on, the others have ended.
    assert await me(here, ada["access_token"]) == 200
    assert (await here.call("auth/refresh", {"refresh_token": ada["refresh_token"]})).status_code == 200
    assert await me(here, other["access_token"]) == 401
    answer = await here.call("auth/refresh", {"refresh_token": other["refresh_token"]})
    assert refused(answer) == (401, "session_revoked")
    assert (await sign_in(here)).status_code == 401
    assert (await sign_in(here, NEW)).status_code == 200
    await here.post.next(ADA, CHANGED)
    rows = await here.admin.fetch("SELECT outcome FROM audit_events WHERE action = 'password.changed' ORDER BY id")
    assert [row["outcome"] for row in rows] == ["failure", "success"]


async def test_of_two_changes_at_once_one_wins(here: Site) -> None:
    ada = await sign_up(here)
    answers = await asyncio.gather(*(change(here, ada["access_token"], new=f"horse number {n}") for n in range(2)))
    assert sorted(answer.status_code for answer in answers) == [204, 403]
    winner = [answer.status_code for answer in answers].index(204)
    assert (await sign_in(here, f"horse number {winner}")).status_code == 200
    assert (await sign_in(here, f"horse number {1 - winner}")).status_code == 401


async def test_a_reset_ends_every_session_and_confirms_the_address(here: Site) -> None:
    ada = await sign_up(here)
    token = await ask(here)
    mail = here.post.to(ADA, RESET)[0]
    # In the fragment, which no server and no log ever sees.
    assert f"https://chat.example.com/reset-password#token={token}" in mail.text
    assert "30 minutes" in mail.text
    assert (await reset(here, token)).status_code == 204
    assert await me(here, ada["access_token"]) == 401
    answer = await here.call("auth/refresh", {"refresh_token": ada["refresh_token"]})
    assert refused(answer) == (401, "session_revoked")
    data = (await sign_in(here, NEW)).json()["data"]
    assert data["user"]["email_verified"] is True
    assert (await sign_in(here)).status_code == 401
    await here.post.next(ADA, CHANGED)
    assert refused(await reset(here, token, "a third horse 3")) == (422, "link_invalid")


async def test_a_password_that_breaks_a_rule_leaves_the_link_good(here: Site) -> None:
    await sign_up(here)
    token = await ask(here)
    assert refused(await reset(here, token, "short1")) == (422, "validation_error")
    assert (await reset(here, token)).status_code == 204


async def test_of_two_resets_at_once_one_wins(here: Site) -> None:
    await sign_up(here)
    for turn in range(1, 6):
        token = await ask(here, count=turn)
        answers = await asyncio.gather(*(reset(here, token, f"horse number {turn}{n}") for n in range(4)))
        assert sorted(answer.status_code for answer in answers) == [204, 422, 422, 422]
        winner = [answer.status_code for answer in answers].index(204)
        for n in range(4):
            assert (await sign_in(here, f"horse number {turn}{n}")).status_code == (200 if n == winner else 401)


async def test_only_the_newest_link_for_a_while_and_for_its_own_use(here: Site) -> None:
    await sign_up(here)
    confirm = token_of(await here.post.next(ADA, CONFIRM))
    first = await ask(here)
    second = await ask(here, count=2)
    assert refused(await reset(here, first)) == (422, "link_invalid")
    assert refused(await reset(here, confirm)) == (422, "link_invalid")
    assert refused(await here.call("auth/email/verify", {"token": second})) == (422, "link_invalid")
    for token in ("", "parley_ot_", second[:-1], second[:-4] + "AAAA", "x" * 400, "parley_ot_" + "é" * 56):
        assert (await reset(here, token)).status_code == 422
    with clock.shifted(30 * 60):
        assert refused(await reset(here, second)) == (422, "link_invalid")
    with clock.shifted(30 * 60 - 5):
        assert (await reset(here, second)).status_code == 204
    # That of the address lives longer.
    with clock.shifted(24 * 3600 + 1):
        assert refused(await here.call("auth/email/verify", {"token": confirm})) == (422, "link_invalid")


async def test_nobody_learns_whether_there_is_an_account(here: Site) -> None:
    await sign_up(here)
    for path in ("auth/password/forgot", "auth/email/resend"):
        answers = [await here.call(path, {"email": email}) for email in (ADA, "nobody@example.com")]
        assert [answer.status_code for answer in answers] == [202, 202]
        first, second = [{**answer.json(), "meta": None} for answer in answers]
        assert first == second
        assert first["data"] == {"status": "accepted"}
        one, two = [
            {name: value for name, value in answer.headers.items() if name not in {"x-request-id", "date"}}
            for answer in answers
        ]
        assert one == two
    await here.settled()
    assert here.post.to("nobody@example.com") == []
    assert len(here.post.to(ADA, RESET)) == 1


async def test_confirming_an_address_and_asking_again(here: Site) -> None:
    await sign_up(here)
    first = token_of(await here.post.next(ADA, CONFIRM))
    assert (await here.call("auth/email/resend", {"email": ADA.upper()})).status_code == 202
    mail = await here.post.next(ADA, CONFIRM, 2)
    assert f"https://chat.example.com/verify-email#token={token_of(mail)}" in mail.text
    assert refused(await here.call("auth/email/verify", {"token": first})) == (422, "link_invalid")
    answers = await asyncio.gather(*(here.call("auth/email/verify", {"token": token_of(mail)}) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [204, 422, 422, 422]
    assert (await sign_in(here)).json()["data"]["user"]["email_verified"] is True
    # Whoever has confirmed gets no more of these.
    await here.call("auth/email/resend", {"email": ADA})
    await here.settled()
    assert len(here.post.to(ADA, CONFIRM)) == 2


async def test_changing_the_address(here: Site) -> None:
    ada = await sign_up(here)
    assert refused(await change_address(here, ada["access_token"], EVE, "wrong horse 1")) == (
        403,
        "invalid_credentials",
    )
    assert (await change_address(here, ada["access_token"], "Ada.New@example.com")).status_code == 200
    token = token_of(await here.post.next("Ada.New@example.com", "Confirm your new"))
    await here.post.next(ADA, CHANGING)
    # Until it is confirmed the old one counts.
    assert (await sign_in(here)).json()["data"]["user"]["email"] == ADA
    assert (await sign_in(here, email="ada.new@example.com")).status_code == 401
    assert (await here.call("auth/email/verify", {"token": token})).status_code == 204
    data = (await sign_in(here, email="ada.new@example.com")).json()["data"]
    assert data["user"]["email_verified"] is True
    assert (await sign_in(here)).status_code == 401
    await here.post.next(ADA, "address was changed")
    assert refused(await here.call("auth/email/verify", {"token": token})) == (422, "link_invalid")


async def test_the_old_address_is_told_even_if_its_mail_is_late(here: Site) -> None:
    ada = await sign_up(here)
    await here.settled()
    here.post.away = True
    await change_address(here, ada["access_token"], EVE)
    # The change may be confirmed before this mail leaves.
    rows = await here.admin.fetch(
        "SELECT payload::text AS text FROM jobs WHERE payload->>'template' = 'email_changing'"
    )
    assert len(rows) == 1
    assert ADA in rows[0]["text"]


async def test_a_taken_address_is_not_revealed_and_not_given(here: Site) -> None:
    ada = await sign_up(here)
    await sign_up(here, EVE)
    answers = [await change_address(here, ada["access_token"], email) for email in (EVE, "free@example.com")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {**answers[0].json(), "meta": None} == {**answers[1].json(), "meta": None}
    await here.settled()
    # Only the newest link is good: ask once more for the taken one.
    await change_address(here, ada["access_token"], EVE)
    token = token_of(await here.post.next(EVE, "Confirm your new", 2))
    assert refused(await here.call("auth/email/verify", {"token": token})) == (409, "email_taken")
    assert (await sign_in(here)).status_code == 200


async def test_of_two_who_confirm_one_address_at_once_one_gets_it(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for count, email in enumerate((ADA, "bob@example.com"), 1):
        data = await sign_up(here, email)
        await change_address(here, data["access_token"], EVE)
        tokens.append(token_of(await here.post.next(EVE, "Confirm your new", count)))
    both = asyncio.Barrier(2)
    original = UnscopedIdentityRepository._execute

    async def execute(self: UnscopedIdentityRepository, statement: Any) -> Any:
        found = await original(self, statement)
        # Both have seen that the address is free.
        if getattr(statement, "is_select", False) and "email_norm" in str(statement.whereclause):
            await both.wait()
        return found

    monkeypatch.setattr(UnscopedIdentityRepository, "_execute", execute)
    answers = await asyncio.gather(*(here.call("auth/email/verify", {"token": token}) for token in tokens))
    assert sorted(answer.status_code for answer in answers) == [204, 409], [answer.text for answer in answers]


@pytest.mark.parametrize("by", ["change", "reset"])
async def test_a_new_password_takes_back_what_a_stranger_asked_for(here: Site, by: str) -> None:
    """A stranger with the session had the address changed: the old address is told to change the password."""
    ada = await sign_up(here)
    await change_address(here, ada["access_token"], EVE)
    changing = token_of(await here.post.next(EVE, "Confirm your new"))
    resetting = await ask(here)
    answer = await (change(here, ada["access_token"]) if by == "change" else reset(here, resetting))
    assert answer.status_code == 204
    assert refused(await here.call("auth/email/verify", {"token": changing})) == (422, "link_invalid")
    assert refused(await reset(here, resetting, "a third horse 3")) == (422, "link_invalid")
    assert (await sign_in(here, NEW)).json()["data"]["user"]["email"] == ADA


async def test_a_reset_mailed_to_an_address_that_the_account_has_left_is_worth_nothing(here: Site) -> None:
    ada = await sign_up(here)
    resetting = await ask(here)
    await change_address(here, ada["access_token"], EVE)
    changing = token_of(await here.post.next(EVE, "Confirm your new"))
    assert (await here.call("auth/email/verify", {"token": changing})).status_code == 204
    assert refused(await reset(here, resetting)) == (422, "link_invalid")
    assert (await sign_in(here, PASSWORD, EVE)).status_code == 200
    assert await me(here, ada["access_token"]) == 200


async def test_no_secret_is_readable_in_any_table(here: Site) -> None:
    ada = await sign_up(here)
    secrets = [PASSWORD, NEW, ada["access_token"], ada["refresh_token"], token_of(await here.post.next(ADA, CONFIRM))]
    secrets.append(await ask(here))
    await change_address(here, ada["access_token"], EVE)
    secrets.append(token_of(await here.post.next(EVE, "Confirm your new")))
    await change(here, ada["access_token"])
    await here.settled()
    dump = ""
    for (table,) in await here.admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        dump += str(await here.admin.fetch(f"SELECT t::text FROM {table} t"))
    assert ada["user"]["id"] in dump
    for secret in secrets:
        assert secret not in dump
        # Nor its bytes, in any of the ways in which they could be shown.
        bare = secret.removeprefix("parley_ot_")
        assert bare not in dump
        assert secret.encode().hex() not in dump


async def test_links_begin_with_our_address_whatever_a_request_calls_us(here: Site) -> None:
    await sign_up(here)
    headers = {"Host": "evil.example.org", "X-Forwarded-Host": "evil.example.org", "X-Forwarded-Proto": "gopher", "Origin": "https://evil.example.org", "Referer": "https://evil.example.org/"}  # fmt: skip
    for path in ("auth/password/forgot", "auth/email/resend"):
        assert (await here.call(path, {"email": ADA}, headers=headers)).status_code == 202
    await here.post.next(ADA, RESET)
    await here.post.next(ADA, CONFIRM, 2)
    for mail in here.post.mails:
        assert "evil" not in mail.text + mail.subject + mail.to
    for mail in (*here.post.to(ADA, RESET), *here.post.to(ADA, CONFIRM)):
        assert "https://chat.example.com/" in mail.text


async def test_a_mail_that_does_not_leave_waits_and_changes_no_answer(here: Site) -> None:
    here.post.away = True
    await sign_up(here)
    for path, count in (("auth/password/forgot", 2), ("auth/email/resend", 3)):
        answer = await here.call(path, {"email": ADA})
        assert (answer.status_code, answer.json()["data"]) == (202, {"status": "accepted"})
        query = "SELECT count(*) FROM jobs WHERE kind = 'mail' AND status = 'queued' AND attempts > 0"
        while await here.admin.fetchval(query) < count:
            assert here.post.tried < 50
            await asyncio.sleep(0.005)
    rows = await here.admin.fetch("SELECT error::text AS error, payload::text AS payload FROM jobs WHERE kind = 'mail'")
    assert "parley_ot_" not in str(rows)
    # It leaves when it can, and its token is good.
    here.post.away = False
    await here.admin.execute("UPDATE jobs SET run_at = now() WHERE kind = 'mail' AND status = 'queued'")
    assert (await reset(here, token_of(await here.post.next(ADA, RESET)))).status_code == 204


async def test_where_addresses_are_confirmed_first_new_and_taken_ones_are_alike(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    async with site(tmp_path, urls, admin, auth=AuthSettings(verify_email="required")) as here:
        body = {"email": ADA, "password": PASSWORD, "confirmPassword": PASSWORD}
        answers = [await here.call("auth/signup", body)]
        token = token_of(await here.post.next(ADA, CONFIRM))
        assert refused(await sign_in(here)) == (403, "email_unverified")
        assert refused(await sign_in(here, "wrong horse 1")) == (401, "invalid_credentials")
        # Taken, and not confirmed: the link once more.
        answers.append(await here.call("auth/signup", body))
        token = token_of(await here.post.next(ADA, CONFIRM, 2))
        assert (await here.call("auth/email/verify", {"token": token})).status_code == 204
        assert (await sign_in(here)).status_code == 200
        # Taken and confirmed: its owner is told.
        answers.append(await here.call("auth/signup", body | {"password": NEW, "confirmPassword": NEW}))
        await here.post.next(ADA, "already have an account")
        answers.append(await here.call("auth/signup", body | {"email": EVE}))
        assert (await sign_in(here, NEW)).status_code == 401
    assert [answer.status_code for answer in answers] == [202] * 4
    for answer in answers[1:]:
        assert {**answer.json(), "meta": None} == {**answers[0].json(), "meta": None}
        assert set(answer.headers) == set(answers[0].headers)
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", ["auth/password/forgot", "auth/email/resend"])
async def test_mails_that_a_stranger_asks_for_are_few(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection, path: str
) -> None:
    async with site(tmp_path, urls, admin, rate_limits="on", limits=LimitSettings(mail_per_hour=3)) as here:
        await sign_up(here)
        for email in (ADA, "nobody@example.com"):
            answers = [await here.call(path, {"email": email}) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [202] * 3 + [429]
            assert int(answers[-1].headers["Retry-After"]) > 3000
        # Over all addresses, from one place.
        statuses = [(await here.call(path, {"email": f"u{number}@example.com"})).status_code for number in range(8)]
        assert statuses == [202] * 4 + [429] * 4


async def test_sign_ups_fill_nobodys_mailbox(tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    limits, auth = LimitSettings(mail_per_hour=3), AuthSettings(verify_email="required")
    async with site(tmp_path, urls, admin, rate_limits="on", limits=limits, auth=auth) as here:
        body = {"email": ADA, "password": PASSWORD, "confirmPassword": PASSWORD}
        assert [(await here.call("auth/signup", body)).status_code for _ in range(8)] == [202] * 8
        await here.settled()
        # That of the account itself, and three more.
        assert len(here.post.to(ADA)) == 4


@pytest.mark.parametrize("by", ["change", "reset"])
async def test_a_sign_in_that_races_a_new_password_leaves_no_session_of_the_old_one(here: Site, by: str) -> None:
    data = await sign_up(here)
    password = PASSWORD
    for turn in range(25):
        new = f"horse number {turn}"
        if by == "reset":
            async with here.app.state.database.system_unit_of_work() as unit:
                tokens: OneTimeTokens = here.app.state.passwords._tokens
                user_id, life = UUID(data["user"]["id"]), timedelta(minutes=30)
                token = await tokens.mint(unit, user_id, Purpose.RESET_PASSWORD, life=life, email=ADA)
            changing = reset(here, token, new)
        else:
            changing = change(here, data["access_token"], password, new)
        changed, *signed_in = await asyncio.gather(changing, *(sign_in(here, password) for _ in range(3)))
        assert changed.status_code == 204, changed.text
        live = await here.admin.fetch("SELECT id FROM sessions WHERE revoked_at IS NULL")
        # That of the change itself, where it was one.
        assert len(live) == (0 if by == "reset" else 1)
        for answer in signed_in:
            assert answer.status_code in {200, 401}, answer.text
            if answer.status_code == 200:
                assert await me(here, answer.json()["data"]["access_token"]) == 401
        password = new


async def test_without_the_lock_the_race_would_be_lost(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    data = await sign_up(here)
    looked, changed = asyncio.Event(), asyncio.Event()

    async def look(self: UnscopedIdentityRepository, user_id: Any) -> str | None:
        row = await self.find_user_by_id(user_id)
        looked.set()
        await changed.wait()
        return None if row is None else row["password_hash"]

    monkeypatch.setattr(UnscopedIdentityRepository, "lock_password", look)
    task = asyncio.create_task(sign_in(here))
    await looked.wait()
    assert (await change(here, data["access_token"])).status_code == 204
    changed.set()
    # A session that was opened with the old password, and lives.
    assert await me(here, (await task).json()["data"]["access_token"]) == 200
