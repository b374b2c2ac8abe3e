"""What operators do with workspaces, past the bounds of one. Each method is whole; every change is in the audit log."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.errors import Conflict, NotFound
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Role
from parley.tenancy.audit import Action, record
from parley.tenancy.repository import UnscopedWorkspaceRepository
from parley.tenancy.roles import keep_an_owner
from parley.tenancy.workspaces import Leaving

_LIST = """
    SELECT w.id, w.name, w.personal, w.created_at, count(m.user_id) AS members
    FROM workspaces w LEFT JOIN memberships m ON m.workspace_id = w.id
    WHERE $1::uuid IS NULL OR w.id = $1 GROUP BY w.id ORDER BY w.id LIMIT $2
"""
_MEMBERS = """
    SELECT m.user_id, u.email, u.name, m.role, m.created_at, u.disabled_at
    FROM memberships m JOIN users u ON u.id = m.user_id WHERE m.workspace_id = $1 ORDER BY m.created_at, m.user_id
"""
_WITH_ROLE = "SELECT user_id FROM memberships WHERE workspace_id = $1 AND role = ANY($2::text[]) ORDER BY user_id"


class NoSuchWorkspace(NotFound):
    """There is none with this id."""

    message = "There is no such workspace."


class NotAMember(NotFound):
    """The user is in another workspace, or in none."""

    message = "The user is no member of this workspace."


class AlreadyAMember(Conflict):
    """The user is in the workspace; `set-role` changes what they may."""

    message = "The user is a member already."


async def members_with(unit: UnitOfWork, workspace_id: UUID, least: Role) -> Sequence[UUID]:
    """Return the members of a workspace with at least this role. System role."""
    connection = await unit.driver()
    roles = [role.value for role in Role if role.at_least(least)]
    return [row["user_id"] for row in await connection.fetch(_WITH_ROLE, workspace_id, roles)]


class UnscopedWorkspaceOperators:
    """Workspaces, for operators."""

    def __init__(self, database: Database, revocations: Revocations, *, leaving: Sequence[Leaving] = ()) -> None:
        self._database = database
        self._revocations = revocations
        self._leaving = leaving

    async def list(self, *, limit: int) -> Sequence[dict[str, Any]]:
        """Return workspaces with how many members they have, the oldest first."""
        async with self._database.system_unit_of_work() as unit:
            return [dict(row) for row in await (await unit.driver()).fetch(_LIST, None, limit)]

    async def show(self, workspace_id: UUID) -> dict[str, Any]:
        """Return a workspace. Raises `NoSuchWorkspace`."""
        async with self._database.system_unit_of_work() as unit:
            row = await (await unit.driver()).fetchrow(_LIST, workspace_id, 1)
        if row is None:
            raise NoSuchWorkspace
        return dict(row)

    async def members(self, workspace_id: UUID) -> Sequence[dict[str, Any]]:
        """Return who belongs to a workspace. Raises `NoSuchWorkspace`."""
        await self.show(workspace_id)
        async with self._database.system_unit_of_work() as unit:
            return [dict(row) for row in await (await unit.driver()).fetch(_MEMBERS, workspace_id)]

    async def add_member(self, workspace_id: UUID, user_id: UUID, role: Role) -> None:
        """Give a user a place. Raises `NoSuchWorkspace`, `AlreadyAMember`."""
        await self.show(workspace_id)
        async with self._database.system_unit_of_work() as unit:
            if not await UnscopedWorkspaceRepository(unit).add_member(workspace_id, user_id, role):
                raise AlreadyAMember
            await record(
                unit,
                Action.MEMBER_ADDED,
                workspace_id=workspace_id,
                actor="operator",
                target=str(user_id),
                details={"role": role.value},
            )

    async def set_role(self, workspace_id: UUID, user_id: UUID, role: Role) -> None:
        """Change what a member may, at once. Raises `NotAMember`, `LastOwner`."""
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedWorkspaceRepository(unit)
            roles = await repository.lock_roles(workspace_id, (user_id,))
            if user_id not in roles:
                raise NotAMember
            keep_an_owner(roles, user_id, role)
            await repository.set_role(workspace_id, user_id, role)
            await self._revocations.announce(unit, Revocation("membership", workspace_id, user_id))
            await record(
                unit,
                Action.MEMBER_ROLE_CHANGED,
                workspace_id=workspace_id,
                actor="operator",
                target=str(user_id),
                details={"role": role.value},
            )

    async def delete(self, workspace_id: UUID) -> None:
        """Remove a workspace with everything in it. Raises `NoSuchWorkspace`."""
        async with self._database.system_unit_of_work() as unit:
            for leave in self._leaving:
                await leave(unit, workspace_id, None)
            if not await UnscopedWorkspaceRepository(unit).delete(workspace_id):
                raise NoSuchWorkspace
            await self._revocations.announce(unit, Revocation("workspace", workspace_id))
            # The workspace's own log has gone with it.
            await record(unit, Action.WORKSPACE_DELETED, actor="operator", target=str(workspace_id))
