"""SQL of workspaces and memberships."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    RowMapping,
    ScalarSelect,
    Select,
    Subquery,
    column,
    delete,
    func,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.scope import NO_WORKSPACE, Role, Scope
from parley.tenancy.audit import Action
from parley.tenancy.models import Membership, Workspace

NAME_LENGTH = 100
_HOLD = "SELECT pg_advisory_xact_lock(hashtextextended('workspaces:' || $1, 0))"
_MADE_SINCE = """
    SELECT count(*), min(at) FROM audit_events
    WHERE workspace_id = $1 AND user_id = $2 AND action = $3 AND at > $4
"""
_USERS = table("users", column("id"), column("email"), column("name"))


def places() -> Subquery:
    """Return every membership with its workspace's name, to be joined: `user_id, workspace_id, role, name, …`.

    Whoever runs the statement sees what the role of its transaction may see.
    """
    return (
        select(
            col(Membership.user_id),
            col(Membership.workspace_id),
            col(Membership.role),
            col(Membership.created_at).label("joined_at"),
            col(Workspace.name),
            col(Workspace.personal),
        )
        .join(Workspace, col(Workspace.id) == col(Membership.workspace_id))
        .subquery("places")
    )


class UnscopedWorkspaceRepository:
    """Workspaces of anyone. Takes a unit of work of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    async def add(self, *, id: UUID, name: str, owner_id: UUID, personal: bool) -> None:
        """Add a workspace with its owner."""
        connection = await self._unit.connection()
        await connection.execute(insert(Workspace).values(id=id, name=name[:NAME_LENGTH], personal=personal))
        await connection.execute(insert(Membership).values(workspace_id=id, user_id=owner_id, role=Role.OWNER.value))

    async def hold(self, user_id: UUID) -> None:
        """Have nobody else make, delete or leave workspaces for a user until the transaction ends."""
        await (await self._unit.driver()).execute(_HOLD, str(user_id))

    async def made_since(self, user_id: UUID, moment: datetime) -> tuple[int, datetime | None]:
        """Return how many workspaces a user has made since a moment, those that are gone too, and when the first.

        Whoever else asks this of the same user waits for the end of the transaction.
        """
        await self.hold(user_id)
        connection = await self._unit.driver()
        count, first = await connection.fetchrow(_MADE_SINCE, NO_WORKSPACE, user_id, Action.WORKSPACE_CREATED, moment)
        return count, first

    async def find_home(self, user_id: UUID, *, preferred: ScalarSelect[UUID] | None) -> RowMapping | None:
        """Return where a user starts: the preferred workspace if still a member, else the personal, else the oldest."""
        place = places()
        order: list[ColumnElement[Any]] = [place.c.personal.desc(), place.c.joined_at, place.c.workspace_id]
        if preferred is not None:
            order.insert(0, (place.c.workspace_id == preferred).desc().nulls_last())
        statement = (
            select(place.c.workspace_id.label("id"), place.c.name, place.c.role)
            .where(place.c.user_id == user_id)
            .order_by(*order)
            .limit(1)
        )
        connection = await self._unit.connection()
        return (await connection.execute(statement)).mappings().one_or_none()

    async def find_place(self, user_id: UUID, workspace_id: UUID) -> RowMapping | None:
        """Return `id, name, role` of a user's place in a workspace."""
        place = places()
        statement = select(place.c.workspace_id.label("id"), place.c.name, place.c.role).where(
            place.c.user_id == user_id, place.c.workspace_id == workspace_id
        )
        connection = await self._unit.connection()
        return (await connection.execute(statement)).mappings().one_or_none()

    async def list_places(self, user_id: UUID, page: PageRequest) -> tuple[list[RowMapping], int]:
        """Return a page of `id, name, role`, the oldest membership first, and how many there are."""
        place = places()
        connection = await self._unit.connection()
        mine = place.c.user_id == user_id
        total = (await connection.execute(select(func.count()).select_from(place).where(mine))).scalar_one()
        statement = (
            select(place.c.workspace_id.label("id"), place.c.name, place.c.role)
            .where(mine)
            .order_by(place.c.joined_at, place.c.workspace_id)
            .limit(page.per_page)
            .offset(page.offset)
        )
        return list((await connection.execute(statement)).mappings().all()), int(total)

    async def delete(self, workspace_id: UUID) -> bool:
        """Delete a workspace; the database takes everything in it along. False if it is gone already."""
        connection = await self._unit.connection()
        gone = await connection.execute(
            delete(Workspace).where(col(Workspace.id) == workspace_id).returning(col(Workspace.id))
        )
        return gone.scalar_one_or_none() is not None

    async def add_member(self, workspace_id: UUID, user_id: UUID, role: Role) -> bool:
        """Give a user a place; False if they have one."""
        connection = await self._unit.connection()
        statement = (
            insert(Membership)
            .values(workspace_id=workspace_id, user_id=user_id, role=role.value)
            .on_conflict_do_nothing()
            .returning(col(Membership.user_id))
        )
        return (await connection.execute(statement)).scalar_one_or_none() is not None

    async def lock_roles(self, workspace_id: UUID, user_ids: Sequence[UUID]) -> dict[UUID, Role]:
        """Return the roles of these users and of every owner, held until the transaction ends.

        Together and in one order: two owners who go at the same moment wait for each other, and neither for ever.
        """
        connection = await self._unit.connection()
        statement = (
            select(col(Membership.user_id), col(Membership.role))
            .where(
                col(Membership.workspace_id) == workspace_id,
                col(Membership.user_id).in_(user_ids) | (col(Membership.role) == Role.OWNER.value),
            )
            .order_by(col(Membership.user_id))
            .with_for_update()
        )
        return {row.user_id: Role(row.role) for row in await connection.execute(statement)}

    async def set_role(self, workspace_id: UUID, user_id: UUID, role: Role) -> None:
        """Change a member's role."""
        connection = await self._unit.connection()
        await connection.execute(
            update(Membership)
            .where(col(Membership.workspace_id) == workspace_id, col(Membership.user_id) == user_id)
            .values(role=role.value)
        )

    async def remove_member(self, workspace_id: UUID, user_id: UUID) -> None:
        """Take a member out; the database takes their keys along."""
        connection = await self._unit.connection()
        await connection.execute(
            delete(Membership).where(col(Membership.workspace_id) == workspace_id, col(Membership.user_id) == user_id)
        )


class MemberRepository:
    """The members of the scope's workspace, and its name."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    async def list(self, page: PageRequest) -> tuple[list[RowMapping], int]:
        """Return a page of members, who joined first first, and how many there are."""
        connection = await self._unit.connection()
        total = (await connection.execute(select(func.count()).select_from(self._select().subquery()))).scalar_one()
        statement = self._select().order_by(text("joined_at"), text("user_id"))
        rows = await connection.execute(statement.limit(page.per_page).offset(page.offset))
        return list(rows.mappings().all()), int(total)

    async def find(self, user_id: UUID) -> RowMapping | None:
        """Return a member."""
        connection = await self._unit.connection()
        rows = await connection.execute(self._select().where(col(Membership.user_id) == user_id))
        return rows.mappings().one_or_none()

    async def rename_workspace(self, name: str) -> None:
        """Change the name of the scope's workspace."""
        connection = await self._unit.connection()
        await connection.execute(
            update(Workspace).where(col(Workspace.id) == self._scope.workspace_id).values(name=name)
        )

    def _select(self) -> Select[tuple[object, ...]]:
        # The users' table is identity's, which stands above: it is named and not imported.
        return (
            select(
                col(Membership.user_id),
                _USERS.c.email,
                _USERS.c.name,
                col(Membership.role),
                col(Membership.created_at).label("joined_at"),
            )
            .join(_USERS, _USERS.c.id == col(Membership.user_id))
            .where(col(Membership.workspace_id) == self._scope.workspace_id)
        )
