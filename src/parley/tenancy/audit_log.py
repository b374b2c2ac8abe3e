"""Reading the audit log of a workspace."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.repository import ScopedRepository
from parley.core.scope import Scope
from parley.tenancy.models import AuditEvent
from parley.tenancy.schemas import AuditEventRead

_COLUMNS = AuditEvent.__table__.c  # type: ignore[attr-defined]  # SQLModel does not type __table__


class AuditRepository(ScopedRepository[AuditEvent]):
    """The workspace's events."""

    model = AuditEvent


class AuditLog:
    """Shows what happened, newest first."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._repository = AuditRepository(unit, scope)

    async def page(
        self,
        page: PageRequest,
        *,
        action: str | None = None,
        user_id: UUID | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> tuple[list[AuditEventRead], int]:
        """Return a page and how many there are. `since` is in it, `until` is not."""
        where: list[ColumnElement[bool]] = []
        if action is not None:
            where.append(col(AuditEvent.action) == action)
        if user_id is not None:
            where.append(col(AuditEvent.user_id) == user_id)
        if since is not None:
            where.append(col(AuditEvent.at) >= since)
        if until is not None:
            where.append(col(AuditEvent.at) < until)
        rows, total = await self._repository.page(page, *where, order_by=(_COLUMNS.id.desc(),))
        return [AuditEventRead.model_validate(dict(row)) for row in rows], total
