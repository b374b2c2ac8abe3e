"""SQL of assistants."""

from typing import Any
from uuid import UUID

from sqlalchemy import Table, delete, func, select, update
from sqlalchemy.engine import RowMapping

from parley.chat.assistants.errors import AssistantNotFound, VersionIsOld
from parley.chat.assistants.models import Assistant
from parley.core import clock
from parley.core.repository import ScopedRepository

_table: Table = Assistant.__table__  # type: ignore[attr-defined]  # SQLModel does not type it
_column = _table.c

LIMIT = 100


class AssistantRepository(ScopedRepository[Assistant]):
    """The assistants of a workspace: every member sees them."""

    model = Assistant
    not_found = AssistantNotFound

    async def list(self) -> list[RowMapping]:
        """Return all of them, by name."""
        connection = await self._unit.connection()
        statement = self._select().order_by(_column.name).limit(LIMIT)
        return list((await connection.execute(statement)).mappings().all())

    async def count(self) -> int:
        """Return how many there are."""
        connection = await self._unit.connection()
        statement = select(func.count()).select_from(_table).where(self._visible())
        return int((await connection.execute(statement)).scalar_one())

    async def find_named(self, name: str) -> RowMapping | None:
        """Return the one with a name, or None."""
        connection = await self._unit.connection()
        statement = self._select().where(_column.name == name)
        return (await connection.execute(statement)).mappings().one_or_none()

    async def update(self, id: UUID, values: dict[str, Any], *, version: int | None) -> RowMapping:
        """Change columns and count the change. Raises `AssistantNotFound`; `VersionIsOld` where `version` is not it."""
        connection = await self._unit.connection()
        where = [self._visible(), _column.id == id]
        if version is not None:
            where.append(_column.version == version)
        statement = (
            update(_table)
            .where(*where)
            .values(**values, version=_column.version + 1, updated_at=clock.now())
            .returning(*_column)
        )
        row = (await connection.execute(statement)).mappings().one_or_none()
        if row is None:
            await self.get(id)
            raise VersionIsOld
        return row

    async def delete(self, id: UUID) -> None:
        """Remove one, or raise."""
        connection = await self._unit.connection()
        statement = delete(_table).where(self._visible(), _column.id == id).returning(_column.id)
        if (await connection.execute(statement)).one_or_none() is None:
            raise AssistantNotFound
