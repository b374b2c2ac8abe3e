"""A workspace's own keys of model providers."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0170"
down_revision = "0160"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE provider_keys (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_provider_keys_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            provider varchar(100) NOT NULL,
            sealed bytea NOT NULL,
            last_four varchar(4) NOT NULL,
            base_url varchar(2048),
            given_for varchar(2048) NOT NULL,
            created_by uuid,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_provider_keys PRIMARY KEY (workspace_id, provider)
        )
        """
    )
    # The system role reads them for every process, and seals them anew when the secret has changed.
    protect_tenant_table(op.execute, "provider_keys", system="SELECT, UPDATE")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE provider_keys")
