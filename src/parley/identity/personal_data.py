"""What identity has of a person: the account itself, sessions, keys, identities, invitations."""

from collections.abc import AsyncIterator
from typing import Any

from parley.core.db import Database
from parley.core.personal_data import Person, Record, records
from parley.core.scope import NO_WORKSPACE

_EXPORT = {
    "profile": """
        SELECT id, row_to_json(u)::text AS row FROM (
            SELECT u.id, u.email, u.name, u.email_verified, u.disabled_at, u.created_at,
                   EXISTS (SELECT FROM credentials c WHERE c.user_id = u.id) AS has_password
            FROM users u WHERE u.id = $1 AND u.id > $2 LIMIT $3
        ) u
    """,
    "sessions": """
        SELECT id, row_to_json(s)::text AS row FROM (
            SELECT id, workspace_id, user_agent, address, cookie, created_at, last_used_at, idle_expires_at,
                   absolute_expires_at, revoked_at, revoke_reason
            FROM sessions WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3
        ) s ORDER BY id
    """,
    # They have no id of their own; nobody has a page of them.
    "identities": """
        SELECT $2::uuid AS id, row_to_json(i)::text AS row FROM (
            SELECT issuer, subject, created_at FROM identities WHERE user_id = $1 ORDER BY issuer, subject LIMIT $3
        ) i
    """,
    "api_keys": """
        SELECT id, row_to_json(k)::text AS row FROM (
            SELECT id, workspace_id, name, prefix, last_four, scopes, expires_at, last_used_at, revoked_at, created_at
            FROM api_keys WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3
        ) k ORDER BY id
    """,
    "invitations": """
        SELECT id, row_to_json(i)::text AS row FROM (
            SELECT id, workspace_id, role, created_at, expires_at, accepted_at, revoked_at
            FROM invitations WHERE email_norm = (SELECT email_norm FROM users WHERE id = $1) AND id > $2
            ORDER BY id LIMIT $3
        ) i ORDER BY id
    """,
}
_INVITED = """
    DELETE FROM invitations i USING users u
    WHERE u.id = $1 AND (i.email_norm = u.email_norm OR i.email = u.email) RETURNING i.workspace_id
"""
# What others did to the person: a record of theirs may hold the address.
_FORGET_ADDRESS = """
    UPDATE audit_events SET details = '{}' WHERE workspace_id = ANY($1::uuid[]) AND EXISTS (
        SELECT FROM users u WHERE u.id = $2 AND u.email IS NOT NULL
           AND (position(lower(u.email) IN lower(details::text)) > 0 OR target = u.email))
"""
_KEYS = ("DELETE FROM api_keys WHERE user_id = $1", "DELETE FROM idempotency_keys WHERE user_id = $1")
# An issuer's late message must not find the person again; the subject itself may be an address.
_TOMBSTONES = """
    INSERT INTO identities (issuer, subject, user_id, deleted_at)
    SELECT issuer, 'erased:' || encode(sha256(convert_to(issuer || '|' || subject, 'UTF8')), 'hex'), NULL, now()
    FROM identities WHERE user_id = $1
    ON CONFLICT (issuer, subject) DO NOTHING
"""
_LAST = ("DELETE FROM identities WHERE user_id = $1", "DELETE FROM users WHERE id = $1")


class IdentityData:
    """The account of a person."""

    async def export(self, database: Database, person: Person) -> AsyncIterator[Record]:
        """Yield the account without anything that could be used to sign in."""
        for name, statement in _EXPORT.items():
            async for record in records(database.system_unit_of_work, f"{name}.json", statement, person.user_id):
                yield record

    async def erase(self, database: Database, person: Person) -> None:
        """Remove the account with all that hangs on it. The last step of an erasure: then nobody is left to erase."""
        async with database.system_unit_of_work() as unit:
            connection: Any = await unit.driver()
            invited = {row["workspace_id"] for row in await connection.fetch(_INVITED, person.user_id)}
            places = [NO_WORKSPACE, *sorted(invited | set(person.workspace_ids))]
            await connection.execute(_FORGET_ADDRESS, places, person.user_id)
            for statement in (*_KEYS, _TOMBSTONES, *_LAST):
                await connection.execute(statement, person.user_id)
