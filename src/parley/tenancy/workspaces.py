"""Workspaces and their members. Each method is whole: it has its own transactions.

Nothing but the credential says which workspace is meant: an id that is another one's is absent, also where the caller
is a member there. What changes who may what is announced, and in force everywhere within two seconds.
"""

from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

from sqlalchemy import RowMapping

from parley.core.db import Database, UnitOfWork
from parley.core.idempotency import Once
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Role, Scope
from parley.tenancy.audit import Action, record
from parley.tenancy.errors import LastWorkspace, MemberNotFound, RoleNotAllowed, WorkspaceNotFound
from parley.tenancy.making import keep_few, remember_making
from parley.tenancy.repository import MemberRepository, UnscopedWorkspaceRepository
from parley.tenancy.roles import keep_an_owner, may_change
from parley.tenancy.schemas import MemberRead, WorkspaceRead

Leaving = Callable[[UnitOfWork, UUID, UUID | None], Awaitable[None]]
"""What another module does before a member goes, or before a workspace does: `unit, workspace_id, user_id or None`."""


class WorkspaceService:
    """Makes, changes and deletes workspaces, and manages their members."""

    def __init__(
        self,
        database: Database,
        revocations: Revocations,
        *,
        leaving: Sequence[Leaving] = (),
        per_month: int | None = None,
    ) -> None:
        self._database = database
        self._revocations = revocations
        self._leaving = leaving
        self._per_month = per_month

    async def list(self, scope: Scope, page: PageRequest) -> tuple[Sequence[WorkspaceRead], int]:
        """Return a page of the caller's workspaces, the oldest membership first, and how many there are."""
        async with self._database.system_unit_of_work() as unit:
            rows, total = await UnscopedWorkspaceRepository(unit).list_places(scope.user_id, page)
        return [WorkspaceRead.model_validate(dict(row)) for row in rows], total

    async def get(self, scope: Scope, workspace_id: UUID) -> WorkspaceRead:
        """Return one of the caller's workspaces. Raises `WorkspaceNotFound`."""
        async with self._database.system_unit_of_work() as unit:
            row = await UnscopedWorkspaceRepository(unit).find_place(scope.user_id, workspace_id)
        if row is None:
            raise WorkspaceNotFound
        return WorkspaceRead.model_validate(dict(row))

    async def create(self, scope: Scope, name: str, once: Once) -> WorkspaceRead:
        """Make a workspace of the caller's. They go on in the one they are in until they switch.

        Raises `TooManyWorkspaces`.
        """
        workspace = WorkspaceRead(id=new_id(), name=name, role=Role.OWNER)
        async with self._database.system_unit_of_work() as unit:
            await once.begin(unit)
            repository = UnscopedWorkspaceRepository(unit)
            await keep_few(repository, scope.user_id, self._per_month)
            await repository.add(id=workspace.id, name=name, owner_id=scope.user_id, personal=False)
            target = str(workspace.id)
            await record(unit, Action.WORKSPACE_CREATED, scope=scope, workspace_id=workspace.id, target=target)
            await remember_making(unit, scope.user_id, workspace.id, actor="user")
            await once.settle(workspace)
        return workspace

    async def rename(self, scope: Scope, workspace_id: UUID, name: str) -> WorkspaceRead:
        """Change the workspace's name. Raises `WorkspaceNotFound`."""
        self._own(scope, workspace_id)
        async with self._database.unit_of_work(scope) as unit:
            await MemberRepository(unit, scope).rename_workspace(name)
            await record(unit, Action.WORKSPACE_RENAMED, scope=scope, target=str(workspace_id))
        return WorkspaceRead(id=workspace_id, name=name, role=scope.role)

    async def delete(self, scope: Scope, workspace_id: UUID) -> None:
        """Delete the workspace with everything in it. Raises `WorkspaceNotFound`, `LastWorkspace`."""
        self._own(scope, workspace_id)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedWorkspaceRepository(unit)
            await repository.hold(scope.user_id)
            _, places = await repository.list_places(scope.user_id, PageRequest(1, 1))
            if places < 2:
                raise LastWorkspace
            for leave in self._leaving:
                await leave(unit, workspace_id, None)
            if not await repository.delete(workspace_id):
                raise WorkspaceNotFound
            await self._revocations.announce(unit, Revocation("workspace", workspace_id))
            # Its own log has gone with it: this stands in the installation's.
            await record(unit, Action.WORKSPACE_DELETED, user_id=scope.user_id, actor="user", target=str(workspace_id))

    async def members(self, scope: Scope, workspace_id: UUID, page: PageRequest) -> tuple[Sequence[MemberRead], int]:
        """Return a page of who belongs to the workspace, and how many do. Raises `WorkspaceNotFound`."""
        self._own(scope, workspace_id)
        async with self._database.unit_of_work(scope) as unit:
            rows, total = await MemberRepository(unit, scope).list(page)
        return [_member(row) for row in rows], total

    async def set_role(self, scope: Scope, workspace_id: UUID, user_id: UUID, role: Role) -> MemberRead:
        """Change what a member may. Raises `WorkspaceNotFound`, `MemberNotFound`, `RoleNotAllowed`, `LastOwner`."""
        self._own(scope, workspace_id)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedWorkspaceRepository(unit)
            roles = await self._roles(repository, scope, user_id)
            before = roles[user_id]
            if not may_change(roles[scope.user_id], before, role):
                raise RoleNotAllowed
            keep_an_owner(roles, user_id, role)
            await repository.set_role(workspace_id, user_id, role)
            if before is not role:
                await self._revocations.announce(unit, Revocation("membership", workspace_id, user_id))
                details = {"before": before.value, "after": role.value}
                await record(unit, Action.MEMBER_ROLE_CHANGED, scope=scope, target=str(user_id), details=details)
        async with self._database.unit_of_work(scope) as unit:
            row = await MemberRepository(unit, scope).find(user_id)
        if row is None:
            raise MemberNotFound
        return _member(row)

    async def remove(self, scope: Scope, workspace_id: UUID, user_id: UUID) -> None:
        """Take a member out; one's own id is leaving. Their keys go with them, what they made stays.

        Raises `WorkspaceNotFound`, `MemberNotFound`, `RoleNotAllowed`, `LastOwner`, and `LastWorkspace` for leaving
        the only one.
        """
        self._own(scope, workspace_id)
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedWorkspaceRepository(unit)
            if user_id == scope.user_id:
                await repository.hold(user_id)
            roles = await self._roles(repository, scope, user_id)
            before = roles[user_id]
            if user_id == scope.user_id:
                _, places = await repository.list_places(user_id, PageRequest(1, 1))
                if places < 2:
                    raise LastWorkspace
            elif not may_change(roles[scope.user_id], before, None):
                raise RoleNotAllowed
            keep_an_owner(roles, user_id, None)
            for leave in self._leaving:
                await leave(unit, workspace_id, user_id)
            await repository.remove_member(workspace_id, user_id)
            await self._revocations.announce(unit, Revocation("membership", workspace_id, user_id))
            await record(unit, Action.MEMBER_REMOVED, scope=scope, target=str(user_id), details={"role": before.value})

    @staticmethod
    def _own(scope: Scope, workspace_id: UUID) -> None:
        if workspace_id != scope.workspace_id:
            raise WorkspaceNotFound

    @staticmethod
    async def _roles(repository: UnscopedWorkspaceRepository, scope: Scope, user_id: UUID) -> dict[UUID, Role]:
        """Return the roles of caller, member and owners as they are now, held until the transaction ends."""
        roles = await repository.lock_roles(scope.workspace_id, (scope.user_id, user_id))
        if scope.user_id not in roles:
            raise WorkspaceNotFound
        if user_id not in roles:
            raise MemberNotFound
        return roles


def _member(row: RowMapping) -> MemberRead:
    return MemberRead(
        user_id=row["user_id"],
        email=row["email"],
        name=row["name"],
        role=row["role"],
        joined_at=row["joined_at"],
    )
