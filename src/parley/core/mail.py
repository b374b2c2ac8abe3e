"""Sending mail, behind a port: what is sent is written by the modules, from jobs of the outbox."""

from dataclasses import dataclass
from typing import Protocol


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
