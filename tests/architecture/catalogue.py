"""What must hold of the schema for the isolation of workspaces: one query per rule, each row a violation in words.

The lists here are the only places where a table or an index is excepted; a new table stands on none of them.
"""

from typing import Any

# Rows that belong to no workspace. `sessions` has a `workspace_id` as data: where the next token is for.
CLOSED_TO_THE_APP = (
    "credentials", "sessions", "one_time_tokens", "identities", "webhook_events", "erasures", "exports",
    "export_chunks", "alembic_version",
)  # fmt: skip
GLOBAL_TABLES = ("users", *CLOSED_TO_THE_APP)

# Table → the condition of its second, RESTRICTIVE policy.
OWNED_TABLES = {
    "tasks": "(user_id = ( SELECT app_user() AS app_user))",
    "api_keys": "(user_id = ( SELECT app_user() AS app_user))",
    "idempotency_keys": "(user_id = ( SELECT app_user() AS app_user))",
    "tool_approvals": "(user_id = ( SELECT app_user() AS app_user))",
    "jobs": "((user_id = ( SELECT app_user() AS app_user)) OR (user_id IS NULL))",
    "channel_heads": "((owner_id = ( SELECT app_user() AS app_user)) OR (owner_id IS NULL))",
    "channel_events": "((owner_id = ( SELECT app_user() AS app_user)) OR (owner_id IS NULL))",
}

# Tenant tables that the system role may see past all workspaces, with a policy `USING (true)`.
SYSTEM_TABLES = (
    "workspaces", "memberships", "channel_heads", "channel_events", "replies", "realtime_tickets",
    "jobs", "api_keys", "invitations", "idempotency_keys", "audit_events",
    "usage_entries", "budgets", "budget_counters", "usage_reservations",
    "attachments", "stored_objects", "provider_keys",
)  # fmt: skip

# Indexes of tenant tables that do not lead with the workspace. Sign-in asks by user, before there is a workspace;
# retention asks for what is old, whosever it is.
UNSCOPED_INDEXES = ("ix_memberships_user_id", "ix_channel_events_ended", "ix_channel_events_at")

ROLES = ("parley_app", "parley_system", "parley_owner")
RUNTIME_ROLES = ("parley_app", "parley_system")


def _list(values: tuple[str, ...]) -> str:
    return ", ".join(f"'{value}'" for value in values)


# Every table of ours, with the column that holds its workspace and the condition that its policy must have.
_TABLES = f"""
    tables AS (
        SELECT c.oid, n.nspname AS schema, c.relname AS name, c.relrowsecurity, c.relforcerowsecurity,
               c.relname IN ({_list(GLOBAL_TABLES)}) AS global,
               CASE WHEN c.relname = 'workspaces' THEN 'id' ELSE 'workspace_id' END AS key
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'f') AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
    ), tenants AS (
        SELECT t.*, a.attnum, a.attnotnull,
               format('(%I = ( SELECT app_workspace() AS app_workspace))', t.key) AS condition
        FROM tables t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attname = t.key AND NOT a.attisdropped
        WHERE NOT t.global
    )
"""

# A policy with the roles that it is for; 0 is PUBLIC.
_POLICIES = """
    policies AS (
        SELECT p.oid, p.polrelid, p.polname AS name, p.polcmd, p.polpermissive,
               pg_get_expr(p.polqual, p.polrelid) AS using_, pg_get_expr(p.polwithcheck, p.polrelid) AS check_,
               p.polroles && ARRAY['parley_app'::regrole::oid, 0] AS for_app,
               p.polroles && ARRAY['parley_system'::regrole::oid, 0] AS for_system
        FROM pg_policy p
    )
"""

RULES: dict[str, str] = {
    "tables are of a workspace or on the list of global ones": f"""
        WITH {_TABLES}
        SELECT format('%s.%s', t.schema, t.name) FROM tables t
        WHERE t.schema <> 'public' OR (NOT t.global AND t.oid NOT IN (SELECT oid FROM tenants))
    """,
    "row-level security is enabled": f"""
        WITH {_TABLES}
        SELECT t.name FROM tables t WHERE NOT t.relrowsecurity AND t.name <> 'alembic_version'
    """,
    "row-level security is forced": f"""
        WITH {_TABLES}
        SELECT t.name FROM tables t WHERE NOT t.relforcerowsecurity AND t.name <> 'alembic_version'
    """,
    "the app has a policy for all commands on every tenant table": f"""
        WITH {_TABLES}, {_POLICIES}
        SELECT t.name FROM tenants t WHERE NOT EXISTS (
            SELECT 1 FROM policies p WHERE p.polrelid = t.oid AND p.polpermissive AND p.polcmd = '*' AND p.for_app)
    """,
    # Permissive policies are joined with OR: one that says anything else opens the table.
    "every permissive policy of the app compares the workspace, in USING and in WITH CHECK": f"""
        WITH {_TABLES}, {_POLICIES}
        SELECT format('%s.%s: USING %s, WITH CHECK %s', t.name, p.name, coalesce(p.using_, 'nothing'),
                      coalesce(p.check_, 'nothing'))
        FROM tenants t JOIN policies p ON p.polrelid = t.oid
        WHERE p.polpermissive AND p.for_app
          AND (p.using_ IS DISTINCT FROM t.condition OR p.check_ IS DISTINCT FROM t.condition)
    """,
    "the app sees global rows only through a membership of its workspace": f"""
        WITH {_TABLES}, {_POLICIES}
        SELECT format('%s.%s', t.name, p.name) FROM tables t JOIN policies p ON p.polrelid = t.oid
        WHERE t.global AND p.polpermissive AND p.for_app
          AND (p.using_ !~ 'FROM memberships m\\s+WHERE .*m\\.workspace_id = \\( SELECT app_workspace\\(\\)'
               OR p.check_ IS DISTINCT FROM '(id = ( SELECT app_user() AS app_user))')
    """,
    "tables of one owner have a restrictive policy on the user": f"""
        WITH {_POLICIES}, owned (name, condition) AS (VALUES {
        ", ".join(f"('{name}', '{condition}')" for name, condition in OWNED_TABLES.items())
    })
        SELECT o.name FROM owned o WHERE NOT EXISTS (
            SELECT 1 FROM policies p WHERE p.polrelid = to_regclass(o.name) AND NOT p.polpermissive AND p.polcmd = '*'
              AND p.for_app AND p.using_ = o.condition AND p.check_ = o.condition)
    """,
    "the system role sees only the tables on its list": f"""
        WITH {_TABLES}, {_POLICIES}
        SELECT format('%s.%s', t.name, p.name) FROM tenants t JOIN policies p ON p.polrelid = t.oid
        WHERE p.for_system AND p.polpermissive AND t.name NOT IN ({_list(SYSTEM_TABLES)})
    """,
    "the workspace is never null": f"""
        WITH {_TABLES} SELECT t.name FROM tenants t WHERE NOT t.attnotnull
    """,
    "the workspace comes first in the primary key": f"""
        WITH {_TABLES}
        SELECT t.name FROM tenants t LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indisprimary
        WHERE i.indkey[0] IS DISTINCT FROM t.attnum
    """,
    # A conflict on a unique value tells that another workspace has it.
    "unique indexes lead with the workspace": f"""
        WITH {_TABLES}
        SELECT format('%s on %s', i.indexrelid::regclass, t.name) FROM tenants t JOIN pg_index i ON i.indrelid = t.oid
        WHERE i.indisunique AND NOT i.indisprimary AND i.indkey[0] IS DISTINCT FROM t.attnum
    """,
    "other indexes lead with the workspace": f"""
        WITH {_TABLES}
        SELECT format('%s on %s', c.relname, t.name)
        FROM tenants t JOIN pg_index i ON i.indrelid = t.oid JOIN pg_class c ON c.oid = i.indexrelid
        WHERE NOT i.indisunique AND i.indkey[0] IS DISTINCT FROM t.attnum
          AND c.relname NOT IN ({_list(UNSCOPED_INDEXES)})
    """,
    # Referential checks go past row-level security: without the workspace a row can point into another one.
    "foreign keys between tenant tables hold the workspace on both sides": f"""
        WITH {_TABLES}
        SELECT format('%s on %s', con.conname, a.name)
        FROM pg_constraint con JOIN tenants a ON a.oid = con.conrelid JOIN tenants b ON b.oid = con.confrelid
        WHERE con.contype = 'f' AND NOT EXISTS (
            SELECT 1 FROM unnest(con.conkey, con.confkey) AS k (here, there)
            WHERE k.here = a.attnum AND k.there = b.attnum)
    """,
    "functions that policies ask are stable": """
        SELECT DISTINCT f.oid::regprocedure::text FROM pg_depend d JOIN pg_proc f ON f.oid = d.refobjid
        WHERE d.classid = 'pg_policy'::regclass AND d.refclassid = 'pg_proc'::regclass AND f.provolatile <> 's'
    """,
    # A setting that has ended is an empty text, which is no uuid; one that was never set is an error without `true`.
    "functions that policies ask read the setting with missing_ok and NULLIF": """
        SELECT DISTINCT f.oid::regprocedure::text FROM pg_depend d JOIN pg_proc f ON f.oid = d.refobjid
        WHERE d.classid = 'pg_policy'::regclass AND d.refclassid = 'pg_proc'::regclass
          AND f.prosrc !~ 'NULLIF\\(current_setting\\(''app\\.[a-z_]+'', true\\), ''''\\)::uuid'
    """,
    "functions run as their caller and with a pinned search_path": """
        SELECT f.oid::regprocedure::text FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace
        WHERE n.nspname = 'public'
          AND (f.prosecdef OR NOT EXISTS (SELECT 1 FROM unnest(f.proconfig) s WHERE s LIKE 'search_path=%'))
    """,
    "views ask as their caller": """
        SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'v' AND n.nspname = 'public' AND NOT EXISTS (
            SELECT 1 FROM pg_options_to_table(c.reloptions) o
            WHERE o.option_name = 'security_invoker' AND o.option_value IN ('true', 'on'))
    """,
    # Row-level security does not reach what was copied.
    "no materialised view": """
        SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'm' AND n.nspname = 'public'
    """,
    "roles are unprivileged": f"""
        SELECT r.rolname || ': ' || concat_ws(', ',
            CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolbypassrls THEN 'BYPASSRLS' END,
            CASE WHEN rolcreaterole THEN 'CREATEROLE' END, CASE WHEN rolcreatedb THEN 'CREATEDB' END,
            CASE WHEN rolreplication THEN 'REPLICATION' END)
        FROM pg_roles r WHERE r.rolname IN ({_list(ROLES)})
          AND (rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication)
    """,
    "roles that serve are members of no other": f"""
        SELECT format('%s is a member of %s', m.member::regrole, m.roleid::regrole) FROM pg_auth_members m
        WHERE m.member::regrole::text IN ({_list(RUNTIME_ROLES)})
    """,
    "roles that serve own nothing": f"""
        SELECT format('%s owns %s', c.relowner::regrole, c.relname) FROM pg_class c
        WHERE c.relowner::regrole::text IN ({_list(RUNTIME_ROLES)})
        UNION ALL
        SELECT format('%s owns %s', f.proowner::regrole, f.oid::regprocedure) FROM pg_proc f
        WHERE f.proowner::regrole::text IN ({_list(RUNTIME_ROLES)})
    """,
    "roles that serve only read and write rows": f"""
        WITH {_TABLES}
        SELECT format('%s may %s %s', role, p.privilege, t.name)
        FROM tables t, unnest(ARRAY[{_list(RUNTIME_ROLES)}]) AS role,
             unnest(ARRAY['TRUNCATE', 'REFERENCES', 'TRIGGER']) AS p (privilege)
        WHERE has_table_privilege(role, t.oid, p.privilege)
    """,
    "roles that serve create nothing": f"""
        SELECT format('%s may create in schema %s', role, n.nspname)
        FROM pg_namespace n, unnest(ARRAY[{_list(RUNTIME_ROLES)}]) AS role
        WHERE n.nspname NOT LIKE 'pg\\_%' AND has_schema_privilege(role, n.oid, 'CREATE')
        UNION ALL
        SELECT format('%s may create schemas', role) FROM unnest(ARRAY[{_list(RUNTIME_ROLES)}]) AS role
        WHERE has_database_privilege(role, current_database(), 'CREATE')
    """,
    "the app has no right to credentials and sessions": f"""
        SELECT format('%s %s', p.privilege, c.name)
        FROM unnest(ARRAY[{_list(CLOSED_TO_THE_APP)}]) AS c (name),
             unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS p (privilege)
        WHERE has_any_column_privilege('parley_app', c.name, p.privilege)
        UNION ALL
        SELECT format('DELETE %s', name) FROM unnest(ARRAY[{_list(CLOSED_TO_THE_APP)}]) AS c (name)
        WHERE has_table_privilege('parley_app', name, 'DELETE')
    """,
}


async def violations(connection: Any) -> dict[str, list[str]]:
    """Return what each broken rule found; empty when the schema holds."""
    found = {rule: sorted(row[0] for row in await connection.fetch(query)) for rule, query in RULES.items()}
    return {rule: rows for rule, rows in found.items() if rows}
