"""The mails of accounts: what they say, and that they leave by jobs."""

import stat
from datetime import timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from uuid import uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.core.settings import Settings
from parley.identity.mails import Template, render, spoken
from tests.identity.conftest import PASSWORD
from tests.identity.post import token_of
from tests.jobs.conftest import until

URL = "https://chat.example.com"
TOKEN = "parley_ot_" + "a" * 56
PAGES = {
    Template.VERIFY_EMAIL: "verify-email",
    Template.CHANGE_EMAIL: "verify-email",
    Template.RESET_PASSWORD: "reset-password",
    Template.INVITATION: "accept-invitation",
}


@pytest.mark.parametrize("template", Template)
def test_each_mail_is_whole(template: Template) -> None:
    mail = render(
        template, to="ada@example.com", base_url=URL, token=TOKEN, life="1 day", workspace="Chess", inviter="Bob"
    )
    assert mail.to == "ada@example.com"
    assert mail.subject
    assert "{" not in mail.subject + mail.text
    assert "If this was not you" in mail.text
    for line in mail.text.splitlines():
        if "http" in line:
            assert URL in line
    if template in PAGES:
        # In the fragment, which browsers keep to themselves.
        assert f"{URL}/{PAGES[template]}#token={TOKEN}\n" in mail.text
        assert "1 day" in mail.text
        assert token_of(mail) == TOKEN
    else:
        assert TOKEN not in mail.text
    assert TOKEN not in mail.subject


@pytest.mark.parametrize(
    "name", ["{token}", "{0.__class__}", "a\r\nBcc: eve@example.com", "x\n\nhttps://evil.example.org"]
)
def test_what_people_choose_is_put_in_as_it_is(name: str) -> None:
    mail = render(
        Template.INVITATION, to="a@example.com", base_url=URL, token=TOKEN, life="7 days", workspace=name, inviter=name
    )
    assert " ".join(name.split()) in mail.text
    assert mail.subject == f"You are invited to {' '.join(name.split())}"
    assert "\n" not in mail.subject
    assert not any(line.startswith(("Bcc", "https://evil")) for line in mail.text.splitlines())


@pytest.mark.parametrize(
    ("life", "words"),
    [
        (timedelta(hours=24), "1 day"),
        (timedelta(days=7), "7 days"),
        (timedelta(hours=1), "1 hour"),
        (timedelta(hours=36), "36 hours"),
        (timedelta(minutes=30), "30 minutes"),
        (timedelta(minutes=90), "90 minutes"),
        (timedelta(minutes=1), "1 minute"),
    ],
)
def test_a_duration_in_words(life: timedelta, words: str) -> None:
    assert spoken(life) == words


async def test_by_default_it_is_a_file_of_the_data_directory(
    app: FastAPI, client: httpx.AsyncClient, settings: Settings, admin: asyncpg.Connection
) -> None:
    body = {"email": "ada@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
    assert (await client.post("/api/v1/auth/signup", json=body)).status_code == 201

    def files() -> list[Path]:
        return list((settings.data_dir / "mail").glob("*.eml"))

    async def sent() -> bool:
        return bool(await admin.fetchval("SELECT count(*) = 1 FROM jobs WHERE kind = 'mail' AND status = 'completed'"))

    await until(sent)
    (file,) = files()
    message = message_from_bytes(file.read_bytes(), policy=policy.default)
    assert isinstance(message, EmailMessage)
    assert message["To"] == "ada@example.com"
    assert f"{settings.base_url}/verify-email#token=parley_ot_" in message.get_content()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_mail_to_whoever_is_gone_is_done_with(
    app: FastAPI, admin: asyncpg.Connection, settings: Settings
) -> None:
    payloads = [
        f'{{"template": "reset_password", "user_id": "{uuid4()}"}}',
        '{"template": "verify_email", "email_norm": "no@example.com"}',
    ]
    for payload in payloads:
        await admin.execute(
            "INSERT INTO jobs (workspace_id, id, kind, payload, max_attempts)"
            " VALUES ('00000000-0000-0000-0000-000000000000', gen_random_uuid(), 'mail', $1, 3)",
            payload,
        )

    async def done() -> bool:
        return bool(await admin.fetchval("SELECT count(*) = 2 FROM jobs WHERE kind = 'mail' AND status = 'completed'"))

    await until(done)
    assert not (settings.data_dir / "mail").exists()
    assert await admin.fetchval("SELECT count(*) FROM one_time_tokens") == 0


async def test_no_user_finds_mails_among_their_jobs(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = {"email": "ada@example.com", "password": PASSWORD, "confirmPassword": PASSWORD}
    data = (await client.post("/api/v1/auth/signup", json=body)).json()["data"]
    answer = await client.get("/api/v1/jobs", headers={"Authorization": f"Bearer {data['access_token']}"})
    assert (answer.status_code, answer.json()["data"]) == (200, [])
