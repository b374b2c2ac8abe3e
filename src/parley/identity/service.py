"""Accounts: signing up and in. Callable without HTTP: the command line uses it as it is."""

import logging
from uuid import UUID

from sqlalchemy import RowMapping

from parley.core import clock
from parley.core.api_limits import network_of
from parley.core.db import Database, UnitOfWork
from parley.core.ids import new_id
from parley.core.origin import current_origin
from parley.core.rate_limits import Limit, RateLimits, TooMany
from parley.core.scope import NO_WORKSPACE, Scope
from parley.core.settings import Settings
from parley.identity import email_address
from parley.identity.devices import Devices
from parley.identity.erasures import AccountDeleted, ErasureService
from parley.identity.errors import (
    AccountDisabled,
    CredentialsInvalid,
    EmailInvalid,
    EmailTaken,
    EmailUnverified,
    NoWorkspace,
    SessionRevoked,
)
from parley.identity.guessing import Guessing
from parley.identity.mails import Template, queue_mail
from parley.identity.passwords import Passwords
from parley.identity.repository import AccountRepository, UnscopedIdentityRepository
from parley.identity.schemas import MeRead, TokenAnswer, UserRead
from parley.identity.session_repository import UnscopedSessionRepository
from parley.identity.sessions import SessionService
from parley.tenancy.audit import Action, record
from parley.tenancy.schemas import WorkspaceRead
from parley.tenancy.service import UnscopedWorkspaces

logger = logging.getLogger(__name__)

_HOUR_S = 3600
_TRIES = 3


class IdentityService:
    """Signs people up and in. Each method is whole: it opens its own transactions."""

    def __init__(
        self,
        database: Database,
        *,
        passwords: Passwords,
        sessions: SessionService,
        devices: Devices,
        guessing: Guessing,
        limits: RateLimits,
        settings: Settings,
    ) -> None:
        self._database = database
        self._passwords = passwords
        self.sessions = sessions
        self.devices = devices
        self._guessing = guessing
        self._limits = limits
        self._sign_ups = Limit("signup", settings.limits.signup_per_hour, _HOUR_S)
        self._mails = Limit("mail", settings.limits.mail_per_hour, _HOUR_S)
        self.verification_required = settings.auth.verify_email == "required"
        self.erasures: ErasureService | None = None
        """Who brings closed accounts back; the shell puts it here, since it has to know every module."""

    async def sign_up(
        self, *, email: str, password: str, name: str | None = None, cookie: bool = False
    ) -> TokenAnswer | None:
        """Make an account with a workspace of its own, and sign it in.

        None where addresses must be confirmed first: alike for a taken one, whose owner is told by mail. Raises
        `EmailInvalid`, `PasswordRefused`, `PasswordsBusy`, `TooMany`, and `EmailTaken` where nothing is confirmed.
        """
        await self._limits.hit(self._sign_ups, network_of(current_origin().address))
        given, norm = email_address.parse(email)
        name = (name or "").strip() or None
        self._passwords.check(password, email=given)
        # Before the transaction: a connection must not wait for a hash.
        password_hash = await self._passwords.hash(password)
        user = UserRead(id=new_id(), email=given, name=name, email_verified=False)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            if not await repository.add_user(id=user.id, email=given, email_norm=norm, name=name):
                if not self.verification_required:
                    raise EmailTaken
                taken = await repository.find_user(norm)
                if taken is not None and await self._may_write_to(norm):
                    again = Template.ALREADY_REGISTERED if taken["email_verified"] else Template.VERIFY_EMAIL
                    await queue_mail(unit, again, user_id=taken["id"])
                return None
            await repository.add_password(user.id, password_hash)
            owner_name = name or given.partition("@")[0]
            workspace = await UnscopedWorkspaces(unit).create_personal(user.id, owner_name=owner_name)
            await queue_mail(unit, Template.VERIFY_EMAIL, user_id=user.id)
            await record(unit, Action.ACCOUNT_CREATED, workspace_id=workspace.id, user_id=user.id, target=str(user.id))
            answer = None
            if not self.verification_required:
                answer = await self.sessions.open(unit, user, workspace, how="sign_up", cookie=cookie)
        logger.info("signed up", extra={"user_id": user.id})
        return answer

    async def sign_in(
        self, *, email: str, password: str, cookie: bool = False, restore: bool = False, device: str | None = None
    ) -> TokenAnswer:
        """Open a session in the workspace that was used last, at first the user's own.

        `restore` brings an account back that is being deleted; `device` proves that its holder was let in before.
        Raises `CredentialsInvalid` alike for a wrong password and an unknown account, `TooMany`, `NoWorkspace`,
        `EmailUnverified`, `AccountDisabled`, `AccountDeleted`, `PasswordsBusy`.
        """
        norm, row, known_place = await self._find_user(email)
        stored: str | None = row["password_hash"] if row is not None else None
        known_device = row is not None and stored is not None and self.devices.is_known(
            device, row["id"], password_since=row["password_since"]
        )  # fmt: skip
        guess = self._guessing.attempt(
            norm or email.casefold(),
            known_device=known_device,
            failures=row["failures"] if row is not None and stored is not None else None,
            known_place=known_place,
        )
        async with guess as attempt:
            verdict = await self._passwords.verify(password, stored)
            attempt.succeeded = row is not None and stored is not None and verdict.ok
        if row is None or stored is None or not verdict.ok:
            await self._refuse(row)
            raise CredentialsInvalid
        for _ in range(_TRIES):
            answer = await self._enter(row, stored, new_hash=verdict.new_hash, cookie=cookie, restore=restore)
            if answer is not None:
                return answer
            # Changed since it was looked at: by its owner, or by another sign-in that hashed it anew.
            _, row, _ = await self._find_user(email)
            stored = row["password_hash"] if row is not None else None
            verdict = await self._passwords.verify(password, stored)
            if row is None or stored is None or not verdict.ok:
                break
        raise CredentialsInvalid

    async def _enter(
        self, row: RowMapping, stored: str, *, new_hash: str | None, cookie: bool, restore: bool
    ) -> TokenAnswer | None:
        """Open a session for a password that was right; None if the password is another one by now."""
        user = UserRead.model_validate(row)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            # A change that commits after this ends the session that is opened here; one before it is seen.
            if await repository.lock_password(user.id) != stored:
                return None
            if row["disabled_at"] is not None:
                await self._bring_back(unit, user.id, restore=restore)
            if self.verification_required and not user.email_verified:
                raise EmailUnverified
            if new_hash is not None:
                await repository.replace_hash(user.id, old=stored, new=new_hash, now=clock.now())
            await repository.forget_failures(user.id)
            preferred = UnscopedSessionRepository(unit).last_workspace(user.id)
            workspace = await UnscopedWorkspaces(unit).find_home(user.id, preferred=preferred)
            if workspace is None:
                raise NoWorkspace
            answer = await self.sessions.open(unit, user, workspace, how="password", cookie=cookie)
        logger.info("signed in", extra={"user_id": user.id})
        return answer

    async def _may_write_to(self, norm: str) -> bool:
        """Whether a stranger may have one more mail written to an address. Over the limit it is left out silently."""
        try:
            await self._limits.hit(self._mails, norm)
        except TooMany:
            return False
        return True

    async def _bring_back(self, unit: UnitOfWork, user_id: UUID, *, restore: bool) -> None:
        erase_after = await self.erasures.pending(unit, user_id) if self.erasures else None
        if self.erasures is None or erase_after is None:
            raise AccountDisabled
        if not restore:
            raise AccountDeleted(details={"erase_after": erase_after.isoformat()})
        await self.erasures.restore(unit, user_id)

    async def _refuse(self, row: RowMapping | None) -> None:
        """Write a refusal down: with the same statements whether or not there is an account."""
        user_id: UUID | None = row["id"] if row is not None else None
        async with self._database.system_unit_of_work() as unit:
            await UnscopedIdentityRepository(unit).note_failure(user_id or NO_WORKSPACE, now=clock.now())
            await record(unit, Action.SESSION_REFUSED, user_id=user_id, actor="anonymous", outcome="failure")
        logger.info("sign-in refused", extra={"user_id": user_id})

    async def me(self, scope: Scope) -> MeRead:
        """Return the caller."""
        async with self._database.unit_of_work(scope) as unit:
            return await self._account(AccountRepository(unit, scope))

    async def rename(self, scope: Scope, name: str | None) -> MeRead:
        """Change the caller's name and return the caller."""
        async with self._database.unit_of_work(scope) as unit:
            repository = AccountRepository(unit, scope)
            await repository.rename(name)
            return await self._account(repository)

    async def _find_user(self, email: str) -> tuple[str, RowMapping | None, bool]:
        """Return the folded address, its user, and whether the user has been let in from here before."""
        try:
            _, norm = email_address.parse(email)
        except EmailInvalid:
            # No account has it. Counted all the same, as any other address.
            norm = ""
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            row = await repository.find_user(norm)
            known = await repository.has_been_at(row["id"] if row else NO_WORKSPACE, current_origin().address)
        return norm, row, known

    async def _account(self, repository: AccountRepository) -> MeRead:
        row = await repository.get()
        if row is None:
            raise SessionRevoked
        workspace = WorkspaceRead(id=row["workspace_id"], name=row["workspace_name"], role=row["role"])
        user = UserRead.model_validate(row)
        return MeRead(**user.model_dump(), workspace=workspace)
