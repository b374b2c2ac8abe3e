"""Accounts and sessions. Callable without HTTP: the command line uses it as it is."""

import logging
import secrets
from uuid import UUID

from sqlalchemy import RowMapping

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import Unauthenticated
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.identity import email_address
from parley.identity.authenticator import SessionAuthenticator
from parley.identity.errors import (
    CredentialsInvalid,
    EmailInvalid,
    EmailTaken,
    NoWorkspace,
    RefreshInvalid,
    SessionExpired,
    SessionRevoked,
    SessionUnknown,
)
from parley.identity.passwords import Passwords
from parley.identity.refresh import RefreshTokens
from parley.identity.repository import AccountRepository, Rotation, SessionLimits, UnscopedIdentityRepository
from parley.identity.schemas import MeRead, TokenAnswer, UserRead
from parley.identity.tokens import AccessTokens
from parley.tenancy.schemas import WorkspaceRead
from parley.tenancy.service import UnscopedWorkspaces

logger = logging.getLogger(__name__)

_SALT_BYTES = 16
_USER_AGENT_LENGTH = 400

_REFUSALS: dict[Rotation, type[Unauthenticated]] = {
    Rotation.REVOKED: SessionRevoked,
    Rotation.REUSED: SessionRevoked,
    Rotation.EXPIRED: SessionExpired,
    Rotation.AHEAD: SessionUnknown,
}


class IdentityService:
    """Signs people up, in and out, and keeps their sessions. Each method is whole: it opens its own transactions."""

    def __init__(
        self,
        database: Database,
        *,
        tokens: AccessTokens,
        refresh_tokens: RefreshTokens,
        passwords: Passwords,
        authenticator: SessionAuthenticator,
        limits: SessionLimits,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._refresh_tokens = refresh_tokens
        self._passwords = passwords
        self._authenticator = authenticator
        self._limits = limits

    async def sign_up(
        self, *, email: str, password: str, name: str | None = None, user_agent: str | None = None
    ) -> TokenAnswer:
        """Make an account with a workspace of its own, and sign it in.

        Raises `EmailInvalid`, `PasswordRefused`, `EmailTaken`, `PasswordsBusy`.
        """
        given, norm = email_address.parse(email)
        name = (name or "").strip() or None
        self._passwords.check(password, email=given)
        # Before the transaction: a connection must not wait for a hash.
        password_hash = await self._passwords.hash(password)
        user = UserRead(id=new_id(), email=given, name=name, email_verified=False)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            if not await repository.add_user(id=user.id, email=given, email_norm=norm, name=name):
                raise EmailTaken
            await repository.add_password(user.id, password_hash)
            owner_name = name or given.partition("@")[0]
            workspace = await UnscopedWorkspaces(unit).create_personal(user.id, owner_name=owner_name)
            session_id, refresh_token = await self._open_session(repository, user.id, workspace.id, user_agent)
        logger.info("signed up", extra={"user_id": user.id, "session_id": session_id})
        return self._answer(user, workspace, session_id=session_id, refresh_token=refresh_token)

    async def sign_in(self, *, email: str, password: str, user_agent: str | None = None) -> TokenAnswer:
        """Open a session in the workspace that was used last, at first the user's own.

        Raises `CredentialsInvalid` alike for a wrong password and an unknown account, `NoWorkspace`, `PasswordsBusy`.
        """
        row = await self._find_user(email)
        stored: str | None = row["password_hash"] if row is not None else None
        verdict = await self._passwords.verify(password, stored)
        if row is None or stored is None or not verdict.ok:
            logger.info("sign-in refused", extra={"user_id": row["id"] if row is not None else None})
            raise CredentialsInvalid
        user = UserRead.model_validate(row)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            if verdict.new_hash is not None:
                await repository.replace_hash(user.id, old=stored, new=verdict.new_hash, now=clock.now())
            preferred = repository.last_workspace(user.id)
            workspace = await UnscopedWorkspaces(unit).find_home(user.id, preferred=preferred)
            if workspace is None:
                raise NoWorkspace
            session_id, refresh_token = await self._open_session(repository, user.id, workspace.id, user_agent)
        logger.info("signed in", extra={"user_id": user.id, "session_id": session_id})
        return self._answer(user, workspace, session_id=session_id, refresh_token=refresh_token)

    async def refresh(self, refresh_token: str, *, user_agent: str | None = None) -> TokenAnswer:
        """Exchange a refresh token for its successor and a new access token.

        Raises `RefreshInvalid`, `SessionRevoked`, `SessionExpired`, `SessionUnknown`. A token that was used before
        and is past its grace revokes the session.
        """
        presented = self._refresh_tokens.parse(refresh_token)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            row = await repository.find_session(presented.session_id)
            if row is None:
                raise RefreshInvalid
            self._refresh_tokens.verify(presented, salt=row["salt"])
            if row["role"] is None:
                raise SessionRevoked
            outcome, counter = await repository.rotate(
                presented.session_id,
                presented.counter,
                user_agent=_shortened(user_agent),
                now=clock.now(),
                limits=self._limits,
            )
            if outcome is Rotation.REUSED:
                unit.after_commit(lambda: self._authenticator.forget(presented.session_id))
        # The transaction has committed: a revocation holds before anyone hears of it.
        if outcome is Rotation.REUSED:
            about = {"user_id": row["id"], "session_id": presented.session_id}
            logger.warning("a refresh token was used again: session revoked", extra=about)
        if outcome in _REFUSALS:
            raise _REFUSALS[outcome]
        return self._answer(
            UserRead.model_validate(row),
            WorkspaceRead(id=row["workspace_id"], name=row["workspace_name"], role=row["role"]),
            session_id=presented.session_id,
            refresh_token=self._refresh_tokens.make(presented.session_id, counter, salt=row["salt"]),
        )

    async def sign_out(self, access_token: str | None, *, refresh_token: str | None = None) -> None:
        """End the session of either token, at once. Signing out twice is no error.

        Raises `Unauthenticated` if neither token is one of ours.
        """
        session_id = await self._session_of_refresh_token(refresh_token) if refresh_token else None
        if session_id is None:
            session_id = self._tokens.verify(access_token).session_id if access_token else None
        if session_id is None:
            raise RefreshInvalid if refresh_token else Unauthenticated
        async with self._database.system_unit_of_work() as unit:
            ended = await UnscopedIdentityRepository(unit).revoke(session_id, reason="sign_out", now=clock.now())
            unit.after_commit(lambda: self._authenticator.forget(session_id))
        if ended:
            logger.info("signed out", extra={"session_id": session_id})

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

    async def _find_user(self, email: str) -> RowMapping | None:
        try:
            _, norm = email_address.parse(email)
        except EmailInvalid:
            return None
        async with self._database.system_unit_of_work() as unit:
            return await UnscopedIdentityRepository(unit).find_user(norm)

    async def _account(self, repository: AccountRepository) -> MeRead:
        row = await repository.get()
        if row is None:
            raise SessionRevoked
        workspace = WorkspaceRead(id=row["workspace_id"], name=row["workspace_name"], role=row["role"])
        user = UserRead.model_validate(row)
        return MeRead(**user.model_dump(), workspace=workspace)

    async def _session_of_refresh_token(self, refresh_token: str) -> UUID | None:
        try:
            presented = self._refresh_tokens.parse(refresh_token)
            async with self._database.system_unit_of_work() as unit:
                row = await UnscopedIdentityRepository(unit).find_session(presented.session_id)
            if row is None:
                return None
            # Any generation may end its session: the most that a stolen old token does here is what reuse does.
            self._refresh_tokens.verify(presented, salt=row["salt"])
        except RefreshInvalid:
            return None
        return presented.session_id

    async def _open_session(
        self, repository: UnscopedIdentityRepository, user_id: UUID, workspace_id: UUID, user_agent: str | None
    ) -> tuple[UUID, str]:
        session_id, salt = new_id(), secrets.token_bytes(_SALT_BYTES)
        await repository.add_session(
            id=session_id,
            user_id=user_id,
            workspace_id=workspace_id,
            salt=salt,
            user_agent=_shortened(user_agent),
            now=clock.now(),
            limits=self._limits,
        )
        return session_id, self._refresh_tokens.make(session_id, 0, salt=salt)

    def _answer(self, user: UserRead, workspace: WorkspaceRead, *, session_id: UUID, refresh_token: str) -> TokenAnswer:
        issued = self._tokens.issue(user.id, workspace.id, session_id)
        return TokenAnswer(
            user=user,
            workspace=workspace,
            access_token=issued.token,
            token_type="bearer",  # noqa: S106 - the kind, no token
            expires_in=issued.expires_in,
            refresh_token=refresh_token,
        )


def _shortened(user_agent: str | None) -> str | None:
    return user_agent.replace("\x00", "")[:_USER_AGENT_LENGTH] if user_agent else None
