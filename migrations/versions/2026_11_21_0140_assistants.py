"""Assistants of a workspace, and approvals of tool calls."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0140"
down_revision = "0130"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE assistants (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_assistants_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            name varchar(64) NOT NULL,
            title varchar(100) NOT NULL,
            description varchar(1000) NOT NULL,
            instructions varchar(16000) NOT NULL,
            model varchar(100),
            tools json,
            approval varchar(8) NOT NULL
                CONSTRAINT ck_assistants_approval CHECK (approval IN ('always', 'writes', 'never')),
            approval_tools json NOT NULL,
            parameters json NOT NULL,
            created_by uuid,
            version integer NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_assistants PRIMARY KEY (workspace_id, id),
            CONSTRAINT uq_assistants_workspace_id_name UNIQUE (workspace_id, name)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE tool_approvals (
            workspace_id uuid NOT NULL,
            id uuid NOT NULL,
            reply_id uuid NOT NULL,
            user_id uuid NOT NULL,
            tool varchar(64) NOT NULL,
            arguments json NOT NULL,
            arguments_hash bytea NOT NULL,
            approved boolean,
            decided_by uuid,
            decided_at timestamptz,
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL,
            CONSTRAINT pk_tool_approvals PRIMARY KEY (workspace_id, id),
            CONSTRAINT fk_tool_approvals_workspace_id_reply_id FOREIGN KEY (workspace_id, reply_id)
                REFERENCES messages (workspace_id, id) ON DELETE CASCADE
        )
        """
    )
    op.execute("CREATE INDEX ix_tool_approvals_reply ON tool_approvals (workspace_id, reply_id)")
    protect_tenant_table(op.execute, "assistants")
    # A call runs with the rights of whoever asked: nobody else sees that it waits, or lets it through.
    protect_tenant_table(op.execute, "tool_approvals", owner="user_id")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE tool_approvals")
    op.execute("DROP TABLE assistants")
