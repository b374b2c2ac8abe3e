"""The one helper that every migration uses for a tenant table, so that none is left open by hand.

`FOR ALL TO parley_app` with USING and WITH CHECK on `(SELECT app_workspace())`; FORCE, so that not even the owner is
exempt. `app_workspace()` is STABLE (an IMMUTABLE one is folded into a cached plan and leaks) and reads the setting
with NULLIF, since a setting that has ended is an empty text and not NULL.
"""

from collections.abc import Callable

FUNCTIONS = (
    """
    CREATE FUNCTION app_workspace() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog
    AS $$ SELECT NULLIF(current_setting('app.workspace_id', true), '')::uuid $$
    """,
    """
    CREATE FUNCTION app_user() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog
    AS $$ SELECT NULLIF(current_setting('app.user_id', true), '')::uuid $$
    """,
)


def protect_tenant_table(
    execute: Callable[[str], object],
    table: str,
    *,
    key: str = "workspace_id",
    owner: str | None = None,
    owner_may_be_null: bool = False,
    app: str = "SELECT, INSERT, UPDATE, DELETE",
    system: str | None = None,
) -> None:
    """Put a table under row-level security and grant what the roles need.

    `owner`: a column whose user alone sees the row (a second, RESTRICTIVE policy). `system`: the rights of the
    system role, with a policy of its own; None means that it sees nothing.
    """
    execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    condition = f"{key} = (SELECT app_workspace())"
    execute(f"CREATE POLICY tenant ON {table} FOR ALL TO parley_app USING ({condition}) WITH CHECK ({condition})")
    if owner:
        own = f"{owner} = (SELECT app_user())" + (f" OR {owner} IS NULL" if owner_may_be_null else "")
        execute(f"CREATE POLICY owner ON {table} AS RESTRICTIVE FOR ALL TO parley_app USING ({own}) WITH CHECK ({own})")
    execute(f"GRANT {app} ON {table} TO parley_app")
    if system:
        execute(f"CREATE POLICY system ON {table} FOR ALL TO parley_system USING (true) WITH CHECK (true)")
        execute(f"GRANT {system} ON {table} TO parley_system")
