"""SQL of API keys."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, RowMapping, Table, and_, or_, select, update
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.repository import ScopedRepository
from parley.identity.errors import ApiKeyNotFound
from parley.identity.models import ApiKey, User
from parley.tenancy.service import membership_places

_table: Table = ApiKey.__table__  # type: ignore[attr-defined]  # SQLModel does not type it
_column = _table.c


class ApiKeyRepository(ScopedRepository[ApiKey]):
    """The keys that the scope's user has made in the scope's workspace and not revoked."""

    model = ApiKey
    not_found = ApiKeyNotFound

    def _visible(self) -> ColumnElement[bool]:
        own = and_(_column.user_id == self._scope.user_id, _column.revoked_at.is_(None))
        return and_(super()._visible(), own)

    async def list(self, page: PageRequest) -> tuple[list[RowMapping], int]:
        """Return one page, newest first, and how many there are in all."""
        return await self.page(page, order_by=(_column.id.desc(),))

    async def revoke(self, id: UUID, *, now: datetime) -> None:
        """End a key. Raises `ApiKeyNotFound`, also where it was ended before."""
        connection = await self._unit.connection()
        statement = update(_table).where(self._visible(), _column.id == id).values(revoked_at=now)
        if (await connection.execute(statement)).rowcount == 0:
            raise ApiKeyNotFound


class UnscopedApiKeyRepository:
    """A key before there is a scope. Takes a unit of work of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    async def find_standing(self, workspace_id: UUID, id: UUID) -> RowMapping | None:
        """Return a key with its maker's `role` now and `disabled_at`; None where the maker is a member no more."""
        place = membership_places()
        statement = (
            select(
                _column.user_id,
                _column.hash,
                _column.scopes,
                _column.expires_at,
                _column.revoked_at,
                _column.last_used_at,
                place.c.role,
                col(User.disabled_at),
            )
            .join(place, and_(place.c.workspace_id == _column.workspace_id, place.c.user_id == _column.user_id))
            .join(User, col(User.id) == _column.user_id)
            .where(_column.workspace_id == workspace_id, _column.id == id)
        )
        connection = await self._unit.connection()
        return (await connection.execute(statement)).mappings().one_or_none()

    async def touch(self, workspace_id: UUID, id: UUID, *, hash: bytes, now: datetime, unless_since: datetime) -> None:
        """Note that a key is used, with its hash by the current secret, unless that was noted since then."""
        connection = await self._unit.connection()
        await connection.execute(
            update(_table)
            .where(
                _column.workspace_id == workspace_id,
                _column.id == id,
                or_(_column.last_used_at.is_(None), _column.last_used_at < unless_since),
            )
            .values(last_used_at=now, hash=hash)
        )
