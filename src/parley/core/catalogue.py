"""What PostgreSQL's catalogue says of a database that is to be served: roles, policies, version."""

from typing import Final

ROLE_FAULTS: Final = """
    WITH me AS (SELECT * FROM pg_roles WHERE rolname = current_user),
    tables AS (
        SELECT c.oid, c.relname, c.relowner FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND n.nspname = 'public'
    )
    SELECT 1 AS rank, 'logs in as a superuser or with BYPASSRLS' AS fault FROM me WHERE rolsuper OR rolbypassrls
    UNION ALL
    SELECT 2, 'logs in as the owner of the tables' FROM me WHERE EXISTS (SELECT FROM tables WHERE relowner = me.oid)
    UNION ALL
    SELECT 3, 'is a member of ' || string_agg(m.roleid::regrole::text, ', ' ORDER BY m.roleid)
    FROM pg_auth_members m JOIN me ON m.member = me.oid HAVING count(*) > 0
    UNION ALL
    SELECT 4, 'may create roles or databases, or replicate' FROM me WHERE rolcreaterole OR rolcreatedb OR rolreplication
    UNION ALL
    SELECT 5, format('may %s %s', right_.name, min(t.relname)) FROM tables t, me,
        unnest(ARRAY['TRUNCATE', 'REFERENCES', 'TRIGGER']) AS right_ (name)
    WHERE has_table_privilege(me.oid, t.oid, right_.name) GROUP BY right_.name
    UNION ALL
    SELECT 6, 'may create in schema public' FROM me WHERE has_schema_privilege(me.oid, 'public', 'CREATE')
    UNION ALL
    SELECT 7, 'may create schemas' FROM me WHERE has_database_privilege(me.oid, current_database(), 'CREATE')
    ORDER BY 1, 2
"""
"""What is wrong with the role of the connection, one row each, the worst first. The first two imply the others."""

POLICY_FAULTS: Final = """
    WITH tables AS (
        SELECT c.oid, c.relname, c.relrowsecurity, c.relforcerowsecurity,
               EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'workspace_id')
                   AND c.relname <> 'sessions' AS tenant
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND n.nspname = 'public' AND c.relname <> 'alembic_version'
    )
    SELECT relname || ': row-level security is off' FROM tables WHERE NOT relrowsecurity
    UNION ALL
    SELECT relname || ': row-level security is not forced' FROM tables WHERE NOT relforcerowsecurity
    UNION ALL
    SELECT t.relname || ': no policy compares the workspace' FROM tables t WHERE t.tenant AND NOT EXISTS (
        SELECT FROM pg_policy p WHERE p.polrelid = t.oid AND p.polpermissive AND p.polcmd = '*'
          AND 'parley_app'::regrole::oid = ANY(p.polroles)
          AND pg_get_expr(p.polqual, p.polrelid) = '(workspace_id = ( SELECT app_workspace() AS app_workspace))'
          AND pg_get_expr(p.polwithcheck, p.polrelid) = '(workspace_id = ( SELECT app_workspace() AS app_workspace))')
    UNION ALL
    SELECT t.relname || ': policy ' || p.polname || ' opens it to more' FROM tables t
    JOIN pg_policy p ON p.polrelid = t.oid
    WHERE t.tenant AND p.polpermissive AND p.polroles && ARRAY['parley_app'::regrole::oid, 0::oid]
      AND pg_get_expr(p.polqual, p.polrelid) <> '(workspace_id = ( SELECT app_workspace() AS app_workspace))'
    ORDER BY 1
"""
"""What is wrong with row-level security, one row each."""

# The least release of each line in which row-level security holds (CVE-2025-8713, CVE-2023-2455).
_FIXED_IN = {16: 160010, 17: 170006}
_LEAST_MAJOR = 16


def version_fault(server_version_num: int) -> str | None:
    """Return what is wrong with a release of PostgreSQL, by its `server_version_num`; None if nothing is."""
    major, minor = divmod(server_version_num, 10_000)
    if major < _LEAST_MAJOR:
        return f"PostgreSQL {major}.{minor} is too old: {_LEAST_MAJOR} is the least"
    fixed = _FIXED_IN.get(major)
    if fixed is not None and server_version_num < fixed:
        last = f"{major}.{fixed % 10_000}"
        return f"PostgreSQL {major}.{minor} can show rows past row-level security (CVE-2025-8713): {last} does not"
    return None
