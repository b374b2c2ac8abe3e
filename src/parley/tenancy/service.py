"""What other modules ask of tenancy before there is a scope."""

from uuid import UUID

from sqlalchemy import ScalarSelect, Subquery

from parley.core.db import UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import Role
from parley.tenancy.making import keep_few, remember_making
from parley.tenancy.repository import NAME_LENGTH, UnscopedWorkspaceRepository, places
from parley.tenancy.schemas import WorkspaceRead

_SUFFIX = "'s workspace"


def membership_places() -> Subquery:
    """Return memberships with their workspaces' names, to be joined: `user_id, workspace_id, role, name`."""
    return places()


class UnscopedWorkspaces:
    """Makes and finds workspaces for identity, inside its transaction of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit
        self._repository = UnscopedWorkspaceRepository(unit)

    async def create_personal(self, owner_id: UUID, *, owner_name: str) -> WorkspaceRead:
        """Make a new user's own workspace."""
        workspace_id = new_id()
        name = owner_name[: NAME_LENGTH - len(_SUFFIX)].rstrip() + _SUFFIX
        await self._repository.add(id=workspace_id, name=name, owner_id=owner_id, personal=True)
        return WorkspaceRead(id=workspace_id, name=name, role=Role.OWNER)

    async def replace_personal(self, owner_id: UUID, *, owner_name: str, per_month: int | None) -> WorkspaceRead:
        """Make a workspace for a user who has none; it counts as one that they made. Raises `TooManyWorkspaces`."""
        await keep_few(self._repository, owner_id, per_month)
        made = await self.create_personal(owner_id, owner_name=owner_name)
        await remember_making(self._unit, owner_id, made.id, actor="issuer")
        return made

    async def find_place(self, user_id: UUID, workspace_id: UUID) -> WorkspaceRead | None:
        """Return a workspace with the user's role in it; None for one that they are not in."""
        row = await self._repository.find_place(user_id, workspace_id)
        return WorkspaceRead.model_validate(dict(row)) if row is not None else None

    async def add_member(self, workspace_id: UUID, user_id: UUID, role: Role) -> bool:
        """Give a user a place; False if they have one."""
        return await self._repository.add_member(workspace_id, user_id, role)

    async def find_home(self, user_id: UUID, *, preferred: ScalarSelect[UUID] | None) -> WorkspaceRead | None:
        """Return where a user starts; None when every membership is gone."""
        row = await self._repository.find_home(user_id, preferred=preferred)
        return WorkspaceRead.model_validate(dict(row)) if row is not None else None
