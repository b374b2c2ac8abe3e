"""SQL of workspaces' own keys of providers."""

from typing import Any, Final
from uuid import UUID

from sqlalchemy import RowMapping, Table, delete, func
from sqlalchemy.dialects.postgresql import insert

from parley.core.db import UnitOfWork
from parley.core.repository import ScopedRepository
from parley.llm.errors import ProviderKeyNotFound
from parley.llm.models import ProviderKey

_table: Table = ProviderKey.__table__  # type: ignore[attr-defined]  # SQLModel does not type it
_column = _table.c

_ALL: Final = "SELECT workspace_id, provider, sealed, base_url, given_for FROM provider_keys"


class ProviderKeyRepository(ScopedRepository[ProviderKey]):
    """The keys of the scope's workspace."""

    model = ProviderKey
    not_found = ProviderKeyNotFound

    async def list(self) -> list[RowMapping]:
        """Return all of them. There is at most one for each provider of the registry."""
        connection = await self._unit.connection()
        return list((await connection.execute(self._select().order_by(_column.provider))).mappings().all())

    async def set(self, row: ProviderKey) -> RowMapping:
        """Store a key in place of the one before it."""
        connection = await self._unit.connection()
        new = row.model_dump(exclude={"created_at", "updated_at"}) | {"workspace_id": self._scope.workspace_id}
        changed: dict[str, Any] = {name: new[name] for name in new if name not in {"workspace_id", "provider"}}
        statement = (
            insert(_table)
            .values(**new)
            .on_conflict_do_update(
                index_elements=[_column.workspace_id, _column.provider], set_=changed | {"updated_at": func.now()}
            )
            .returning(*_column)
        )
        return (await connection.execute(statement)).mappings().one()

    async def remove(self, provider: str) -> None:
        """Remove a key. Raises `ProviderKeyNotFound`."""
        connection = await self._unit.connection()
        statement = delete(_table).where(self._visible(), _column.provider == provider)
        if (await connection.execute(statement)).rowcount == 0:
            raise ProviderKeyNotFound


class UnscopedProviderKeys:
    """The keys of every workspace, sealed, for the processes that make calls. Takes a unit of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    async def all(self) -> list[dict[str, Any]]:
        """Return every key."""
        connection = await self._unit.driver()
        return [dict(row) for row in await connection.fetch(_ALL)]

    async def of(self, workspace_id: UUID) -> list[dict[str, Any]]:
        """Return the keys of a workspace."""
        connection = await self._unit.driver()
        return [dict(row) for row in await connection.fetch(f"{_ALL} WHERE workspace_id = $1", workspace_id)]

    async def seal_anew(self, workspace_id: UUID, provider: str, *, former: bytes, sealed: bytes) -> None:
        """Put a key in place of the same one sealed otherwise, unless another one has been set."""
        connection = await self._unit.driver()
        await connection.execute(
            "UPDATE provider_keys SET sealed = $4 WHERE workspace_id = $1 AND provider = $2 AND sealed = $3",
            workspace_id,
            provider,
            former,
            sealed,
        )
