"""The audit log: what touched access. It is only added to."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0090"
down_revision = "0080"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # No key to `workspaces`: records of the installation itself have the nil workspace.
    op.execute(
        """
        CREATE TABLE audit_events (
            workspace_id uuid NOT NULL,
            id uuid NOT NULL,
            at timestamptz NOT NULL DEFAULT now(),
            actor varchar(16) NOT NULL CONSTRAINT ck_audit_events_actor
                CHECK (actor IN ('user', 'key', 'issuer', 'operator', 'system', 'anonymous')),
            user_id uuid,
            credential_id uuid,
            action varchar(64) NOT NULL,
            outcome varchar(16) NOT NULL CONSTRAINT ck_audit_events_outcome CHECK (outcome IN ('success', 'failure')),
            target varchar(200),
            address varchar(45),
            user_agent varchar(400),
            request_id varchar(64),
            details json NOT NULL,
            CONSTRAINT pk_audit_events PRIMARY KEY (workspace_id, id)
        )
        """
    )
    op.execute("CREATE INDEX ix_audit_events_user_id ON audit_events (workspace_id, user_id, id)")
    protect_tenant_table(op.execute, "audit_events", app="SELECT, INSERT", system="SELECT, INSERT, UPDATE, DELETE")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE audit_events")
