"""SQL of sessions: before there is a scope, and past all workspaces."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import CursorResult, Executable, RowMapping, ScalarSelect, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.identity.models import Session, User
from parley.tenancy.service import membership_places

USER = (col(User.id), col(User.email), col(User.name), col(User.email_verified))


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


class UnscopedSessionRepository:
    """Sessions of anyone. Takes a unit of work of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    @staticmethod
    def last_workspace(user_id: UUID) -> ScalarSelect[UUID]:
        """Return the expression for the workspace of a user's most recently used session."""
        newest = select(col(Session.workspace_id)).where(col(Session.user_id) == user_id)
        return newest.order_by(col(Session.rotated_at).desc()).limit(1).scalar_subquery()

    async def add(
        self,
        *,
        id: UUID,
        user_id: UUID,
        workspace_id: UUID,
        salt: bytes,
        cookie: bool,
        address: str | None,
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
                cookie=cookie,
                address=address,
                user_agent=user_agent,
                created_at=now,
                rotated_at=now,
                last_used_at=now,
                idle_expires_at=now + min(limits.idle, limits.absolute),
                absolute_expires_at=now + limits.absolute,
            )
        )

    async def find(self, session_id: UUID) -> RowMapping | None:
        """Return a session with its user and, unless the membership is gone, `workspace_name` and `role`."""
        place = membership_places()
        statement = (
            select(
                *USER,
                col(User.disabled_at),
                col(Session.workspace_id),
                col(Session.salt),
                col(Session.cookie),
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
                col(Session.last_used_at),
                col(User.disabled_at),
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

    async def touch(self, session_id: UUID, *, now: datetime) -> None:
        """Note that a session is in use."""
        await self._execute(update(Session).where(col(Session.id) == session_id).values(last_used_at=now))

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
                last_used_at=now,
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

    async def move(self, session_id: UUID, workspace_id: UUID, *, now: datetime) -> tuple[int, bytes, bool] | None:
        """Put a session into another workspace, its refresh token exchanged; return counter, salt and mode."""
        moved = await self._execute(
            update(Session)
            .where(col(Session.id) == session_id, col(Session.revoked_at).is_(None))
            .values(workspace_id=workspace_id, counter=col(Session.counter) + 1, rotated_at=now, last_used_at=now)
            .returning(col(Session.counter), col(Session.salt), col(Session.cookie))
        )
        row = moved.one_or_none()
        return None if row is None else (row.counter, row.salt, row.cookie)

    async def revoke(self, session_id: UUID, *, reason: str, now: datetime, user_id: UUID | None = None) -> bool:
        """End a session, if `user_id` is given only that user's; False if it was ended already or does not exist."""
        mine = [col(Session.user_id) == user_id] if user_id is not None else []
        statement = (
            update(Session)
            .where(col(Session.id) == session_id, col(Session.revoked_at).is_(None), *mine)
            .values(revoked_at=now, revoke_reason=reason)
            .returning(col(Session.id))
        )
        return (await self._execute(statement)).scalar_one_or_none() is not None

    async def revoke_all(self, user_id: UUID, *, reason: str, now: datetime, but: UUID | None = None) -> list[UUID]:
        """End every session of a user but one; return those that it ended."""
        others = [col(Session.id) != but] if but is not None else []
        statement = (
            update(Session)
            .where(col(Session.user_id) == user_id, col(Session.revoked_at).is_(None), *others)
            .values(revoked_at=now, revoke_reason=reason)
            .returning(col(Session.id))
        )
        return list((await self._execute(statement)).scalars())

    async def list(self, user_id: UUID, page: PageRequest, *, now: datetime) -> tuple[list[RowMapping], int]:
        """Return a page of a user's sessions that hold, the last used first, and how many there are."""
        place = membership_places()
        holds = (
            col(Session.user_id) == user_id,
            col(Session.revoked_at).is_(None),
            col(Session.idle_expires_at) > now,
            col(Session.absolute_expires_at) > now,
        )
        total = (await self._execute(select(func.count()).select_from(Session).where(*holds))).scalar_one()
        statement = (
            select(
                col(Session.id),
                col(Session.user_agent),
                col(Session.address),
                col(Session.cookie),
                col(Session.created_at),
                col(Session.last_used_at),
                func.least(col(Session.idle_expires_at), col(Session.absolute_expires_at)).label("expires_at"),
                col(Session.workspace_id),
                place.c.name.label("workspace_name"),
                place.c.role,
            )
            .outerjoin(
                place,
                (place.c.user_id == col(Session.user_id)) & (place.c.workspace_id == col(Session.workspace_id)),
            )
            .where(*holds)
            .order_by(col(Session.last_used_at).desc(), col(Session.id).desc())
            .limit(page.per_page)
            .offset(page.offset)
        )
        return list((await self._execute(statement)).mappings().all()), int(total)

    async def _execute(self, statement: Executable) -> CursorResult[Any]:
        return await (await self._unit.connection()).execute(statement)


_GO_HOME = """
    UPDATE sessions s SET workspace_id = home.workspace_id
    FROM (
        SELECT DISTINCT ON (m.user_id) m.user_id, m.workspace_id
        FROM memberships m JOIN workspaces w ON w.id = m.workspace_id
        WHERE m.workspace_id <> $1 ORDER BY m.user_id, w.personal DESC, m.created_at, m.workspace_id
    ) home
    WHERE s.workspace_id = $1 AND s.user_id = home.user_id AND ($2::uuid IS NULL OR s.user_id = $2)
"""


async def leave_workspace(unit: UnitOfWork, workspace_id: UUID, user_id: UUID | None) -> None:
    """Have sessions go on in another workspace of their users, before a member goes or the workspace does.

    Their access tokens stop, the next refresh gives one for the other workspace. Takes a unit of the system role.
    """
    connection = await unit.driver()
    await connection.execute(_GO_HOME, workspace_id, user_id)
