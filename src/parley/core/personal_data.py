"""A person's data, wherever it is: each module says what it has of someone, for the export and for the erasure."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol
from uuid import UUID

import asyncpg

from parley.core.db import Database, UnitOfWork
from parley.core.scope import Role, Scope

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Person:
    """Whose data is meant, and the workspaces in which there is some, also those that they have left."""

    user_id: UUID
    workspace_ids: tuple[UUID, ...]

    def scope(self, workspace_id: UUID) -> Scope:
        """Return the scope that binds a transaction to this person. It has no permission: it passes no service."""
        return Scope(workspace_id, self.user_id, Role.VIEWER)


@dataclass(frozen=True, slots=True)
class Record:
    """A row for the export. `entry` names its file and is made of fixed words and ids, `json` is an object."""

    entry: str
    json: str


class PersonalData(Protocol):
    """What one module has of people."""

    def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield the person's rows and nobody else's, without secrets, one entry after the other."""
        ...

    async def erase(self, database: Database, person: Person) -> None:
        """Remove what is the person's. Can be repeated: an attempt may end anywhere."""
        ...


async def records(
    open_unit: Callable[[], AbstractAsyncContextManager[UnitOfWork]], entry: str, sql: str, *arguments: object
) -> AsyncIterator[Record]:
    """Yield the rows of a statement page by page, each page in a short transaction of its own.

    The statement gives `id` and `row` (JSON as text), ascending by id. After its own arguments it takes the id that
    the page starts after and how many rows it has.
    """
    after = UUID(int=0)
    while True:
        async with open_unit() as unit:
            connection = await unit.driver()
            rows: list[asyncpg.Record] = await connection.fetch(sql, *arguments, after, _PAGE)
        for row in rows:
            yield Record(entry, row["row"])
        if len(rows) < _PAGE:
            return
        after = rows[-1]["id"]


class OwnRows:
    """What a module has of people in one table, each workspace by itself. Subclasses name the file and the statements.

    `exported` is as for `records`, `erased` one statement or several; all take the workspace and the person first.
    """

    file: ClassVar[str]
    exported: ClassVar[str]
    erased: ClassVar[tuple[str, ...]]

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield the person's rows, workspace by workspace."""
        for workspace_id in person.workspace_ids:
            open_unit = partial(database.unit_of_work, person.scope(workspace_id))
            entry = f"workspaces/{workspace_id}/{self.file}.json"
            async for record in records(open_unit, entry, self.exported, workspace_id, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Do to the person's rows what the statements say, in one transaction for each workspace."""
        for workspace_id in person.workspace_ids:
            async with self._unit(database, person, workspace_id) as unit:
                connection = await unit.driver()
                for statement in self.erased:
                    await connection.execute(statement, workspace_id, person.user_id)

    def _unit(self, database: Database, person: Person, workspace_id: UUID) -> AbstractAsyncContextManager[UnitOfWork]:
        return database.unit_of_work(person.scope(workspace_id))
