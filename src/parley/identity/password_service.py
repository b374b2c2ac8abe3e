"""Changing and resetting passwords, confirming and changing addresses."""

import logging
from uuid import UUID

from sqlalchemy import RowMapping

from parley.core import clock
from parley.core.api_limits import network_of
from parley.core.db import Database, UnitOfWork
from parley.core.origin import current_origin
from parley.core.rate_limits import Limit, RateLimits
from parley.core.scope import Scope
from parley.core.settings import LimitSettings
from parley.identity import email_address
from parley.identity.errors import EmailTaken, LinkInvalid, PasswordMissing, PasswordWrong, SessionRevoked
from parley.identity.guessing import Guessing
from parley.identity.mails import Template, queue_mail, queue_mail_to_address
from parley.identity.one_time_tokens import OneTimeTokens, Purpose
from parley.identity.passwords import Passwords
from parley.identity.repository import UnscopedIdentityRepository
from parley.identity.sessions import SessionService
from parley.tenancy.audit import Action, record

logger = logging.getLogger(__name__)

_HOUR_S = 3600


class PasswordService:
    """What proves who someone is: passwords and addresses. Each method is whole: it has its own transactions."""

    def __init__(
        self,
        database: Database,
        *,
        passwords: Passwords,
        sessions: SessionService,
        tokens: OneTimeTokens,
        guessing: Guessing,
        limits: RateLimits,
        settings: LimitSettings,
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._sessions = sessions
        self._tokens = tokens
        self._guessing = guessing
        self._limits = limits
        self._mails = Limit("mail", settings.mail_per_hour, _HOUR_S)
        # Many people share an address; what is kept down is the writing to strangers.
        self._mails_from = Limit("mail-address", settings.mail_per_hour * 4, _HOUR_S)

    async def change(self, scope: Scope, *, current_password: str, password: str) -> None:
        """Change the caller's password, end their other sessions and tell them by mail.

        Raises `PasswordMissing`, `PasswordWrong`, `PasswordRefused`, `TooMany`, `PasswordsBusy`.
        """
        row = await self._confirmed(scope, current_password)
        self._passwords.check(password, email=row["email"] or "")
        new = await self._passwords.hash(password)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            # Whoever changed it meanwhile has ended this session too.
            if not await repository.change_hash(scope.user_id, old=row["password_hash"], new=new, now=clock.now()):
                raise PasswordWrong
            await self._cancel_mails(unit, scope.user_id)
            await self._sessions.end_all(
                unit, scope.user_id, reason="password_changed", but=scope.session_id, scope=scope
            )
            await record(unit, Action.PASSWORD_CHANGED, scope=scope, target=str(scope.user_id))
            await queue_mail(unit, Template.PASSWORD_CHANGED, user_id=scope.user_id)

    async def forgot(self, email: str) -> None:
        """Have a reset mailed to an address, if there is an account: the caller does not learn it. Raises `TooMany`."""
        norm = await self._mail_allowed(email)
        async with self._database.system_unit_of_work() as unit:
            await queue_mail_to_address(unit, Template.RESET_PASSWORD, email_norm=norm)
            await record(unit, Action.PASSWORD_RESET_REQUESTED, actor="anonymous")

    async def reset(self, token: str, password: str) -> None:
        """Set a new password with a token from a mail, and end every session.

        The token proves the address. Raises `LinkInvalid`, `PasswordRefused`, `PasswordsBusy`.
        """
        async with self._database.system_unit_of_work() as unit:
            found = await self._tokens.look(unit, token, Purpose.RESET_PASSWORD)
        self._passwords.check(password, email=found.email or "")
        new = await self._passwords.hash(password)
        async with self._database.system_unit_of_work() as unit:
            found = await self._tokens.spend(unit, token, Purpose.RESET_PASSWORD)
            repository = UnscopedIdentityRepository(unit)
            # Whoever reads the mail of an address that the account has left does not get in.
            if found.email is None or not await repository.verify_email(found.user_id, found.email):
                raise LinkInvalid
            await repository.set_password(found.user_id, new, now=clock.now())
            await self._cancel_mails(unit, found.user_id)
            await self._sessions.end_all(unit, found.user_id, reason="password_reset")
            await record(unit, Action.PASSWORD_RESET, user_id=found.user_id, target=str(found.user_id))
            await queue_mail(unit, Template.PASSWORD_CHANGED, user_id=found.user_id)
        logger.info("password reset", extra={"user_id": found.user_id})

    async def resend(self, email: str) -> None:
        """Have a confirmation mailed again, if an account waits for one: the caller does not learn it."""
        norm = await self._mail_allowed(email)
        async with self._database.system_unit_of_work() as unit:
            await queue_mail_to_address(unit, Template.VERIFY_EMAIL, email_norm=norm)

    async def verify(self, token: str) -> None:
        """Confirm an address with a token from a mail. Raises `LinkInvalid`, and `EmailTaken` for a new one."""
        async with self._database.system_unit_of_work() as unit:
            try:
                found = await self._tokens.spend(unit, token, Purpose.VERIFY_EMAIL)
            except LinkInvalid:
                await self._verify_change(unit, token)
                return
            verified = found.email is not None and await UnscopedIdentityRepository(unit).verify_email(
                found.user_id, found.email
            )
            if not verified:
                raise LinkInvalid
            await record(unit, Action.EMAIL_VERIFIED, user_id=found.user_id, target=str(found.user_id))

    async def change_email(self, scope: Scope, *, email: str, current_password: str) -> None:
        """Have a new address confirmed by mail; until then the old one stays, and is told.

        A taken address is not revealed here. Raises `EmailInvalid`, `PasswordMissing`, `PasswordWrong`, `TooMany`.
        """
        given, _ = email_address.parse(email)
        row = await self._confirmed(scope, current_password)
        await self._limits.hit(self._mails, str(scope.user_id))
        async with self._database.system_unit_of_work() as unit:
            await queue_mail(unit, Template.CHANGE_EMAIL, user_id=scope.user_id, to=given)
            # Named here: when the mail is sent the account may have the new one.
            await queue_mail(unit, Template.EMAIL_CHANGING, user_id=scope.user_id, to=row["email"])

    async def _cancel_mails(self, unit: UnitOfWork, user_id: UUID) -> None:
        """Take back what a stranger may have asked for: a new password answers a mail about it."""
        await self._tokens.cancel(unit, user_id, Purpose.CHANGE_EMAIL, Purpose.RESET_PASSWORD)

    async def _verify_change(self, unit: UnitOfWork, token: str) -> None:
        found = await self._tokens.spend(unit, token, Purpose.CHANGE_EMAIL)
        repository = UnscopedIdentityRepository(unit)
        before = await repository.find_user_by_id(found.user_id)
        if found.email is None or before is None:
            raise LinkInvalid
        given, norm = email_address.parse(found.email)
        if not await repository.change_email(found.user_id, email=given, email_norm=norm):
            raise EmailTaken
        await record(unit, Action.EMAIL_CHANGED, user_id=found.user_id, target=str(found.user_id))
        if before["email"] is not None:
            await queue_mail(unit, Template.EMAIL_CHANGED, user_id=found.user_id, to=before["email"])

    async def confirm(self, scope: Scope, current_password: str) -> None:
        """Hold that the password is the caller's. Raises `PasswordMissing`, `PasswordWrong`, `TooMany`."""
        await self._confirmed(scope, current_password)

    async def _confirmed(self, scope: Scope, current_password: str) -> RowMapping:
        """Return the caller's row once the current password is right."""
        async with self._database.system_unit_of_work() as unit:
            row = await UnscopedIdentityRepository(unit).find_user_by_id(scope.user_id)
        if row is None:
            raise SessionRevoked
        if row["password_hash"] is None:
            raise PasswordMissing
        guess = self._guessing.attempt(
            str(scope.user_id), known_device=False, failures=row["failures"], known_place=True
        )
        async with guess as attempt:
            attempt.succeeded = (await self._passwords.verify(current_password, row["password_hash"])).ok
        if not attempt.succeeded:
            async with self._database.system_unit_of_work() as unit:
                await record(unit, Action.PASSWORD_CHANGED, scope=scope, outcome="failure", target=str(scope.user_id))
            raise PasswordWrong
        return row

    async def _mail_allowed(self, email: str) -> str:
        """Count a mail that a stranger asks for, and return the folded address. Raises `EmailInvalid`, `TooMany`."""
        _, norm = email_address.parse(email)
        await self._limits.hit(self._mails_from, network_of(current_origin().address))
        await self._limits.hit(self._mails, norm)
        return norm
