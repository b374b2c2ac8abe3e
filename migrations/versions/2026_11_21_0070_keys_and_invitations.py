"""API keys and invitations."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0070"
down_revision = "0060"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE api_keys (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_api_keys_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            user_id uuid NOT NULL,
            name varchar(100) NOT NULL,
            prefix varchar(32) NOT NULL,
            last_four varchar(4) NOT NULL,
            hash bytea NOT NULL,
            scopes json NOT NULL,
            expires_at timestamptz,
            last_used_at timestamptz,
            revoked_at timestamptz,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_api_keys PRIMARY KEY (workspace_id, id),
            CONSTRAINT fk_api_keys_user_id FOREIGN KEY (workspace_id, user_id)
                REFERENCES memberships (workspace_id, user_id) ON DELETE CASCADE
        )
        """
    )
    op.execute("CREATE INDEX ix_api_keys_user_id ON api_keys (workspace_id, user_id, id)")
    protect_tenant_table(
        op.execute, "api_keys", owner="user_id", app="SELECT, INSERT, UPDATE", system="SELECT, UPDATE, DELETE"
    )
    # A ticket stands for the credential that asked for it: a session, an API key, or another issuer's token.
    op.execute(
        """
        ALTER TABLE realtime_tickets
            ADD COLUMN key_id uuid, ADD COLUMN issuer varchar(64), ADD COLUMN subject varchar(255)
        """
    )
    op.execute(
        """
        CREATE TABLE invitations (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_invitations_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            email varchar(320) NOT NULL,
            email_norm varchar(320) NOT NULL,
            role varchar(16) NOT NULL CONSTRAINT ck_invitations_role
                CHECK (role IN ('viewer', 'member', 'admin', 'owner')),
            invited_by uuid NOT NULL,
            hash bytea,
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL,
            accepted_at timestamptz,
            revoked_at timestamptz,
            CONSTRAINT pk_invitations PRIMARY KEY (workspace_id, id)
        )
        """
    )
    op.execute(
        """
        CREATE UNIQUE INDEX uq_invitations_open ON invitations (workspace_id, email_norm)
        WHERE accepted_at IS NULL AND revoked_at IS NULL
        """
    )
    protect_tenant_table(op.execute, "invitations", app="SELECT, INSERT, UPDATE", system="SELECT, UPDATE, DELETE")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE invitations")
    op.execute("ALTER TABLE realtime_tickets DROP COLUMN key_id, DROP COLUMN issuer, DROP COLUMN subject")
    op.execute("DROP TABLE api_keys")
