"""Answers of creating requests, kept so that a repeated one gets the first answer again."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0080"
down_revision = "0070"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE idempotency_keys (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_idempotency_keys_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            user_id uuid NOT NULL,
            hash bytea NOT NULL,
            fingerprint bytea NOT NULL,
            status integer NOT NULL,
            headers json NOT NULL,
            body bytea NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL,
            CONSTRAINT pk_idempotency_keys PRIMARY KEY (workspace_id, user_id, hash)
        )
        """
    )
    protect_tenant_table(
        op.execute,
        "idempotency_keys",
        owner="user_id",
        app="SELECT, INSERT, UPDATE, DELETE",
        system="SELECT, INSERT, UPDATE, DELETE",
    )


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE idempotency_keys")
