"""Sessions: opened at sign-in, kept alive by refresh tokens, moved between workspaces, ended everywhere at once."""

import logging
import secrets
from uuid import UUID

from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.errors import NotFound, Unauthenticated
from parley.core.ids import new_id
from parley.core.origin import current_origin
from parley.core.pagination import PageRequest
from parley.core.rate_limits import Limit, RateLimits
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Scope
from parley.identity.errors import (
    RefreshInvalid,
    SessionExpired,
    SessionNotFound,
    SessionRevoked,
    SessionUnknown,
)
from parley.identity.mails import Template, queue_mail
from parley.identity.refresh import RefreshTokens
from parley.identity.repository import UnscopedIdentityRepository
from parley.identity.schemas import SessionRead, TokenAnswer, UserRead
from parley.identity.session_repository import Rotation, SessionLimits, UnscopedSessionRepository
from parley.identity.tokens import AccessTokens
from parley.tenancy.audit import Action, record
from parley.tenancy.schemas import WorkspaceRead
from parley.tenancy.service import UnscopedWorkspaces

logger = logging.getLogger(__name__)

_SALT_BYTES = 16

_REFUSALS: dict[Rotation, type[Unauthenticated]] = {
    Rotation.REVOKED: SessionRevoked,
    Rotation.REUSED: SessionRevoked,
    Rotation.EXPIRED: SessionExpired,
    Rotation.AHEAD: SessionUnknown,
}


class SessionService:
    """Opens, refreshes, moves and ends sessions. Each method but `open` is whole: it has its own transactions."""

    def __init__(
        self,
        database: Database,
        *,
        tokens: AccessTokens,
        refresh_tokens: RefreshTokens,
        revocations: Revocations,
        limits: SessionLimits,
        rates: RateLimits,
        refresh_per_minute: int,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._refresh_tokens = refresh_tokens
        self._revocations = revocations
        self.limits = limits
        self._rates = rates
        self._refreshes = Limit("refresh", refresh_per_minute, 60)

    async def open(
        self, unit: UnitOfWork, user: UserRead, workspace: WorkspaceRead, *, how: str, cookie: bool = False
    ) -> TokenAnswer:
        """Open a session in the unit's transaction, of the system role; return its tokens.

        `how` someone got in stands in the audit log. `cookie`: the refresh token will be kept in one, for ever.
        """
        session_id, salt = new_id(), secrets.token_bytes(_SALT_BYTES)
        origin = current_origin()
        await UnscopedSessionRepository(unit).add(
            id=session_id,
            user_id=user.id,
            workspace_id=workspace.id,
            salt=salt,
            cookie=cookie,
            address=origin.address,
            user_agent=origin.user_agent,
            now=clock.now(),
            limits=self.limits,
        )
        await record(
            unit,
            Action.SESSION_STARTED,
            workspace_id=workspace.id,
            user_id=user.id,
            credential_id=session_id,
            target=str(session_id),
            details={"how": how},
        )
        refresh_token = self._refresh_tokens.make(session_id, 0, salt=salt)
        return self._answer(user, workspace, session_id=session_id, refresh_token=refresh_token)

    async def refresh(self, refresh_token: str, *, cookie: bool = False) -> TokenAnswer:
        """Exchange a refresh token for its successor and a new access token.

        `cookie` says where the token came from, which must be where its session keeps it. Raises `RefreshInvalid`,
        `SessionRevoked`, `SessionExpired`, `SessionUnknown`, `TooMany`. A token that was used before and is past its
        grace revokes the session, of which its user is told by mail.
        """
        presented = self._refresh_tokens.parse(refresh_token)
        await self._rates.hit(self._refreshes, str(presented.session_id))
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedSessionRepository(unit)
            row = await repository.find(presented.session_id)
            if row is None:
                raise RefreshInvalid
            self._refresh_tokens.verify(presented, salt=row["salt"])
            if row["cookie"] != cookie:
                raise RefreshInvalid
            if row["role"] is None or row["disabled_at"] is not None:
                raise SessionRevoked
            outcome, counter = await repository.rotate(
                presented.session_id,
                presented.counter,
                user_agent=current_origin().user_agent,
                now=clock.now(),
                limits=self.limits,
            )
            about = {"user_id": row["id"], "credential_id": presented.session_id}
            if outcome is Rotation.REUSED:
                await record(
                    unit,
                    Action.SESSION_REUSED,
                    workspace_id=row["workspace_id"],
                    outcome="failure",
                    target=str(presented.session_id),
                    **about,
                )
                await self._revocations.announce(unit, Revocation("session", presented.session_id))
                await queue_mail(unit, Template.SESSION_REUSED, user_id=row["id"])
        # The transaction has committed: a revocation holds before anyone hears of it.
        if outcome is Rotation.REUSED:
            logger.warning("a refresh token was used again: session revoked", extra=about)
        if outcome in _REFUSALS:
            raise _REFUSALS[outcome]
        return self._answer(
            UserRead.model_validate(row),
            WorkspaceRead(id=row["workspace_id"], name=row["workspace_name"], role=row["role"]),
            session_id=presented.session_id,
            refresh_token=self._refresh_tokens.make(presented.session_id, counter, salt=row["salt"]),
        )

    async def session_of(self, refresh_token: str) -> UUID | None:
        """Return whose session a refresh token is of, of any generation; None for one that is not ours."""
        try:
            presented = self._refresh_tokens.parse(refresh_token)
            async with self._database.system_unit_of_work() as unit:
                row = await UnscopedSessionRepository(unit).find(presented.session_id)
            if row is None:
                return None
            # Any generation may end its session: the most that a stolen old token does here is what reuse does.
            self._refresh_tokens.verify(presented, salt=row["salt"])
        except RefreshInvalid:
            return None
        return presented.session_id

    async def sign_out(self, access_token: str | None, *, refresh_token: str | None = None) -> None:
        """End the session of either token, at once. Signing out twice is no error.

        Raises `Unauthenticated` if neither token is one of ours.
        """
        session_id = await self.session_of(refresh_token) if refresh_token else None
        if session_id is None:
            session_id = self._tokens.verify(access_token).session_id if access_token else None
        if session_id is None:
            raise RefreshInvalid if refresh_token else Unauthenticated
        async with self._database.system_unit_of_work() as unit:
            row = await UnscopedSessionRepository(unit).find(session_id)
            ended = await UnscopedSessionRepository(unit).revoke(session_id, reason="sign_out", now=clock.now())
            if ended and row is not None:
                await record(
                    unit,
                    Action.SESSION_ENDED,
                    workspace_id=row["workspace_id"],
                    user_id=row["id"],
                    credential_id=session_id,
                    target=str(session_id),
                )
            await self._revocations.announce(unit, Revocation("session", session_id))
        if ended:
            logger.info("signed out", extra={"session_id": session_id})

    async def list(self, scope: Scope, page: PageRequest) -> tuple[list[SessionRead], int]:
        """Return a page of the caller's sessions in all workspaces, the last used first, and how many there are."""
        async with self._database.system_unit_of_work() as unit:
            rows, total = await UnscopedSessionRepository(unit).list(scope.user_id, page, now=clock.now())
        return [
            SessionRead(
                id=row["id"],
                device=device_of(row["user_agent"]),
                user_agent=row["user_agent"],
                address=row["address"],
                cookie=row["cookie"],
                created_at=row["created_at"],
                last_used_at=row["last_used_at"],
                expires_at=row["expires_at"],
                current=row["id"] == scope.session_id,
                workspace=WorkspaceRead(id=row["workspace_id"], name=row["workspace_name"], role=row["role"])
                if row["role"] is not None
                else None,
            )
            for row in rows
        ], total

    async def revoke(self, scope: Scope, session_id: UUID) -> None:
        """End one of the caller's sessions everywhere. Raises `SessionNotFound`, also for one that has ended."""
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedSessionRepository(unit)
            if not await repository.revoke(session_id, reason="revoked", now=clock.now(), user_id=scope.user_id):
                raise SessionNotFound
            await record(unit, Action.SESSION_REVOKED, scope=scope, target=str(session_id))
            await self._revocations.announce(unit, Revocation("session", session_id))

    async def revoke_all(self, scope: Scope, *, keep_current: bool) -> None:
        """End the caller's sessions everywhere, and with them what other issuers' tokens may do.

        `keep_current` leaves the one that asks.
        """
        async with self._database.system_unit_of_work() as unit:
            keep = scope.session_id if keep_current else None
            await self.end_all(unit, scope.user_id, reason="revoked", but=keep, scope=scope)

    async def end_all(
        self, unit: UnitOfWork, user_id: UUID, *, reason: str, but: UUID | None = None, scope: Scope | None = None
    ) -> None:
        """End every session of a user but one, in the unit's transaction of the system role."""
        now = clock.now()
        ended = await UnscopedSessionRepository(unit).revoke_all(user_id, reason=reason, now=now, but=but)
        await UnscopedIdentityRepository(unit).refuse_tokens_before(user_id, now)
        for session_id in ended:
            await self._revocations.announce(unit, Revocation("session", session_id))
        if but is None:
            await self._revocations.announce(unit, Revocation("user", user_id))
        await record(
            unit,
            Action.SESSION_REVOKED,
            scope=scope,
            user_id=user_id,
            actor=None if scope else "system",
            target="all" if but is None else "others",
            details={"reason": reason, "sessions": len(ended)},
        )

    async def switch(self, scope: Scope, workspace_id: UUID) -> tuple[TokenAnswer, bool]:
        """Put the caller's session into another of their workspaces; return new tokens and whether for a cookie.

        The old tokens stop at once, and what is open in their name closes. Raises `NotFound` for a workspace that the
        caller is not in, `SessionRevoked`, and `Unauthenticated` for a credential that is no session.
        """
        if scope.session_id is None:
            raise Unauthenticated("Only a session can be switched.")
        async with self._database.system_unit_of_work() as unit:
            place = await UnscopedWorkspaces(unit).find_place(scope.user_id, workspace_id)
            if place is None:
                raise NotFound
            moved = await UnscopedSessionRepository(unit).move(scope.session_id, workspace_id, now=clock.now())
            user = await UnscopedIdentityRepository(unit).find_user_by_id(scope.user_id)
            if moved is None or user is None:
                raise SessionRevoked
            counter, salt, cookie = moved
            await record(
                unit, Action.SESSION_SWITCHED, scope=scope, workspace_id=workspace_id, target=str(workspace_id)
            )
            await self._revocations.announce(unit, Revocation("switch", scope.session_id, workspace_id))
        refresh_token = self._refresh_tokens.make(scope.session_id, counter, salt=salt)
        answer = self._answer(
            UserRead.model_validate(user), place, session_id=scope.session_id, refresh_token=refresh_token
        )
        return answer, cookie

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


# The first that a user agent names, from the particular to what all of them say.
_BROWSERS = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Safari/", "Safari"))
_SYSTEMS = (
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Android", "Android"),
    ("Windows", "Windows"),
    ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"),
    ("Linux", "Linux"),
)


def device_of(user_agent: str | None) -> str:
    """Return what a person would call the device: `Firefox on Windows`, or the first word of what is no browser."""
    if not user_agent:
        return "Unknown device"
    browser = next((name for mark, name in _BROWSERS if mark in user_agent), None)
    system = next((name for mark, name in _SYSTEMS if mark in user_agent), None)
    if browser and system:
        return f"{browser} on {system}"
    return browser or system or user_agent.split("/")[0].split(" ")[0][:60]
