"""The base of every repository: it has a scope, and every statement starts from it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.engine import RowMapping
from sqlmodel import SQLModel

from parley.core.db import UnitOfWork
from parley.core.errors import NotFound
from parley.core.pagination import PageRequest
from parley.core.scope import Scope


class Prepared:
    """A Core statement compiled once for asyncpg, for a read that happens on nearly every request.

    Executing it through SQLAlchemy costs more than all else that such a request does. Its parameters are bound by name.
    """

    def __init__(self, statement: Select[Any]) -> None:
        self.statement = statement
        compiled = statement.compile(dialect=asyncpg_dialect())  # type: ignore[no-untyped-call]  # SQLAlchemy's
        self._text = str(compiled)
        self._names: Sequence[str] = compiled.positiontup or ()

    async def one_or_none(self, unit: UnitOfWork, **parameters: object) -> dict[str, Any] | None:
        """Return the row, or None. Every parameter of the statement has to be given."""
        connection = await unit.driver()
        row = await connection.fetchrow(self._text, *(parameters[name] for name in self._names))
        return None if row is None else dict(row)


class ScopedRepository[T: SQLModel]:
    """Reads and writes the rows of one table that a scope may see.

    There is no public method without the scope: `_select()` is where every statement starts. Reads are Core
    statements and give mappings; writes go through the session. A row of another workspace is absent, as in
    `NotFound`. Row-level security holds the same line again, below this class.
    """

    model: ClassVar[type[SQLModel]]
    not_found: ClassVar[type[NotFound]] = NotFound

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    def _visible(self) -> ColumnElement[bool]:
        """The condition on every statement. A table whose rows have an owner adds the owner to it."""
        return self.model.__table__.c.workspace_id == self._scope.workspace_id  # type: ignore[attr-defined, no-any-return]  # SQLModel does not type __table__

    def _select(self) -> Select[tuple[object, ...]]:
        return select(*self.model.__table__.c).where(self._visible())  # type: ignore[attr-defined]  # as above

    async def find(self, id: UUID, *, lock: bool = False) -> Mapping[str, Any] | RowMapping | None:
        """Return the row, or None. `lock`: until the transaction ends, nobody else changes it."""
        statement = self._select().where(self.model.__table__.c.id == id)  # type: ignore[attr-defined]  # as above
        connection = await self._unit.connection()
        result = await connection.execute(statement.with_for_update() if lock else statement)
        return result.mappings().one_or_none()

    async def get(self, id: UUID, *, lock: bool = False) -> Mapping[str, Any] | RowMapping:
        """Return the row, or raise the repository's `not_found`."""
        row = await self.find(id, lock=lock)
        if row is None:
            raise self.not_found
        return row

    async def page(
        self, page: PageRequest, *where: ColumnElement[bool], order_by: tuple[ColumnElement[object], ...]
    ) -> tuple[list[RowMapping], int]:
        """Return one page of rows and how many there are in all."""
        connection = await self._unit.connection()
        statement = self._select().where(*where)
        total = (await connection.execute(select(func.count()).select_from(statement.subquery()))).scalar_one()
        rows = await connection.execute(statement.order_by(*order_by).limit(page.per_page).offset(page.offset))
        return list(rows.mappings().all()), total

    async def add(self, row: T) -> T:
        """Add a row, which is of the scope's workspace."""
        if row.workspace_id != self._scope.workspace_id:  # type: ignore[attr-defined]  # every tenant table has it
            raise ValueError("a row of another workspace")
        self._unit.session.add(row)
        # The defaults that the database fills in are part of what the caller answers with.
        await self._unit.session.flush()
        return row
