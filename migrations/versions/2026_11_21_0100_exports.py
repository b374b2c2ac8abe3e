"""Exports of a user's data, in pieces; and what a workspace leaves behind when it is deleted."""

from alembic import op

revision = "0100"
down_revision = "0090"
branch_labels = None
depends_on = None

TABLES = ("exports", "export_chunks")

# Tables that hold a workspace's rows without a foreign key to it. The others go by ON DELETE CASCADE.
FORGET = """
CREATE FUNCTION forget_workspace() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, public AS $$
BEGIN
    DELETE FROM public.channel_events WHERE workspace_id = OLD.id;
    DELETE FROM public.jobs WHERE workspace_id = OLD.id;
    DELETE FROM public.audit_events WHERE workspace_id = OLD.id;
    RETURN NULL;
END
$$
"""


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE exports (
            id uuid CONSTRAINT pk_exports PRIMARY KEY,
            user_id uuid NOT NULL CONSTRAINT fk_exports_user_id REFERENCES users (id) ON DELETE CASCADE,
            hash bytea,
            size bigint NOT NULL DEFAULT 0,
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL,
            downloaded_at timestamptz
        )
        """
    )
    op.execute("CREATE INDEX ix_exports_user_id ON exports (user_id)")
    op.execute(
        """
        CREATE TABLE export_chunks (
            export_id uuid NOT NULL
                CONSTRAINT fk_export_chunks_export_id REFERENCES exports (id) ON DELETE CASCADE,
            number integer NOT NULL,
            data bytea NOT NULL,
            CONSTRAINT pk_export_chunks PRIMARY KEY (export_id, number)
        )
        """
    )
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} FOR ALL TO parley_system USING (true) WITH CHECK (true)")
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO parley_system")
    op.execute(FORGET)
    op.execute(
        """
        CREATE TRIGGER forget_workspace AFTER DELETE ON workspaces
        FOR EACH ROW EXECUTE FUNCTION forget_workspace()
        """
    )
    op.execute("GRANT UPDATE, DELETE ON workspaces, memberships TO parley_system")


def downgrade() -> None:
    """Take back."""
    op.execute("REVOKE UPDATE, DELETE ON workspaces, memberships FROM parley_system")
    op.execute("DROP TRIGGER forget_workspace ON workspaces")
    op.execute("DROP FUNCTION forget_workspace()")
    for table in reversed(TABLES):
        op.execute(f"DROP TABLE {table}")
