"""Sending mail, behind a port: what is sent is written by the modules, from jobs of the outbox."""

import logging
import os
import ssl
from dataclasses import dataclass
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, make_msgid, parseaddr
from pathlib import Path
from typing import Protocol

import aiosmtplib

from parley.core import clock
from parley.core.ids import new_id
from parley.core.settings import MailSettings, Settings, SettingsInvalid

logger = logging.getLogger(__name__)

_SUBJECT_LENGTH = 200
# What a line of a message may have (RFC 5321, 4.5.3.1.6), without its end.
_LINE_BYTES = 998


@dataclass(frozen=True, slots=True)
class Mail:
    """A plain-text message to one address."""

    to: str
    subject: str
    text: str


class MailNotSent(Exception):
    """The message was not taken; another attempt may help. Its text is safe to log."""


class Mailer(Protocol):
    """Hands messages on."""

    async def send(self, mail: Mail) -> None:
        """Send a message. Raises `MailNotSent`."""
        ...


def compose(mail: Mail, sender: str) -> EmailMessage:
    """Return the message as it is sent. Raises `MailNotSent` for an address that cannot stand in a header."""
    message = EmailMessage(policy=SMTP)
    name, address = parseaddr(sender)
    try:
        message["From"] = Address(name, addr_spec=address)
        recipient = Address(addr_spec=mail.to)
        if not (recipient.username and recipient.domain):
            raise ValueError("it has no name or no domain")
        message["To"] = recipient
    # A library that says `IndexError` for an empty text.
    except (ValueError, IndexError, MessageError) as error:
        raise MailNotSent("the address cannot be written to") from error
    # What people choose, such as the name of a workspace, stands in subjects.
    message["Subject"] = " ".join(mail.subject.split())[:_SUBJECT_LENGTH]
    message["Date"] = format_datetime(clock.now())
    message["Message-ID"] = make_msgid(domain=address.rpartition("@")[2] or "localhost")
    message["Auto-Submitted"] = "auto-generated"
    # As it is: quoted-printable would break links for whoever opens the file.
    plain = "7bit" if mail.text.isascii() else "8bit"
    fits = max(map(len, mail.text.encode().splitlines()), default=0) <= _LINE_BYTES
    message.set_content(mail.text, cte=plain if fits else "quoted-printable")
    return message


class ConsoleMailer:
    """Writes messages to `mail/` in the data directory, one file each, and says so in the log."""

    def __init__(self, directory: Path, *, sender: str) -> None:
        self._directory = directory
        self._sender = sender

    async def send(self, mail: Mail) -> None:
        """Write a message. Its owner alone can read it: it may hold a link that lets in."""
        message = compose(mail, self._sender)
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Ids grow with time: the newest file is the last one.
            path = self._directory / f"{new_id()}.eml"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(message.as_bytes())
        except OSError as error:
            raise MailNotSent(f"the mail cannot be written: {error.strerror}") from error
        logger.info("mail written to %s", path, extra={"subject": message["Subject"]})


class SmtpMailer:
    """Hands messages to a mail server."""

    def __init__(self, settings: MailSettings) -> None:
        self._settings = settings

    async def send(self, mail: Mail) -> None:
        """Send a message. Raises `MailNotSent` when the server is away, refuses it, or takes too long."""
        settings = self._settings
        message = compose(mail, settings.sender)
        password = settings.password.get_secret_value() if settings.password else None
        try:
            await aiosmtplib.send(
                message,
                hostname=settings.host,
                port=settings.port,
                username=settings.username,
                password=password,
                use_tls=settings.tls == "implicit",
                start_tls=settings.tls == "starttls",
                tls_context=ssl.create_default_context() if settings.tls != "none" else None,
                timeout=settings.timeout_s,
            )
        except aiosmtplib.SMTPResponseException as error:
            # The server's own words may repeat the address or the credential.
            raise MailNotSent(f"the mail server refused with {error.code}") from error
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            raise MailNotSent(f"the mail server cannot be used: {type(error).__name__}") from error
        logger.info("mail sent", extra={"subject": message["Subject"]})


def build_mailer(settings: Settings) -> Mailer:
    """Return how mail leaves by these settings. Raises `SettingsInvalid` for a sender that is no address."""
    if "@" not in parseaddr(settings.mail.sender)[1]:
        raise SettingsInvalid("PARLEY_MAIL_SENDER must be an address, such as Parley <parley@example.com>")
    if settings.mail.transport == "smtp":
        return SmtpMailer(settings.mail)
    return ConsoleMailer(settings.data_dir / "mail", sender=settings.mail.sender)
