"""A person's data, wherever it is: each module says what it has of someone, for the export and for the erasure."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol
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
