"""The PostgreSQL roles and the database that Parley runs on.

The embedded server and `parley db init` call the same code. Everything here can be repeated and run by two
processes at once: it looks first, changes only what differs, and holds an advisory lock meanwhile.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

OWNER_ROLE = "parley_owner"
APP_ROLE = "parley_app"
SYSTEM_ROLE = "parley_system"

# "parley", so that no other application's advisory lock is met by accident.
_LOCK_KEY = 0x7061726C6579
# Another key inside the database itself, which may be the one that the first lock was taken in.
_RIGHTS_LOCK_KEY = _LOCK_KEY + 1

# None of these may be true of a role of ours: each is a way around row-level security or out of the database.
_UNPRIVILEGED = {
    "rolsuper": "NOSUPERUSER",
    "rolbypassrls": "NOBYPASSRLS",
    "rolcreatedb": "NOCREATEDB",
    "rolcreaterole": "NOCREATEROLE",
    "rolreplication": "NOREPLICATION",
}


class RightsMissing(RuntimeError):
    """The administrator may not give the roles what they need; the message says what a superuser should run."""


async def ensure_roles(
    admin_dsn: str,
    database: str = "parley",
    *,
    owner: str = OWNER_ROLE,
    app: str = APP_ROLE,
    system: str = SYSTEM_ROLE,
    passwords: Mapping[str, str] | None = None,
) -> None:
    """Make the three roles unprivileged and able to log in, then the database with its rights.

    `admin_dsn` names a superuser, or a role with CREATEROLE and CREATEDB; the latter is made a member of the three
    roles, so that it can act as each of them. `passwords` maps role names to passwords to set.
    Raises `RightsMissing`, and asyncpg's errors, `InsufficientPrivilegeError` among them.
    """
    async with _locked(admin_dsn) as connection:
        for role in (owner, app, system):
            await _ensure_role(connection, role)
            if passwords and role in passwords:
                await _run(connection, "ALTER ROLE %I PASSWORD %L", role, passwords[role])
        await _join_roles(connection, (owner, app, system))
        await _ensure_database(connection, admin_dsn, database, owner=owner, app=app, system=system)


async def ensure_database(
    admin_dsn: str, database: str, *, owner: str = OWNER_ROLE, app: str = APP_ROLE, system: str = SYSTEM_ROLE
) -> None:
    """Make one database, owned by `owner`, in which nobody else creates. The roles must exist.

    A database that exists already keeps its owner; `owner` is then granted what migrations need.
    """
    async with _locked(admin_dsn) as connection:
        await _ensure_database(connection, admin_dsn, database, owner=owner, app=app, system=system)


@asynccontextmanager
async def _locked(dsn: str) -> AsyncIterator[Any]:
    """Connect and hold the lock. A session lock, since CREATE DATABASE refuses to run in a transaction."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"SELECT pg_advisory_lock({_LOCK_KEY})")
        yield connection
    finally:
        await connection.close()


async def _run(connection: Any, template: str, *arguments: str) -> None:
    """Execute a statement whose names (%I) and values (%L) the server quotes itself."""
    placeholders = "".join(f", ${position}::text" for position in range(2, len(arguments) + 2))
    await connection.execute(await connection.fetchval(f"SELECT format($1{placeholders})", template, *arguments))


async def _ensure_role(connection: Any, role: str) -> None:
    look = "SELECT * FROM pg_roles WHERE rolname = $1"
    found = await connection.fetchrow(look, role)
    if found is None:
        try:
            await _run(connection, f"CREATE ROLE %I LOGIN {' '.join(_UNPRIVILEGED.values())}", role)
            return
        except (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
            # Roles belong to the whole server, the lock to one database: someone came in through another one.
            found = await connection.fetchrow(look, role)
    # Only what differs: a role that is not superuser may not even repeat NOSUPERUSER.
    changes = [word for attribute, word in _UNPRIVILEGED.items() if found[attribute]]
    if not found["rolcanlogin"]:
        changes.append("LOGIN")
    if changes:
        await _run(connection, f"ALTER ROLE %I {' '.join(changes)}", role)


async def _join_roles(connection: Any, roles: tuple[str, ...]) -> None:
    """Let an administrator that is not superuser act as the roles; it needs that to hand objects to them."""
    # Since PostgreSQL 16 a membership may leave SET ROLE out, and the one that CREATE ROLE gives its maker does.
    kind = "SET" if connection.get_server_version().major >= 16 else "MEMBER"
    for role in roles:
        if not await connection.fetchval("SELECT pg_has_role(current_user, $1::name, $2)", role, kind):
            await _run(connection, "GRANT %I TO CURRENT_USER", role)


async def _ensure_database(
    connection: Any, admin_dsn: str, database: str, *, owner: str, app: str, system: str
) -> None:
    present = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
    if not await connection.fetchval(present, database):
        try:
            await _run(connection, "CREATE DATABASE %I OWNER %I TEMPLATE template0 ENCODING 'UTF8'", database, owner)
        except (asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
            if not await connection.fetchval(present, database):
                raise
    target = await asyncpg.connect(admin_dsn, database=database)
    try:
        if await _missing_rights(target, owner=owner, app=app, system=system):
            await _grant_rights(target, database, owner=owner, app=app, system=system)
            if missing := await _missing_rights(target, owner=owner, app=app, system=system):
                raise RightsMissing(
                    f"The database {database} is not ready: {', '.join(missing)}. Let a superuser, or the owner of its "
                    f"schema public, run in it: REVOKE CREATE ON SCHEMA public FROM PUBLIC; GRANT CREATE, USAGE ON "
                    f"SCHEMA public TO {owner}; GRANT USAGE ON SCHEMA public TO {app}, {system};"
                )
    finally:
        await target.close()


async def _missing_rights(target: Any, *, owner: str, app: str, system: str) -> list[str]:
    """Say what is wrong with the schema `public`; it should be closed to all but the owner, who creates in it."""
    facts = await target.fetchrow(
        """
        SELECT has_schema_privilege($1::text, 'public', 'CREATE')
                   AND has_schema_privilege($1::text, 'public', 'USAGE') AS owner_creates,
               has_schema_privilege($2::text, 'public', 'USAGE') AS app_uses,
               has_schema_privilege($3::text, 'public', 'USAGE') AS system_uses,
               NOT has_schema_privilege('public', 'public', 'CREATE') AS closed
        """,
        owner,
        app,
        system,
    )
    explanations = {
        "owner_creates": f"{owner} may not create in schema public",
        "app_uses": f"{app} may not use schema public",
        "system_uses": f"{system} may not use schema public",
        "closed": "every role may create in schema public",
    }
    return [text for fact, text in explanations.items() if not facts[fact]]


async def _grant_rights(target: Any, database: str, *, owner: str, app: str, system: str) -> None:
    async with target.transaction():
        await target.execute(f"SELECT pg_advisory_xact_lock({_RIGHTS_LOCK_KEY})")
        who = await target.fetchrow(
            """
            SELECT pg_get_userbyid(datdba) = $1::text AS owned,
                   (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser
            FROM pg_database WHERE datname = current_database()
            """,
            owner,
        )
        if not who["owned"]:
            # A database that was there before keeps its owner.
            await _run(target, "GRANT CONNECT, CREATE, TEMPORARY ON DATABASE %I TO %I", database, owner)
        elif not who["superuser"]:
            # Only the owner of the schema can grant on it, and that is whoever owns the database.
            await _run(target, "SET LOCAL ROLE %I", owner)
        await target.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        await _run(target, "GRANT CREATE, USAGE ON SCHEMA public TO %I", owner)
        await _run(target, "GRANT USAGE ON SCHEMA public TO %I, %I", app, system)
