"""The SQL of jobs as their users see them. What works them off is in `queue.py`."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Table, and_
from sqlalchemy.engine import RowMapping

from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.repository import ScopedRepository
from parley.core.scope import Scope
from parley.jobs.errors import JobNotFound
from parley.jobs.models import Job
from parley.jobs.registry import JobRegistry

_table: Table = Job.__table__  # type: ignore[attr-defined]  # SQLModel does not type it
_column = _table.c


class JobRepository(ScopedRepository[Job]):
    """The jobs of the scope's user in the scope's workspace, of the kinds that are shown."""

    model = Job
    not_found = JobNotFound

    def __init__(self, unit: UnitOfWork, scope: Scope, registry: JobRegistry) -> None:
        super().__init__(unit, scope)
        self._shown = registry.shown

    def _visible(self) -> ColumnElement[bool]:
        return and_(super()._visible(), _column.user_id == self._scope.user_id, _column.kind.in_(self._shown))

    async def list(self, page: PageRequest, *, status: str | None = None) -> tuple[Sequence[RowMapping], int]:
        """Return one page, newest first, and how many there are in all."""
        where = () if status is None else (_column.status == status,)
        return await self.page(page, *where, order_by=(_column.id.desc(),))

    async def unfinished(self, limit: int) -> Sequence[RowMapping]:
        """Return the newest jobs that have not ended, newest first."""
        statement = self._select().where(_column.status.in_(("queued", "running")))
        connection = await self._unit.connection()
        return (await connection.execute(statement.order_by(_column.id.desc()).limit(limit))).mappings().all()
