"""Workspaces, memberships, users, credentials, sessions; the functions that every policy asks."""

from alembic import op

from parley.core.row_level_security import FUNCTIONS, protect_tenant_table

revision = "0010"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    for function in FUNCTIONS:
        op.execute(function)
    op.execute(
        """
        CREATE TABLE users (
            id uuid CONSTRAINT pk_users PRIMARY KEY,
            email varchar(320) NOT NULL,
            email_norm varchar(320) NOT NULL CONSTRAINT uq_users_email_norm UNIQUE,
            name varchar(200),
            email_verified boolean NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute(
        """
        CREATE TABLE workspaces (
            id uuid CONSTRAINT pk_workspaces PRIMARY KEY,
            name varchar(100) NOT NULL,
            personal boolean NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute(
        """
        CREATE TABLE memberships (
            workspace_id uuid NOT NULL,
            user_id uuid NOT NULL,
            role varchar(16) NOT NULL CONSTRAINT ck_memberships_role
                CHECK (role IN ('viewer', 'member', 'admin', 'owner')),
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_memberships PRIMARY KEY (workspace_id, user_id),
            CONSTRAINT fk_memberships_workspace_id FOREIGN KEY (workspace_id)
                REFERENCES workspaces (id) ON DELETE CASCADE,
            CONSTRAINT fk_memberships_user_id FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE
        )
        """
    )
    op.execute("CREATE INDEX ix_memberships_user_id ON memberships (user_id, workspace_id)")
    op.execute(
        """
        CREATE TABLE credentials (
            user_id uuid CONSTRAINT pk_credentials PRIMARY KEY
                CONSTRAINT fk_credentials_user_id REFERENCES users (id) ON DELETE CASCADE,
            password_hash varchar(255) NOT NULL,
            updated_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute(
        """
        CREATE TABLE sessions (
            id uuid CONSTRAINT pk_sessions PRIMARY KEY,
            user_id uuid NOT NULL CONSTRAINT fk_sessions_user_id REFERENCES users (id) ON DELETE CASCADE,
            workspace_id uuid NOT NULL
                CONSTRAINT fk_sessions_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            counter integer NOT NULL,
            salt bytea NOT NULL,
            user_agent varchar(400),
            created_at timestamptz NOT NULL DEFAULT now(),
            rotated_at timestamptz NOT NULL DEFAULT now(),
            idle_expires_at timestamptz NOT NULL,
            absolute_expires_at timestamptz NOT NULL,
            revoked_at timestamptz,
            revoke_reason varchar(32)
        )
        """
    )
    op.execute("CREATE INDEX ix_sessions_user_id ON sessions (user_id)")

    protect_tenant_table(op.execute, "workspaces", key="id", app="SELECT, UPDATE", system="SELECT, INSERT")
    protect_tenant_table(op.execute, "memberships", app="SELECT", system="SELECT, INSERT")
    # Global tables: the system role alone, and for users whoever shares the workspace that is bound.
    for table, rights in (
        ("users", "SELECT, INSERT, UPDATE"),
        ("credentials", "SELECT, INSERT, UPDATE"),
        ("sessions", "SELECT, INSERT, UPDATE"),
    ):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} FOR ALL TO parley_system USING (true) WITH CHECK (true)")
        op.execute(f"GRANT {rights} ON {table} TO parley_system")
    op.execute(
        """
        CREATE POLICY member ON users FOR ALL TO parley_app
        USING (EXISTS (SELECT 1 FROM memberships m WHERE m.user_id = users.id
                       AND m.workspace_id = (SELECT app_workspace())))
        WITH CHECK (id = (SELECT app_user()))
        """
    )
    op.execute("GRANT SELECT, UPDATE (name) ON users TO parley_app")
    # A process asks whether the schema is the one that it was written for.
    op.execute("GRANT SELECT ON alembic_version TO parley_system")


def downgrade() -> None:
    """Take back."""
    for table in ("sessions", "credentials", "memberships", "workspaces", "users"):
        op.execute(f"DROP TABLE {table} CASCADE")
    op.execute("DROP FUNCTION app_workspace()")
    op.execute("DROP FUNCTION app_user()")
