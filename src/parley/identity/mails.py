"""The mails of accounts. They leave by jobs, whose payload names people and never holds a secret.

What lets in, a token, is made by the job that sends it: nothing of it waits in the outbox, and a repeated attempt
makes a new one, of which the newest alone is good. Links hold it in the fragment, which browsers keep to themselves,
and begin with the configured address, never with what a request called us.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final, Protocol
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.mail import Mail, Mailer
from parley.core.settings import AuthSettings
from parley.identity.one_time_tokens import OneTimeTokens, Purpose
from parley.identity.repository import UnscopedIdentityRepository
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobRun, JobType

KIND: Final = "mail"


class Template(StrEnum):
    """The mails there are."""

    VERIFY_EMAIL = "verify_email"
    CHANGE_EMAIL = "change_email"
    EMAIL_CHANGING = "email_changing"
    EMAIL_CHANGED = "email_changed"
    ALREADY_REGISTERED = "already_registered"
    RESET_PASSWORD = "reset_password"  # noqa: S105 - a name
    PASSWORD_CHANGED = "password_changed"  # noqa: S105 - a name
    SESSION_REUSED = "session_reused"
    INVITATION = "invitation"


_FOOT = "\n\nIf this was not you, {unless}.\n"

# Subject, text, what to do if it was someone else. Names that people chose are put in as they are: this is plain text.
_TEXTS: dict[Template, tuple[str, str, str]] = {
    Template.VERIFY_EMAIL: (
        "Confirm your e-mail address",
        (
            "To confirm that this address is yours, open\n\n{link}\n\nor enter this code:\n\n{token}\n\n"
            "It is good for {life}."
        ),
        "you need not do anything",
    ),
    Template.CHANGE_EMAIL: (
        "Confirm your new e-mail address",
        (
            "To sign in with this address from now on, open\n\n{link}\n\nor enter this code:\n\n{token}\n\n"
            "It is good for {life}."
        ),
        "you need not do anything",
    ),
    Template.EMAIL_CHANGING: (
        "Your e-mail address is about to change",
        (
            "Someone who is signed in to your account asked to change its e-mail address. It changes when the new "
            "address has been confirmed."
        ),
        "change your password at once: {base_url}",
    ),
    Template.EMAIL_CHANGED: (
        "Your e-mail address was changed",
        "Your account has another e-mail address now. This one no longer signs in.",
        "write to whoever runs this service",
    ),
    Template.ALREADY_REGISTERED: (
        "You already have an account",
        (
            "Someone tried to sign up with this address. You have an account already; sign in at\n\n{base_url}\n\n"
            "or choose a new password there if you have forgotten yours."
        ),
        "you need not do anything",
    ),
    Template.RESET_PASSWORD: (
        "Choose a new password",
        (
            "To choose a new password, open\n\n{link}\n\nor enter this code:\n\n{token}\n\n"
            "It is good for {life}, once. All your sessions end with it."
        ),
        "you need not do anything: your password stays",
    ),
    Template.PASSWORD_CHANGED: (
        "Your password was changed",
        "The password of your account was changed, and other sessions were ended.",
        "choose a new password at once: {base_url}",
    ),
    Template.SESSION_REUSED: (
        "A session of yours was ended",
        "A key of one of your sessions was used twice, as happens when someone has copied it. The session was ended.",
        "and if it happens again, change your password: {base_url}",
    ),
    Template.INVITATION: (
        "You are invited to {workspace}",
        (
            "{inviter} invites you to the workspace {workspace}. To join, open\n\n{link}\n\nor enter this code:\n\n"
            "{token}\n\nIt is good for {life}, for this address only."
        ),
        "you need not do anything",
    ),
}

_PAGES = {
    Template.VERIFY_EMAIL: "verify-email",
    Template.CHANGE_EMAIL: "verify-email",
    Template.RESET_PASSWORD: "reset-password",
    Template.INVITATION: "accept-invitation",
}


def render(template: Template, *, to: str, base_url: str, token: str = "", life: str = "", **more: str) -> Mail:
    """Return a mail."""
    subject, text, unless = _TEXTS[template]
    page = _PAGES.get(template)
    values = {
        **{name: " ".join(value.split()) for name, value in more.items()},
        "base_url": base_url,
        "token": token,
        "life": life,
        "link": f"{base_url}/{page}#token={token}" if page else "",
    }
    foot = _FOOT.format(unless=unless.format(**values))
    return Mail(to=to, subject=subject.format(**values), text=text.format(**values) + foot)


def spoken(life: timedelta) -> str:
    """Return a duration in words."""
    minutes = int(life.total_seconds() // 60)
    for unit, size in (("day", 1440), ("hour", 60), ("minute", 1)):
        if minutes % size == 0 and minutes >= size:
            count = minutes // size
            return f"{count} {unit}" + ("s" if count > 1 else "")
    return f"{minutes} minutes"


async def queue_mail(unit: UnitOfWork, template: Template, *, user_id: UUID, to: str | None = None) -> None:
    """Have a mail sent to a user if the unit commits. `to`: an address that is not, or no longer, the user's."""
    payload = {"template": template.value, "user_id": user_id, **({"to": to} if to is not None else {})}
    await enqueue(unit, KIND, payload, user_id=user_id)


async def queue_mail_to_address(unit: UnitOfWork, template: Template, *, email_norm: str) -> None:
    """Have a mail sent to whoever has an address, if anyone has: who asks does not learn it, not even by the time."""
    await enqueue(unit, KIND, {"template": template.value, "email_norm": email_norm})


async def queue_invitation(unit: UnitOfWork, *, workspace_id: UUID, invitation_id: UUID) -> None:
    """Have an invitation sent if the unit commits."""
    payload = {"template": Template.INVITATION.value, "workspace_id": workspace_id, "invitation_id": invitation_id}
    await enqueue(unit, KIND, payload, workspace_id=workspace_id)


@dataclass(frozen=True, slots=True)
class InvitationLetter:
    """What an invitation's mail says."""

    to: str
    workspace: str
    inviter: str
    token: str


class InvitationMinter(Protocol):
    """Makes an invitation's secret when its mail is sent."""

    async def mint(self, workspace_id: UUID, invitation_id: UUID) -> InvitationLetter | None:
        """Return the letter, its secret stored as a hash; None for one that is not open any more."""
        ...


class Mails:
    """Sends what was queued."""

    def __init__(
        self,
        database: Database,
        mailer: Mailer,
        tokens: OneTimeTokens,
        invitations: InvitationMinter,
        *,
        base_url: str,
        settings: AuthSettings,
    ) -> None:
        self._database = database
        self._mailer = mailer
        self._tokens = tokens
        self._invitations = invitations
        self._base_url = base_url
        self._settings = settings
        self._lives = {
            Template.VERIFY_EMAIL: timedelta(hours=settings.verify_hours),
            Template.CHANGE_EMAIL: timedelta(hours=settings.verify_hours),
            Template.RESET_PASSWORD: timedelta(minutes=settings.reset_minutes),
        }

    def job_types(self) -> tuple[JobType, ...]:
        """Return the job, for the dispatcher."""
        return (JobType(KIND, self.send, shown=False),)

    async def send(self, run: JobRun) -> None:
        """Send one mail. Raises `MailNotSent`: the job is tried again."""
        template = Template(run.payload["template"])
        if template is Template.INVITATION:
            mail = await self._invitation(UUID(run.payload["workspace_id"]), UUID(run.payload["invitation_id"]))
        else:
            mail = await self._to_user(template, run.payload)
        # After its transaction: a token is stored before anyone can hold it.
        if mail is not None:
            await self._mailer.send(mail)

    async def _to_user(self, template: Template, payload: dict[str, str]) -> Mail | None:
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            if "user_id" in payload:
                row = await repository.find_user_by_id(UUID(payload["user_id"]))
            else:
                row = await repository.find_user(payload["email_norm"])
            if row is None or row["email"] is None:
                return None
            to = payload.get("to") or row["email"]
            if template is Template.VERIFY_EMAIL and row["email_verified"]:
                return None
            life = self._lives.get(template)
            token = ""
            if life is not None:
                token = await self._tokens.mint(unit, row["id"], Purpose(template.value), life=life, email=to)
        return render(template, to=to, base_url=self._base_url, token=token, life=spoken(life) if life else "")

    async def _invitation(self, workspace_id: UUID, invitation_id: UUID) -> Mail | None:
        letter = await self._invitations.mint(workspace_id, invitation_id)
        if letter is None:
            return None
        return render(
            Template.INVITATION,
            to=letter.to,
            base_url=self._base_url,
            token=letter.token,
            life=spoken(timedelta(days=self._settings.invitation_days)),
            workspace=letter.workspace,
            inviter=letter.inviter,
        )
