"""SQL of users, passwords and sessions."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import CursorResult, Executable, RowMapping, ScalarSelect, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.identity.models import PasswordCredential, Session, User
from parley.tenancy.service import membership_places

_USER = (col(User.id), col(User.email), col(User.name), col(User.email_verified))


class Rotation(StrEnum):
    """What presenting a refresh token came to."""

    ROTATED = "rotated"
    REPEATED = "repeated"  # within grace: the current token once more
    REVOKED = "revoked"
    EXPIRED = "expired"
    AHEAD = "ahead"
    REUSED = "reused"


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How long sessions live, and how long a token's parent still gets it."""

    idle: timedelta
    absolute: timedelta
    grace: timedelta


class UnscopedIdentityRepository:
    """Users and sessions before there is a scope. Takes a unit of work of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    async def add_user(self, *, id: UUID, email: str, email_norm: str, name: str | None) -> bool:
        """Add a user; False if the address is taken, also by a sign-up that commits at this moment."""
        statement = (
            insert(User)
            .values(id=id, email=email, email_norm=email_norm, name=name, email_verified=False)
            .on_conflict_do_nothing(index_elements=["email_norm"])
            .returning(col(User.id))
        )
        return (await self._execute(statement)).scalar_one_or_none() is not None

    async def add_password(self, user_id: UUID, password_hash: str) -> None:
        """Store a new user's password."""
        await self._execute(insert(PasswordCredential).values(user_id=user_id, password_hash=password_hash))

    async def replace_hash(self, user_id: UUID, *, old: str, new: str, now: datetime) -> None:
        """Replace a hash by one of the current kind, unless the password was changed meanwhile."""
        await self._execute(
            update(PasswordCredential)
            .where(col(PasswordCredential.user_id) == user_id, col(PasswordCredential.password_hash) == old)
            .values(password_hash=new, updated_at=now)
        )

    async def find_user(self, email_norm: str) -> RowMapping | None:
        """Return a user by address, with `password_hash`."""
        statement = (
            select(*_USER, col(PasswordCredential.password_hash))
            .outerjoin(PasswordCredential, col(PasswordCredential.user_id) == col(User.id))
            .where(col(User.email_norm) == email_norm)
        )
        return (await self._execute(statement)).mappings().one_or_none()

    @staticmethod
    def last_workspace(user_id: UUID) -> ScalarSelect[UUID]:
        """Return the expression for the workspace of a user's most recently used session."""
        newest = select(col(Session.workspace_id)).where(col(Session.user_id) == user_id)
        return newest.order_by(col(Session.rotated_at).desc()).limit(1).scalar_subquery()

    async def add_session(
        self,
        *,
        id: UUID,
        user_id: UUID,
        workspace_id: UUID,
        salt: bytes,
        user_agent: str | None,
        now: datetime,
        limits: SessionLimits,
    ) -> None:
        """Add a session at counter 0."""
        await self._execute(
            insert(Session).values(
                id=id,
                user_id=user_id,
                workspace_id=workspace_id,
                counter=0,
                salt=salt,
                user_agent=user_agent,
                created_at=now,
                rotated_at=now,
                idle_expires_at=now + min(limits.idle, limits.absolute),
                absolute_expires_at=now + limits.absolute,
            )
        )

    async def find_session(self, session_id: UUID) -> RowMapping | None:
        """Return a session with its user and, unless the membership is gone, `workspace_name` and `role`."""
        place = membership_places()
        statement = (
            select(
                *_USER,
                col(Session.workspace_id),
                col(Session.salt),
                place.c.name.label("workspace_name"),
                place.c.role,
            )
            .join(User, col(User.id) == col(Session.user_id))
            .outerjoin(
                place,
                (place.c.user_id == col(Session.user_id)) & (place.c.workspace_id == col(Session.workspace_id)),
            )
            .where(col(Session.id) == session_id)
        )
        return (await self._execute(statement)).mappings().one_or_none()

    async def find_standing(self, session_id: UUID) -> RowMapping | None:
        """Return what authentication asks of a session: whose, where, until when, and the role or None."""
        place = membership_places()
        statement = (
            select(
                col(Session.user_id),
                col(Session.workspace_id),
                col(Session.revoked_at),
                col(Session.idle_expires_at),
                col(Session.absolute_expires_at),
                place.c.role,
            )
            .outerjoin(
                place,
                (place.c.user_id == col(Session.user_id)) & (place.c.workspace_id == col(Session.workspace_id)),
            )
            .where(col(Session.id) == session_id)
        )
        return (await self._execute(statement)).mappings().one_or_none()

    async def rotate(
        self, session_id: UUID, counter: int, *, user_agent: str | None, now: datetime, limits: SessionLimits
    ) -> tuple[Rotation, int]:
        """Exchange a refresh token whose MAC was verified; return what came of it and the session's counter.

        A compare-and-swap on the counter: of any number that present the same token one advances it. The others get
        the same successor within the grace. Anything older revokes the session, in this transaction, which the caller
        must let commit before it refuses.
        """
        idle = now + limits.idle
        swapped = await self._execute(
            update(Session)
            .where(
                col(Session.id) == session_id,
                col(Session.counter) == counter,
                col(Session.revoked_at).is_(None),
                col(Session.idle_expires_at) > now,
                col(Session.absolute_expires_at) > now,
            )
            .values(
                counter=counter + 1,
                rotated_at=now,
                user_agent=user_agent,
                # Never past the absolute limit, which nothing extends.
                idle_expires_at=func.least(idle, col(Session.absolute_expires_at)),
            )
            .returning(col(Session.counter))
        )
        advanced = swapped.scalar_one_or_none()
        if advanced is not None:
            return Rotation.ROTATED, advanced
        return await self._refuse_or_repeat(session_id, counter, user_agent=user_agent, now=now, grace=limits.grace)

    async def _refuse_or_repeat(
        self, session_id: UUID, counter: int, *, user_agent: str | None, now: datetime, grace: timedelta
    ) -> tuple[Rotation, int]:
        statement = select(Session.__table__).where(col(Session.id) == session_id).with_for_update()  # type: ignore[attr-defined]  # SQLModel does not type __table__
        row: Any = (await self._execute(statement)).one()
        if row.revoked_at is not None:
            return Rotation.REVOKED, row.counter
        if now >= min(row.idle_expires_at, row.absolute_expires_at):
            return Rotation.EXPIRED, row.counter
        if counter > row.counter:
            return Rotation.AHEAD, row.counter
        if counter == row.counter - 1 and now < row.rotated_at + grace and user_agent == row.user_agent:
            return Rotation.REPEATED, row.counter
        await self.revoke(session_id, reason="reuse", now=now)
        return Rotation.REUSED, row.counter

    async def revoke(self, session_id: UUID, *, reason: str, now: datetime) -> bool:
        """End a session; False if it was ended already or does not exist."""
        statement = (
            update(Session)
            .where(col(Session.id) == session_id, col(Session.revoked_at).is_(None))
            .values(revoked_at=now, revoke_reason=reason)
            .returning(col(Session.id))
        )
        return (await self._execute(statement)).scalar_one_or_none() is not None

    async def _execute(self, statement: Executable) -> CursorResult[Any]:
        return await (await self._unit.connection()).execute(statement)


class AccountRepository:
    """The caller's own user and workspace, as the caller's scope sees them."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    async def get(self) -> RowMapping | None:
        """Return the caller with `workspace_name` and `role`."""
        place = membership_places()
        statement = (
            select(*_USER, place.c.workspace_id, place.c.name.label("workspace_name"), place.c.role)
            .join(place, place.c.user_id == col(User.id))
            .where(col(User.id) == self._scope.user_id, place.c.workspace_id == self._scope.workspace_id)
        )
        connection = await self._unit.connection()
        return (await connection.execute(statement)).mappings().one_or_none()

    async def rename(self, name: str | None) -> None:
        """Change the caller's name."""
        connection = await self._unit.connection()
        await connection.execute(update(User).where(col(User.id) == self._scope.user_id).values(name=name))
