"""What this module has of a person: their places in workspaces, and what the audit log says of them."""

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.personal_data import Person, Record, records
from parley.core.scope import NO_WORKSPACE

# One look per workspace at indexes that lead with it. Who was removed may have left something behind.
_WORKSPACES = """
    SELECT w.id FROM workspaces w
    WHERE EXISTS (SELECT FROM memberships m WHERE m.workspace_id = w.id AND m.user_id = $1)
       OR EXISTS (SELECT FROM channel_heads h WHERE h.workspace_id = w.id
                  AND h.channel IN ('user:' || $1::text, 'tasks:' || $1::text))
       OR EXISTS (SELECT FROM audit_events a WHERE a.workspace_id = w.id AND a.user_id = $1)
       OR EXISTS (SELECT FROM usage_entries u WHERE u.workspace_id = w.id AND u.user_id = $1)
       OR EXISTS (SELECT FROM jobs j WHERE j.workspace_id = w.id AND j.user_id = $1)
    ORDER BY w.id
"""
_MEMBERSHIPS = """
    SELECT id, row_to_json(m)::text AS row FROM (
        SELECT m.workspace_id AS id, w.name, w.personal, m.role, m.created_at
        FROM memberships m JOIN workspaces w ON w.id = m.workspace_id
        WHERE m.user_id = $1 AND m.workspace_id > $2 ORDER BY m.workspace_id LIMIT $3
    ) m ORDER BY id
"""
_AUDIT = """
    SELECT id, row_to_json(a)::text AS row FROM (
        SELECT id, workspace_id, at, actor, action, outcome, target, address, user_agent
        FROM audit_events WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3
    ) a ORDER BY id
"""
_ALONE = """
    SELECT m.workspace_id FROM memberships m WHERE m.user_id = $1 AND NOT EXISTS (
        SELECT FROM memberships o WHERE o.workspace_id = m.workspace_id AND o.user_id <> $1)
"""
_LAST_OWNER = """
    SELECT m.workspace_id FROM memberships m WHERE m.user_id = $1 AND m.role = 'owner'
      AND EXISTS (SELECT FROM memberships o WHERE o.workspace_id = m.workspace_id AND o.user_id <> $1)
      AND NOT EXISTS (SELECT FROM memberships o
                      WHERE o.workspace_id = m.workspace_id AND o.user_id <> $1 AND o.role = 'owner')
    ORDER BY m.workspace_id
"""
# After a restore someone may be the last owner again, and there is nobody to ask: the one who has most to say owns it.
_HAND_OVER = """
    UPDATE memberships SET role = 'owner' WHERE workspace_id = $1 AND user_id = (
        SELECT user_id FROM memberships WHERE workspace_id = $1 AND user_id <> $2
        ORDER BY array_position(ARRAY['admin', 'member', 'viewer'], role::text), created_at, user_id LIMIT 1)
"""
_LEAVE = "DELETE FROM memberships WHERE user_id = $1"
_PSEUDONYMISE = """
    UPDATE audit_events SET address = NULL, user_agent = NULL, request_id = NULL, credential_id = NULL, details = '{}'
    WHERE workspace_id = $2 AND (user_id = $1 OR target = $1::text OR details::text LIKE '%' || $1::text || '%')
"""


async def workspaces_of(database: Database, user_id: UUID) -> tuple[UUID, ...]:
    """Return every workspace that may hold something of a user, those that they have left among them."""
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        return tuple(row["id"] for row in await connection.fetch(_WORKSPACES, user_id))


async def last_owned(unit: UnitOfWork, user_id: UUID) -> Sequence[UUID]:
    """Return the workspaces with other members whose only owner the user is. System role."""
    connection = await unit.driver()
    return [row["workspace_id"] for row in await connection.fetch(_LAST_OWNER, user_id)]


class TenancyData:
    """A person's places, and the audit log."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield the memberships and the audit events of what the person did."""
        for name, statement in (("memberships", _MEMBERSHIPS), ("audit_events", _AUDIT)):
            async for record in records(database.system_unit_of_work, f"{name}.json", statement, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove the workspaces that nobody else is in, with everything; leave the others; clean the audit log.

        The log keeps what was done, under an id that no longer leads to anyone.
        """
        async with database.system_unit_of_work() as unit:
            connection = await unit.driver()
            alone = [row["workspace_id"] for row in await connection.fetch(_ALONE, person.user_id)]
            for workspace_id in alone:
                await connection.execute("DELETE FROM workspaces WHERE id = $1", workspace_id)
            for workspace_id in await last_owned(unit, person.user_id):
                await connection.execute(_HAND_OVER, workspace_id, person.user_id)
            await connection.execute(_LEAVE, person.user_id)
        for workspace_id in (NO_WORKSPACE, *person.workspace_ids):
            async with database.system_unit_of_work() as unit:
                connection = await unit.driver()
                await connection.execute(_PSEUDONYMISE, person.user_id, workspace_id)
