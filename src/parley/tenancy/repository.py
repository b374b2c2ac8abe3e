"""SQL of workspaces and memberships, past the bounds of one workspace: before there is a scope."""

from uuid import UUID

from sqlalchemy import ColumnElement, RowMapping, ScalarSelect, Subquery, insert, select
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.scope import Role
from parley.tenancy.models import Membership, Workspace

NAME_LENGTH = 100


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

    async def find_home(self, user_id: UUID, *, preferred: ScalarSelect[UUID]) -> RowMapping | None:
        """Return where a user starts: the preferred workspace if still a member, else the personal, else the oldest."""
        place = places()
        is_preferred: ColumnElement[bool] = place.c.workspace_id == preferred
        statement = (
            select(place.c.workspace_id.label("id"), place.c.name, place.c.role)
            .where(place.c.user_id == user_id)
            .order_by(
                is_preferred.desc().nulls_last(), place.c.personal.desc(), place.c.joined_at, place.c.workspace_id
            )
            .limit(1)
        )
        connection = await self._unit.connection()
        return (await connection.execute(statement)).mappings().one_or_none()
