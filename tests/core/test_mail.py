"""Mail: what leaves, by a real mail server and to files, and what is said when it does not."""

import asyncio
import email
import email.policy
import logging
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, Envelope
from pydantic import SecretStr

from parley.core import mail as module
from parley.core.mail import ConsoleMailer, Mail, MailNotSent, SmtpMailer, build_mailer, compose
from parley.core.settings import MailSettings, Settings, SettingsInvalid, load_settings

SENDER = "Parley <parley@example.com>"
HELLO = Mail(to="ada@example.com", subject="Hello Ada", text="Zeile eins: äöü\n.\nthe end\n")


class Inbox:
    """What a mail server was given, and what it answers."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.refusal = ""
        self.silent = False

    async def handle_RCPT(  # noqa: N802 - the library's name
        self, _server: Any, _session: Any, envelope: Envelope, address: str, _options: Any
    ) -> str:
        if self.silent:
            await asyncio.Event().wait()
        if self.refusal:
            return self.refusal
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Envelope) -> str:  # noqa: N802 - as above
        self.envelopes.append(envelope)
        return "250 OK"

    def messages(self) -> list[EmailMessage]:
        return [read(envelope.content) for envelope in self.envelopes]


def read(content: Any) -> EmailMessage:
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


@asynccontextmanager
async def mail_server(inbox: Inbox) -> AsyncIterator[int]:
    """Run a mail server; yields its port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(inbox, hostname="mail.test", loop=loop), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        server.close_clients()
        await server.wait_closed()


def smtp(port: int, **changes: Any) -> SmtpMailer:
    values = {"transport": "smtp", "host": "127.0.0.1", "port": port, "tls": "none", "sender": SENDER, "timeout_s": 5}
    return SmtpMailer(MailSettings(**{**values, **changes}))


async def test_a_mail_server_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        async with mail_server(inbox) as port:
            await smtp(port).send(HELLO)
    (message,) = inbox.messages()
    (envelope,) = inbox.envelopes
    assert (envelope.mail_from, envelope.rcpt_tos) == ("parley@example.com", ["ada@example.com"])
    assert (message["From"], message["To"], message["Subject"]) == (SENDER, "ada@example.com", "Hello Ada")
    assert message.get_content().replace("\r\n", "\n") == HELLO.text
    assert message["Date"]
    assert message["Message-ID"].endswith("@example.com>")
    assert message["Auto-Submitted"] == "auto-generated"
    assert "mail sent" in caplog.text
    assert "ada@example.com" not in caplog.text
    assert "the end" not in caplog.text


@pytest.mark.parametrize("refusal", ["550 no ada@example.com here", "451 not now, ada@example.com"])
async def test_one_that_refuses(refusal: str) -> None:
    inbox = Inbox()
    inbox.refusal = refusal
    async with mail_server(inbox) as port:
        with pytest.raises(MailNotSent) as caught:
            await smtp(port).send(HELLO)
    assert "ada@example.com" not in str(caught.value)
    assert inbox.envelopes == []


async def test_one_that_is_away() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(MailNotSent, match="cannot be used"):
            await smtp(bound.getsockname()[1]).send(HELLO)


async def test_one_that_does_not_answer() -> None:
    inbox = Inbox()
    inbox.silent = True
    async with mail_server(inbox) as port:
        async with asyncio.timeout(3):
            with pytest.raises(MailNotSent, match="cannot be used"):
                await smtp(port, timeout_s=0.2).send(HELLO)


async def test_one_that_offers_no_encryption_gets_nothing() -> None:
    inbox = Inbox()
    async with mail_server(inbox) as port:
        for tls in ("starttls", "implicit"):
            with pytest.raises(MailNotSent):
                await smtp(port, tls=tls, username="u", password=SecretStr("hunter2hunter2"), timeout_s=1).send(HELLO)
    assert inbox.envelopes == []


@pytest.mark.parametrize(
    "subject", ["Hi\r\nBcc: eve@example.com", "Hi\nBcc: eve@example.com", "Hi\x85Bcc: eve@example.com", "\x00 Hi\x0b\x0c", "é" * 500]
)  # fmt: skip
async def test_a_subject_stays_one_line(subject: str) -> None:
    inbox = Inbox()
    async with mail_server(inbox) as port:
        await smtp(port).send(Mail(to="ada@example.com", subject=subject, text="x"))
    (message,) = inbox.messages()
    assert message["Bcc"] is None
    assert len(message["Subject"]) <= 200
    assert message.get_content().strip() == "x"
    assert inbox.envelopes[0].rcpt_tos == ["ada@example.com"]


@pytest.mark.parametrize(
    "to",
    ["ada@example.com\r\nBcc: eve@example.com", "ada@example.com\nX: y", "ada@example.com, eve@example.com", "", "ada",
     "ada@", "<ada@example.com>", "ada@example.com>\r\nRCPT TO:<eve@example.com"],
)  # fmt: skip
async def test_an_address_is_one_address_or_nothing_leaves(to: str) -> None:
    inbox = Inbox()
    async with mail_server(inbox) as port:
        with pytest.raises(MailNotSent):
            await smtp(port).send(Mail(to=to, subject="Hi", text="x"))
    assert inbox.envelopes == []


async def test_an_address_in_another_script_is_sent_or_said_not_to_be() -> None:
    inbox = Inbox()
    async with mail_server(inbox) as port:
        try:
            await smtp(port).send(Mail(to="адa@example.com", subject="Привет", text="да"))
        except MailNotSent:
            assert inbox.envelopes == []
        else:
            assert inbox.envelopes[0].rcpt_tos == ["адa@example.com"]


@pytest.mark.parametrize("line", ["x", "x" * 998, "x" * 999, "x" * 5000, "é" * 499, "é" * 500])
async def test_a_text_cannot_end_the_message(line: str) -> None:
    inbox = Inbox()
    text = f"a\r\n.\r\nMAIL FROM:<eve@example.com>\r\n{line}\n"
    async with mail_server(inbox) as port:
        await smtp(port).send(Mail(to="ada@example.com", subject="Hi", text=text))
    (message,) = inbox.messages()
    assert message.get_content().replace("\r\n", "\n") == text.replace("\r\n", "\n")


def test_links_stand_in_files_as_they_are() -> None:
    link = "https://chat.example.com/reset-password#token=parley_ot_" + "a" * 56
    for text in (link, f"für dich: {link}"):
        assert link.encode() in compose(Mail(to="ada@example.com", subject="Hi", text=text), SENDER).as_bytes()


@pytest.fixture
def console(tmp_path: Path) -> ConsoleMailer:
    return ConsoleMailer(tmp_path / "data" / "mail", sender=SENDER)


async def test_files_are_their_owners_alone(console: ConsoleMailer, tmp_path: Path) -> None:
    directory = tmp_path / "data" / "mail"
    for number in range(3):
        await console.send(Mail(to="ada@example.com", subject=f"Mail {number}", text="the secret link"))
    files = sorted(directory.iterdir())
    assert [read(file.read_bytes())["Subject"] for file in files] == ["Mail 0", "Mail 1", "Mail 2"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_the_log_says_where_and_not_what(console: ConsoleMailer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=module.__name__):
        await console.send(HELLO)
    assert ".eml" in caplog.text
    assert "the end" not in caplog.text


async def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "mail").write_text("a file where the directory should be")
    with pytest.raises(MailNotSent, match="cannot be written"):
        await ConsoleMailer(tmp_path / "mail", sender=SENDER).send(HELLO)


def test_a_message_of_a_sender_without_a_name() -> None:
    assert compose(HELLO, "parley@example.com")["From"] == "parley@example.com"


def settings_with(tmp_path: Path, **mail: Any) -> Settings:
    return load_settings(tmp_path, env="testing", data_dir=tmp_path, mail=MailSettings(**mail))


def test_which_way_mail_leaves(tmp_path: Path) -> None:
    assert isinstance(build_mailer(settings_with(tmp_path)), ConsoleMailer)
    assert isinstance(build_mailer(settings_with(tmp_path, transport="smtp")), SmtpMailer)
    with pytest.raises(SettingsInvalid, match="PARLEY_MAIL_SENDER"):
        build_mailer(settings_with(tmp_path, sender="Parley"))
