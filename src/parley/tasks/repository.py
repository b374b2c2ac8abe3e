"""The SQL of tasks: rows that have an owner. Nobody sees another user's, in the same workspace or elsewhere."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Table, and_, bindparam, delete, func, or_, select, update
from sqlalchemy.engine import RowMapping

from parley.core.pagination import PageRequest
from parley.core.repository import Prepared, ScopedRepository
from parley.tasks.errors import TaskNotFound
from parley.tasks.models import Task

_table: Table = Task.__table__  # type: ignore[attr-defined]  # SQLModel does not type it
_column = _table.c

# The read that happens most. Built once: putting it together for each call is a fifth of what such a request costs.
# The parameters have no values of their own, so a call that leaves one out fails.
_BY_ID = Prepared(
    select(*_column).where(
        _column.workspace_id == bindparam("workspace_id"),
        _column.user_id == bindparam("user_id"),
        _column.id == bindparam("id"),
    )
)


class TaskRepository(ScopedRepository[Task]):
    """The tasks of the scope's user in the scope's workspace."""

    model = Task
    not_found = TaskNotFound

    def _visible(self) -> ColumnElement[bool]:
        return and_(super()._visible(), _column.user_id == self._scope.user_id)

    async def find(self, id: UUID, *, lock: bool = False) -> Mapping[str, Any] | RowMapping | None:
        """Return the row, or None. `lock`: until the transaction ends, nobody else changes it."""
        if lock:
            return await super().find(id, lock=True)
        scope = self._scope
        return await _BY_ID.one_or_none(self._unit, workspace_id=scope.workspace_id, user_id=scope.user_id, id=id)

    async def list(self, page: PageRequest, *, completed: bool | None = None) -> tuple[Sequence[RowMapping], int]:
        """Return one page, newest first, and how many there are in all."""
        where = () if completed is None else (_column.completed.is_(completed),)
        return await self.page(page, *where, order_by=(_column.id.desc(),))

    async def newest(self, limit: int) -> Sequence[RowMapping]:
        """Return the newest tasks, newest first."""
        connection = await self._unit.connection()
        result = await connection.execute(self._select().order_by(_column.id.desc()).limit(limit))
        return result.mappings().all()

    async def open_or_completed_since(self, since: datetime, *, limit: int) -> Sequence[RowMapping]:
        """Return the open tasks and the ones completed (or changed while completed) since then, newest first."""
        wanted = or_(_column.completed.is_(False), _column.updated_at >= since)
        connection = await self._unit.connection()
        result = await connection.execute(self._select().where(wanted).order_by(_column.id.desc()).limit(limit))
        return result.mappings().all()

    async def update(self, id: UUID, changes: Mapping[str, Any]) -> RowMapping:
        """Change columns of a task and return the row as it now is. Raises `TaskNotFound`."""
        statement = (
            update(_table)
            .where(self._visible(), _column.id == id)
            .values(**changes, updated_at=func.now())
            .returning(*_column)
        )
        connection = await self._unit.connection()
        row = (await connection.execute(statement)).mappings().one_or_none()
        if row is None:
            raise TaskNotFound
        return row

    async def delete(self, id: UUID) -> None:
        """Remove a task. Raises `TaskNotFound`."""
        connection = await self._unit.connection()
        result = await connection.execute(delete(_table).where(self._visible(), _column.id == id))
        if result.rowcount == 0:
            raise TaskNotFound
