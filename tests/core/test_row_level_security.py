"""What the app's role can do in SQL, whatever the code above it forgot: on every table with a workspace's rows."""

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.ids import new_id
from parley.core.row_level_security import protect_tenant_table
from tests.conftest import TestDatabases

USER = new_id()
STRANGER = new_id()

# A row of each table; `{id}` is new each time.
ROWS: dict[str, dict[str, Any]] = {
    "workspaces": {"name": "A workspace", "personal": False, "created_at": "2027-01-01T00:00:00Z"},
    "memberships": {"user_id": str(USER), "role": "member", "created_at": "2027-01-01T00:00:00Z"},
    "conversations": {
        "id": "{id}", "owner_id": str(USER), "assistant": "general", "shared": False, "archived": False,
        "created_at": "2027-01-01T00:00:00Z", "updated_at": "2027-01-01T00:00:00Z",
    },
    "messages": {
        "id": "{id}", "conversation_id": "{conversations}", "role": "user", "parts": [], "status": "completed",
        "author_id": str(USER), "created_at": "2027-01-01T00:00:00Z",
    },
    "tasks": {
        "id": "{id}", "user_id": str(USER), "title": "Buy milk", "completed": False,
        "created_at": "2027-01-01T00:00:00Z", "updated_at": "2027-01-01T00:00:00Z",
    },
    "channel_heads": {"channel": "user:{id}", "owner_id": str(USER), "seq": 1, "floor": 0, "epoch": "abc"},
    "channel_events": {
        "channel": "user:{id}", "seq": 1, "owner_id": str(USER), "e": "notice", "d": {}, "at": "2027-01-01T00:00:00Z",
    },
    "replies": {
        "id": "{id}", "channel": "conversation:{id}", "user_id": str(USER), "question_id": "{id}",
        "status": "completed", "options": {}, "fence": 1, "attempt": 1, "appended": 0, "start_seq": 0,
        "cancel_requested": False, "created_at": "2027-01-01T00:00:00Z",
    },
    "realtime_tickets": {"hash": "\\x00{hex}", "user_id": str(USER), "expires_at": "2027-01-01T00:00:00Z"},
    "jobs": {
        "id": "{id}", "user_id": str(USER), "kind": "mail", "status": "queued", "payload": {}, "attempts": 0,
        "max_attempts": 3, "run_at": "2027-01-01T00:00:00Z", "created_at": "2027-01-01T00:00:00Z",
    },
    "api_keys": {
        "id": "{id}", "user_id": str(USER), "name": "A key", "prefix": "parley_sk_", "last_four": "abcd",
        "hash": "\\x00{hex}", "scopes": [], "created_at": "2027-01-01T00:00:00Z",
    },
    "invitations": {
        "id": "{id}", "email": "i@e.org", "email_norm": "{id}@e.org", "role": "member", "invited_by": str(USER),
        "created_at": "2027-01-01T00:00:00Z", "expires_at": "2027-01-01T00:00:00Z",
    },
    "idempotency_keys": {
        "user_id": str(USER), "hash": "\\x00{hex}", "fingerprint": "\\x00", "status": 201, "headers": {},
        "body": "\\x00", "created_at": "2027-01-01T00:00:00Z", "expires_at": "2027-01-01T00:00:00Z",
    },
    "audit_events": {
        "id": "{id}", "at": "2027-01-01T00:00:00Z", "actor": "user", "action": "session.started",
        "outcome": "success", "details": {},
    },
    "usage_entries": {
        "id": "{id}", "user_id": str(USER), "purpose": "reply", "provider": "demo", "model": "demo", "attempt": 1,
        "status": "completed", "input_tokens": 1, "cached_tokens": 0, "output_tokens": 1, "images": 0,
        "estimated": False, "cost": "0.1", "started_at": "2027-01-01T00:00:00Z", "ended_at": "2027-01-01T00:00:00Z",
    },
    "budgets": {"id": "{id}", "period": "day", "ceiling": "10", "alert_at": "0.8"},
    "budget_counters": {"budget_id": "{budgets}", "starts_on": "2027-01-01", "spent": "0"},
    "usage_reservations": {
        "id": "{id}", "user_id": str(USER), "purpose": "reply", "provider": "demo", "model": "demo", "amount": "1",
        "input_tokens": 1, "input_cost": "0.1", "budgets": [], "reserved_at": "2027-01-01T00:00:00Z",
    },
    "assistants": {
        "id": "{id}", "name": "helper", "title": "Helps", "description": "", "instructions": "Help.",
        "approval": "never", "approval_tools": [], "parameters": {}, "version": 1,
    },
    "tool_approvals": {
        "id": "{id}", "reply_id": "{messages}", "user_id": str(USER), "tool": "add_task", "arguments": {},
        "arguments_hash": "\\x00", "expires_at": "2027-01-01T00:00:00Z",
    },
    "conversation_pins": {"user_id": str(USER), "conversation_id": "{conversations}"},
    "search_entries": {"conversation_id": "{conversations}", "id": "{id}", "tsv": "'milk':1"},
    "attachments": {
        "id": "{id}", "user_id": str(USER), "kind": "file", "media_type": "text/plain", "name": "a.txt", "size": 1,
        "sha256": "\\x00", "store": "postgres", "complete": True,
    },
    "attachment_chunks": {"attachment_id": "{attachments}", "number": 0, "data": "\\x00"},
    "stored_objects": {"id": "{id}"},
    "provider_keys": {"provider": "openai", "sealed": "\\x00", "last_four": "abcd", "given_for": "https://e.org"},
}  # fmt: skip

# Tables whose rows another user of the same workspace does not see either.
OWNED = (
    "tasks", "channel_heads", "channel_events", "jobs", "api_keys", "idempotency_keys", "tool_approvals",
    "conversation_pins",
)  # fmt: skip
# What the app may do with each; all of it where nothing stands here.
EVERYTHING = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE"})
RIGHTS: dict[str, frozenset[str]] = {
    "workspaces": frozenset({"SELECT", "UPDATE"}),
    "memberships": frozenset({"SELECT"}),
    "realtime_tickets": frozenset({"INSERT"}),
    "jobs": frozenset({"SELECT", "INSERT"}),
    "api_keys": frozenset({"SELECT", "INSERT", "UPDATE"}),
    "invitations": frozenset({"SELECT", "INSERT", "UPDATE"}),
    "audit_events": frozenset({"SELECT", "INSERT"}),
    "usage_entries": frozenset({"SELECT", "INSERT"}),
    "attachment_chunks": frozenset({"SELECT", "INSERT", "DELETE"}),
    "stored_objects": frozenset({"SELECT", "INSERT"}),
}


def key_of(table: str) -> str:
    return "id" if table == "workspaces" else "workspace_id"


class Tables:
    """Two workspaces with a row in every table, and a connection of the app's role."""

    def __init__(self, admin: asyncpg.Connection, app: asyncpg.Connection) -> None:
        self.admin = admin
        self.app = app
        self.here, self.there = new_id(), new_id()
        self._first: dict[tuple[str, UUID], UUID] = {}

    async def insert(self, connection: asyncpg.Connection, table: str, workspace: UUID) -> None:
        """Add a row of a workspace."""
        id_ = new_id()
        self._first.setdefault((table, workspace), id_)
        first = {name: str(made) for (name, of), made in self._first.items() if of == workspace}
        words = {"id": str(id_), "hex": id_.hex, **first}
        columns = ROWS[table] | {key_of(table): str(workspace)}
        row = json.dumps(columns)
        for word, value in words.items():
            row = row.replace("{" + word + "}", value)
        names = ", ".join(columns)
        await connection.execute(
            f"INSERT INTO {table} ({names}) SELECT {names} FROM jsonb_populate_record(NULL::{table}, $1::jsonb)", row
        )

    async def fill(self) -> None:
        await self.admin.execute(
            "INSERT INTO users (id, email, email_norm, email_verified) VALUES ($1, 'u@e.org', 'u@e.org', false)", USER
        )
        for workspace in (self.here, self.there):
            for table in ROWS:
                await self.insert(self.admin, table, workspace)

    async def count(self, table: str, workspace: UUID) -> int:
        query = f"SELECT count(*) FROM {table} WHERE {key_of(table)} = $1"
        found: int = await self.admin.fetchval(query, workspace)
        return found

    async def run(
        self, statement: str, *arguments: object, workspace: UUID | None = None, user: UUID = USER
    ) -> list[asyncpg.Record]:
        """Run a statement as the app, bound to the workspace `here` unless said otherwise."""
        async with self.app.transaction():
            await self.bind(workspace or self.here, user)
            found: list[asyncpg.Record] = await self.app.fetch(statement, *arguments)
            return found

    async def bind(self, workspace: UUID, user: UUID = USER) -> None:
        await self.app.execute(
            "SELECT set_config('app.workspace_id', $1, true), set_config('app.user_id', $2, true)",
            str(workspace), str(user),
        )  # fmt: skip


@pytest.fixture(scope="module")
async def tables(databases: TestDatabases) -> AsyncIterator[Tables]:
    """Shared by the tests here: what they try is refused, or taken back."""
    urls = await databases.create()
    admin = await asyncpg.connect(databases.postgres.admin_url(urls.name))
    app = await asyncpg.connect(asyncpg_dsn(urls.app))
    made = Tables(admin, app)
    await made.fill()
    yield made
    await app.close()
    await admin.close()
    await databases.drop(urls)


def may(table: str, right: str) -> bool:
    return right in RIGHTS.get(table, EVERYTHING)


def tables_where_the_app_may(right: str) -> list[str]:
    return [table for table in ROWS if may(table, right)]


async def test_every_tenant_table_has_a_row_here(tables: Tables) -> None:
    found = await tables.admin.fetch(
        "SELECT table_name FROM information_schema.columns"
        " WHERE table_schema = 'public' AND column_name = 'workspace_id' AND table_name <> 'sessions'"
    )

    assert {row["table_name"] for row in found} | {"workspaces"} == set(ROWS)


async def test_the_app_has_the_rights_that_stand_here(tables: Tables) -> None:
    for table in ROWS:
        given = {
            right
            for right in EVERYTHING
            if await tables.admin.fetchval("SELECT has_table_privilege('parley_app', $1, $2)", table, right)
        }
        assert given == set(RIGHTS.get(table, EVERYTHING)), table


@pytest.mark.parametrize("table", tables_where_the_app_may("SELECT"))
async def test_only_the_workspaces_rows_are_read(tables: Tables, table: str) -> None:
    rows = await tables.run(f"SELECT {key_of(table)} AS key FROM {table}")

    assert [row["key"] for row in rows] == [tables.here]


@pytest.mark.parametrize("table", tables_where_the_app_may("SELECT"))
async def test_without_a_workspace_there_are_no_rows(tables: Tables, table: str) -> None:
    # Before any binding, and after one: a setting that has ended is an empty text.
    assert await tables.app.fetch(f"SELECT FROM {table}") == []
    await tables.run("SELECT 1")
    assert await tables.app.fetch(f"SELECT FROM {table}") == []


@pytest.mark.parametrize("table", ROWS)
async def test_no_row_is_added_to_another_workspace(tables: Tables, table: str) -> None:
    before = await tables.count(table, tables.there)
    refused = "row-level security" if may(table, "INSERT") else "permission denied"

    async with tables.app.transaction():
        await tables.bind(tables.here)
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=refused):
            await tables.insert(tables.app, table, tables.there)
    assert await tables.count(table, tables.there) == before


@pytest.mark.parametrize("table", ROWS)
async def test_without_a_workspace_no_row_is_added(tables: Tables, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await tables.insert(tables.app, table, tables.here)


@pytest.mark.parametrize("table", tables_where_the_app_may("UPDATE"))
async def test_no_row_of_another_workspace_is_changed(tables: Tables, table: str) -> None:
    column = next(iter(ROWS[table].keys() - {"id"}))

    touched = await tables.run(
        f"UPDATE {table} SET {column} = {column} WHERE {key_of(table)} = $1 RETURNING 1", tables.there
    )

    assert touched == []


@pytest.mark.parametrize("table", tables_where_the_app_may("UPDATE"))
async def test_no_row_is_moved_to_another_workspace(tables: Tables, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await tables.run(f"UPDATE {table} SET {key_of(table)} = $1", new_id())

    assert await tables.count(table, tables.here) == 1


@pytest.mark.parametrize("table", tables_where_the_app_may("DELETE"))
async def test_no_row_of_another_workspace_is_deleted(tables: Tables, table: str) -> None:
    assert await tables.run(f"DELETE FROM {table} WHERE {key_of(table)} = $1 RETURNING 1", tables.there) == []
    assert await tables.count(table, tables.there) == 1


@pytest.mark.parametrize("table", ROWS)
async def test_nothing_is_truncated(tables: Tables, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await tables.run(f"TRUNCATE {table} CASCADE")


@pytest.mark.parametrize("table", OWNED)
async def test_another_users_rows_are_absent_in_the_same_workspace(tables: Tables, table: str) -> None:
    assert await tables.run(f"SELECT FROM {table}", user=STRANGER) == []
    rights = RIGHTS.get(table, EVERYTHING)
    if "DELETE" in rights:
        assert await tables.run(f"DELETE FROM {table} RETURNING 1", user=STRANGER) == []
    column = "owner_id" if table.startswith("channel_") else "user_id"
    if "UPDATE" in rights:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await tables.run(f"UPDATE {table} SET {column} = $1", STRANGER)
    async with tables.app.transaction():
        await tables.bind(tables.here, STRANGER)
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await tables.insert(tables.app, table, tables.here)


async def test_users_are_seen_through_a_membership_and_change_only_their_own_name(tables: Tables) -> None:
    nobody = new_id()
    assert [row["id"] for row in await tables.run("SELECT id FROM users")] == [USER]
    assert await tables.run("SELECT id FROM users", workspace=nobody) == []
    assert await tables.run("UPDATE users SET name = 'Ada' RETURNING 1") != []
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await tables.run("UPDATE users SET name = 'Eve'", user=STRANGER)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
        await tables.run("UPDATE users SET email = 'eve@example.com'")


@pytest.mark.parametrize("table", ["credentials", "sessions", "alembic_version"])
async def test_the_app_cannot_even_ask_for_credentials(tables: Tables, table: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
        await tables.run(f"SELECT count(*) FROM {table}")


async def test_the_functions_of_the_log_run_as_their_caller(tables: Tables) -> None:
    append = "SELECT * FROM realtime_append($1, ARRAY['user:x'], ARRAY[$2::uuid], ARRAY['notice'], ARRAY['{}'])"

    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await tables.run(append, tables.there, USER)


async def test_not_even_the_owner_of_the_tables_sees_rows(urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'W', true)", new_id())
    owner = await asyncpg.connect(asyncpg_dsn(urls.owner))
    try:
        assert await owner.fetchval("SELECT count(*) FROM workspaces") == 0
    finally:
        await owner.close()


# -- the helper of the migrations --------------------------------------------------------------------------------------


def test_a_protected_table_is_forced_and_checked_both_ways() -> None:
    statements: list[str] = []
    protect_tenant_table(statements.append, "notes", owner="user_id", app="SELECT")
    condition, own = "workspace_id = (SELECT app_workspace())", "user_id = (SELECT app_user())"

    assert statements == [
        "ALTER TABLE notes ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE notes FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY tenant ON notes FOR ALL TO parley_app USING ({condition}) WITH CHECK ({condition})",
        f"CREATE POLICY owner ON notes AS RESTRICTIVE FOR ALL TO parley_app USING ({own}) WITH CHECK ({own})",
        "GRANT SELECT ON notes TO parley_app",
    ]


def test_the_system_role_sees_a_table_only_when_asked_for() -> None:
    without: list[str] = []
    with_: list[str] = []
    protect_tenant_table(without.append, "notes")
    protect_tenant_table(with_.append, "notes", system="SELECT")

    assert [statement for statement in without if "parley_system" in statement] == []
    assert with_[: len(without)] == without
    assert with_[-1] == "GRANT SELECT ON notes TO parley_system"
