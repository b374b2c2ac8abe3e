"""The schema keeps workspaces apart; a schema that does not is noticed, and why it must be is shown."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.ids import new_id
from tests.architecture.catalogue import OWNED_TABLES, RULES, violations
from tests.conftest import TestDatabases


@dataclass(frozen=True)
class Mutant:
    """A change that breaks the schema, and all that the rules must then say."""

    name: str
    sql: str
    found: dict[str, list[str]]


_TENANT = "(workspace_id = ( SELECT app_workspace() AS app_workspace))"
_PERMISSIVE = "every permissive policy of the app compares the workspace, in USING and in WITH CHECK"
_ALL_COMMANDS = "the app has a policy for all commands on every tenant table"
_FOREIGN_KEYS = "foreign keys between tenant tables hold the workspace on both sides"
_UNPRIVILEGED = "roles are unprivileged"
_ONLY_ROWS = "roles that serve only read and write rows"
_CREATE_NOTHING = "roles that serve create nothing"
_CLOSED = "the app has no right to credentials and sessions"

MUTANTS = (
    Mutant("policy dropped", "DROP POLICY tenant ON tasks", {_ALL_COMMANDS: ["tasks"]}),
    Mutant(
        "row-level security not forced",
        "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",
        {"row-level security is forced": ["tasks"]},
    ),
    Mutant(
        "row-level security disabled",
        "ALTER TABLE messages DISABLE ROW LEVEL SECURITY",
        {"row-level security is enabled": ["messages"]},
    ),
    Mutant(
        "row-level security disabled on a global table",
        "ALTER TABLE users DISABLE ROW LEVEL SECURITY",
        {"row-level security is enabled": ["users"]},
    ),
    Mutant(
        "policy without WITH CHECK",
        "DROP POLICY tenant ON tasks;"
        "CREATE POLICY tenant ON tasks FOR ALL TO parley_app USING (workspace_id = (SELECT app_workspace()))",
        {_PERMISSIVE: [f"tasks.tenant: USING {_TENANT}, WITH CHECK nothing"]},
    ),
    Mutant(
        "policy for SELECT only",
        "DROP POLICY tenant ON tasks;"
        "CREATE POLICY tenant ON tasks FOR SELECT TO parley_app USING (workspace_id = (SELECT app_workspace()))",
        {
            _ALL_COMMANDS: ["tasks"],
            _PERMISSIVE: [f"tasks.tenant: USING {_TENANT}, WITH CHECK nothing"],
        },
    ),
    Mutant(
        "policy that checks less than it shows",
        "ALTER POLICY tenant ON messages WITH CHECK (true)",
        {_PERMISSIVE: [f"messages.tenant: USING {_TENANT}, WITH CHECK true"]},
    ),
    Mutant(
        "one more policy, which opens the table",
        "CREATE POLICY shared ON conversations FOR ALL TO PUBLIC USING (true) WITH CHECK (true)",
        {
            _PERMISSIVE: ["conversations.shared: USING true, WITH CHECK true"],
            "the system role sees only the tables on its list": ["conversations.shared"],
        },
    ),
    Mutant(
        "system role let in",
        "CREATE POLICY system ON tasks FOR ALL TO parley_system USING (true) WITH CHECK (true)",
        {"the system role sees only the tables on its list": ["tasks.system"]},
    ),
    Mutant(
        "owner's policy dropped",
        "DROP POLICY owner ON channel_events",
        {"tables of one owner have a restrictive policy on the user": ["channel_events"]},
    ),
    Mutant(
        "owner's policy made permissive",
        "DROP POLICY owner ON tasks; CREATE POLICY owner ON tasks FOR ALL TO parley_app"
        " USING (user_id = (SELECT app_user())) WITH CHECK (user_id = (SELECT app_user()))",
        {
            "tables of one owner have a restrictive policy on the user": ["tasks"],
            _PERMISSIVE: [
                f"tasks.owner: USING {OWNED_TABLES['tasks']}, WITH CHECK {OWNED_TABLES['tasks']}",
            ],
        },
    ),
    Mutant(
        "users opened to everyone",
        "ALTER POLICY member ON users USING (true)",
        {"the app sees global rows only through a membership of its workspace": ["users.member"]},
    ),
    Mutant(
        "function made IMMUTABLE",
        "ALTER FUNCTION app_workspace() IMMUTABLE",
        {"functions that policies ask are stable": ["app_workspace()"]},
    ),
    Mutant(
        "function without a pinned search_path",
        "ALTER FUNCTION app_user() RESET search_path",
        {"functions run as their caller and with a pinned search_path": ["app_user()"]},
    ),
    Mutant(
        "function that runs as its owner",
        "CREATE FUNCTION peek() RETURNS bigint LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public"
        " AS 'SELECT count(*) FROM tasks'",
        {"functions run as their caller and with a pinned search_path": ["peek()"]},
    ),
    Mutant(
        "function without NULLIF",
        "CREATE OR REPLACE FUNCTION app_workspace() RETURNS uuid LANGUAGE sql STABLE SET search_path = pg_catalog"
        " AS $$ SELECT current_setting('app.workspace_id', true)::uuid $$",
        {"functions that policies ask read the setting with missing_ok and NULLIF": ["app_workspace()"]},
    ),
    Mutant(
        "foreign key narrowed to one column",
        "ALTER TABLE messages DROP CONSTRAINT fk_messages_workspace_id_conversation_id;"
        "CREATE UNIQUE INDEX uq_conversations_id ON conversations (id);"
        "ALTER TABLE messages ADD CONSTRAINT fk_narrow FOREIGN KEY (conversation_id) REFERENCES conversations (id)",
        {
            _FOREIGN_KEYS: ["fk_narrow on messages"],
            "unique indexes lead with the workspace": ["uq_conversations_id on conversations"],
        },
    ),
    Mutant(
        "foreign key that crosses its columns",
        "ALTER TABLE messages ADD CONSTRAINT fk_crossed FOREIGN KEY (conversation_id, workspace_id)"
        " REFERENCES conversations (workspace_id, id)",
        {_FOREIGN_KEYS: ["fk_crossed on messages"]},
    ),
    Mutant(
        "unique index without the workspace",
        "CREATE UNIQUE INDEX uq_conversations_title ON conversations (title)",
        {"unique indexes lead with the workspace": ["uq_conversations_title on conversations"]},
    ),
    Mutant(
        "unique index on an expression",
        "CREATE UNIQUE INDEX uq_tasks_title ON tasks (lower(title), workspace_id)",
        {"unique indexes lead with the workspace": ["uq_tasks_title on tasks"]},
    ),
    Mutant(
        "index without the workspace",
        "CREATE INDEX ix_messages_created_at ON messages (created_at)",
        {"other indexes lead with the workspace": ["ix_messages_created_at on messages"]},
    ),
    Mutant(
        "workspace may be null and is not in the primary key",
        "ALTER TABLE tasks DROP CONSTRAINT pk_tasks, ADD CONSTRAINT pk_tasks PRIMARY KEY (id);"
        "ALTER TABLE tasks ALTER COLUMN workspace_id DROP NOT NULL",
        {
            "the workspace is never null": ["tasks"],
            "the workspace comes first in the primary key": ["tasks"],
        },
    ),
    Mutant(
        "workspace second in the primary key",
        "ALTER TABLE tasks DROP CONSTRAINT pk_tasks, ADD CONSTRAINT pk_tasks PRIMARY KEY (id, workspace_id)",
        {"the workspace comes first in the primary key": ["tasks"]},
    ),
    Mutant(
        "new tenant table without protection",
        "CREATE TABLE notes (workspace_id uuid NOT NULL, id uuid NOT NULL, PRIMARY KEY (workspace_id, id))",
        {
            "row-level security is enabled": ["notes"],
            "row-level security is forced": ["notes"],
            _ALL_COMMANDS: ["notes"],
        },
    ),
    Mutant(
        "new table of no workspace",
        "CREATE TABLE notes (id uuid PRIMARY KEY); ALTER TABLE notes ENABLE ROW LEVEL SECURITY;"
        "ALTER TABLE notes FORCE ROW LEVEL SECURITY",
        {"tables are of a workspace or on the list of global ones": ["public.notes"]},
    ),
    Mutant(
        "table outside the schema",
        "CREATE SCHEMA other; CREATE TABLE other.sessions (id uuid PRIMARY KEY);"
        "ALTER TABLE other.sessions ENABLE ROW LEVEL SECURITY; ALTER TABLE other.sessions FORCE ROW LEVEL SECURITY",
        {"tables are of a workspace or on the list of global ones": ["other.sessions"]},
    ),
    Mutant(
        "view that asks as its owner",
        "CREATE VIEW all_tasks AS SELECT * FROM tasks",
        {"views ask as their caller": ["all_tasks"]},
    ),
    Mutant(
        "materialised view",
        "CREATE MATERIALIZED VIEW task_counts AS SELECT workspace_id, count(*) FROM tasks GROUP BY 1",
        {"no materialised view": ["task_counts"]},
    ),
    Mutant(
        "TRUNCATE granted",
        "GRANT TRUNCATE ON tasks TO parley_app",
        {_ONLY_ROWS: ["parley_app may TRUNCATE tasks"]},
    ),
    Mutant(
        "REFERENCES granted to everyone",
        "GRANT REFERENCES ON conversations TO PUBLIC",
        {_ONLY_ROWS: ["parley_app may REFERENCES conversations", "parley_system may REFERENCES conversations"]},
    ),
    Mutant("BYPASSRLS", "ALTER ROLE parley_app BYPASSRLS", {_UNPRIVILEGED: ["parley_app: BYPASSRLS"]}),
    Mutant(
        "superuser",
        "ALTER ROLE parley_owner SUPERUSER CREATEDB",
        {_UNPRIVILEGED: ["parley_owner: SUPERUSER, CREATEDB"]},
    ),
    Mutant(
        "member of the owner",
        "GRANT parley_owner TO parley_app WITH INHERIT FALSE",
        {"roles that serve are members of no other": ["parley_app is a member of parley_owner"]},
    ),
    Mutant(
        "owner of a view",
        "CREATE VIEW mine WITH (security_invoker = true) AS SELECT 1 AS one; ALTER VIEW mine OWNER TO parley_app",
        {"roles that serve own nothing": ["parley_app owns mine"]},
    ),
    Mutant(
        "may create in public",
        "GRANT CREATE ON SCHEMA public TO parley_app",
        {_CREATE_NOTHING: ["parley_app may create in schema public"]},
    ),
    Mutant("credentials granted", "GRANT SELECT ON credentials TO parley_app", {_CLOSED: ["SELECT credentials"]}),
    Mutant(
        "one column of sessions granted",
        "GRANT UPDATE (revoked_at) ON sessions TO parley_app",
        {_CLOSED: ["UPDATE sessions"]},
    ),
)


@pytest.fixture(scope="module")
async def schema(databases: TestDatabases) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection to a migrated database."""
    urls = await databases.create()
    connection = await asyncpg.connect(databases.postgres.admin_url(urls.name))
    yield connection
    await connection.close()
    await databases.drop(urls)


@pytest.fixture
async def changed(schema: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """The same in a transaction that is rolled back: tables, policies and the attributes of roles come back."""
    transaction = schema.transaction()
    await transaction.start()
    yield schema
    await transaction.rollback()


async def test_the_schema_holds(schema: asyncpg.Connection) -> None:
    assert await violations(schema) == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
async def test_a_broken_schema_is_noticed(changed: asyncpg.Connection, mutant: Mutant) -> None:
    await changed.execute(mutant.sql)

    assert await violations(changed) == mutant.found


def test_every_rule_has_a_mutant() -> None:
    assert {rule for mutant in MUTANTS for rule in mutant.found} == set(RULES)


# -- why ---------------------------------------------------------------------------------------------------------


class TwoWorkspaces:
    """A connection of the app's role and two workspaces with a conversation each."""

    def __init__(self, app: asyncpg.Connection, admin: asyncpg.Connection) -> None:
        self.app = app
        self.admin = admin
        self.here, self.there, self.user = new_id(), new_id(), new_id()
        self.conversation_there = new_id()

    async def fill(self) -> None:
        for workspace in (self.here, self.there):
            await self.admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'W', true)", workspace)
        await self.add_conversation(self.here, new_id())
        await self.add_conversation(self.there, self.conversation_there)

    async def add_conversation(self, workspace: UUID, id: UUID) -> None:
        await self.admin.execute(
            "INSERT INTO conversations (workspace_id, id, owner_id, assistant, shared, archived)"
            " VALUES ($1, $2, $3, 'general', false, false)",
            workspace, id, self.user,
        )  # fmt: skip

    async def bind(self, workspace: UUID) -> None:
        await self.app.execute("SELECT set_config('app.workspace_id', $1, true)", str(workspace))

    async def add_message(self, conversation: UUID) -> None:
        await self.app.execute(
            "INSERT INTO messages (workspace_id, id, conversation_id, role, parts, status, author_id)"
            " VALUES ($1, $2, $3, 'user', '[]', 'completed', $4)",
            self.here, new_id(), conversation, self.user,
        )  # fmt: skip


@pytest.fixture
async def two(urls: DatabaseUrls, admin: asyncpg.Connection) -> AsyncIterator[TwoWorkspaces]:
    app = await asyncpg.connect(asyncpg_dsn(urls.app))
    made = TwoWorkspaces(app, admin)
    await made.fill()
    yield made
    await app.close()


async def _read_through_a_cached_plan(two: TwoWorkspaces) -> list[Any]:
    """Read as one workspace and then as the other with the same prepared statement and its generic plan."""
    await two.app.execute("SET plan_cache_mode = force_generic_plan")
    statement = await two.app.prepare("SELECT workspace_id FROM conversations")
    seen = []
    for workspace in (two.there, two.here):
        async with two.app.transaction():
            await two.bind(workspace)
            seen.append([row["workspace_id"] for row in await statement.fetch()])
    return seen


async def test_a_stable_function_is_asked_in_every_transaction(two: TwoWorkspaces) -> None:
    assert await _read_through_a_cached_plan(two) == [[two.there], [two.here]]


async def test_an_immutable_function_leaks_through_a_cached_plan(two: TwoWorkspaces) -> None:
    await two.admin.execute("ALTER FUNCTION app_workspace() IMMUTABLE")

    assert await _read_through_a_cached_plan(two) == [[two.there], [two.there]]


async def test_a_row_cannot_point_into_another_workspace(two: TwoWorkspaces) -> None:
    async with two.app.transaction():
        await two.bind(two.here)
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await two.add_message(two.conversation_there)


async def test_through_a_foreign_key_of_one_column_it_can(two: TwoWorkspaces) -> None:
    await two.admin.execute(
        "ALTER TABLE messages DROP CONSTRAINT fk_messages_workspace_id_conversation_id;"
        "CREATE UNIQUE INDEX uq_conversations_id ON conversations (id);"
        "ALTER TABLE messages ADD FOREIGN KEY (conversation_id) REFERENCES conversations (id) ON DELETE CASCADE"
    )

    async with two.app.transaction():
        await two.bind(two.here)
        assert await two.app.fetchval("SELECT count(*) FROM conversations WHERE id = $1", two.conversation_there) == 0
        await two.add_message(two.conversation_there)

    # Whoever deletes the conversation there deletes the message here.
    await two.admin.execute("DELETE FROM conversations WHERE id = $1", two.conversation_there)
    assert await two.admin.fetchval("SELECT count(*) FROM messages") == 0


async def test_a_unique_value_would_tell_of_another_workspace(two: TwoWorkspaces) -> None:
    await two.admin.execute("CREATE UNIQUE INDEX uq_conversations_title ON conversations (title)")
    await two.admin.execute("UPDATE conversations SET title = 'Secret' WHERE id = $1", two.conversation_there)

    async with two.app.transaction():
        await two.bind(two.here)
        with pytest.raises(asyncpg.UniqueViolationError):
            await two.app.execute("UPDATE conversations SET title = 'Secret'")


async def test_a_view_of_the_owner_shows_every_workspace(two: TwoWorkspaces) -> None:
    """A superuser's view: what any view without `security_invoker` is on a server where one migrates as such."""
    await two.admin.execute(
        "CREATE VIEW open AS SELECT id FROM conversations; GRANT SELECT ON open TO parley_app;"
        "CREATE VIEW invoker WITH (security_invoker = true) AS SELECT id FROM conversations;"
        "GRANT SELECT ON invoker TO parley_app"
    )

    async with two.app.transaction():
        await two.bind(two.here)
        assert await two.app.fetchval("SELECT count(*) FROM open") == 2
        assert await two.app.fetchval("SELECT count(*) FROM invoker") == 1
