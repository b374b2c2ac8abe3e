"""Conversations and messages."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0030"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE conversations (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_conversations_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            owner_id uuid NOT NULL,
            title varchar(200),
            model varchar(100),
            assistant varchar(64) NOT NULL,
            current_id uuid,
            shared boolean NOT NULL,
            archived boolean NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_conversations PRIMARY KEY (workspace_id, id)
        ) WITH (fillfactor = 80)
        """
    )
    op.execute(
        "CREATE INDEX ix_conversations_owner ON conversations (workspace_id, owner_id, updated_at DESC, id DESC)"
    )
    op.execute(
        """
        CREATE TABLE messages (
            workspace_id uuid NOT NULL,
            id uuid NOT NULL,
            conversation_id uuid NOT NULL,
            parent_id uuid,
            role varchar(16) NOT NULL CONSTRAINT ck_messages_role CHECK (role IN ('user', 'assistant', 'system')),
            parts json NOT NULL,
            status varchar(16) NOT NULL CONSTRAINT ck_messages_status
                CHECK (status IN ('queued', 'streaming', 'completed', 'failed', 'cancelled')),
            model varchar(100),
            usage json,
            cost numeric(18, 8),
            error json,
            author_id uuid NOT NULL,
            cid uuid,
            body_hash bytea,
            prompt_path varchar(200),
            prompt_hash varchar(64),
            created_at timestamptz NOT NULL DEFAULT now(),
            completed_at timestamptz,
            CONSTRAINT pk_messages PRIMARY KEY (workspace_id, id),
            CONSTRAINT uq_messages_workspace_id_author_id_cid UNIQUE (workspace_id, author_id, cid),
            CONSTRAINT fk_messages_workspace_id_conversation_id FOREIGN KEY (workspace_id, conversation_id)
                REFERENCES conversations (workspace_id, id) ON DELETE CASCADE,
            CONSTRAINT fk_messages_workspace_id_parent_id FOREIGN KEY (workspace_id, parent_id)
                REFERENCES messages (workspace_id, id)
        )
        """
    )
    op.execute("CREATE INDEX ix_messages_conversation ON messages (workspace_id, conversation_id, id)")
    op.execute("CREATE INDEX ix_messages_parent_id ON messages (workspace_id, parent_id)")
    protect_tenant_table(op.execute, "conversations")
    protect_tenant_table(op.execute, "messages")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE messages")
    op.execute("DROP TABLE conversations")
