"""Files that messages carry."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0160"
down_revision = "0150"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE attachments (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_attachments_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            user_id uuid NOT NULL,
            conversation_id uuid,
            kind varchar(16) NOT NULL CONSTRAINT ck_attachments_kind CHECK (kind IN ('image', 'file', 'import')),
            media_type varchar(100) NOT NULL,
            name varchar(200) NOT NULL,
            size bigint NOT NULL,
            sha256 bytea NOT NULL,
            width integer,
            height integer,
            store varchar(16) NOT NULL CONSTRAINT ck_attachments_store CHECK (store IN ('postgres', 's3')),
            complete boolean NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_attachments PRIMARY KEY (workspace_id, id),
            CONSTRAINT fk_attachments_workspace_id_conversation_id FOREIGN KEY (workspace_id, conversation_id)
                REFERENCES conversations (workspace_id, id) ON DELETE CASCADE
        )
        """
    )
    op.execute("CREATE INDEX ix_attachments_conversation ON attachments (workspace_id, conversation_id)")
    op.execute("CREATE INDEX ix_attachments_user_id ON attachments (workspace_id, user_id, id)")
    # What no message has: few at any time, so the whole index is read for the oldest.
    op.execute(
        "CREATE INDEX ix_attachments_unused ON attachments (workspace_id, created_at) WHERE conversation_id IS NULL"
    )
    op.execute(
        """
        CREATE TABLE attachment_chunks (
            workspace_id uuid NOT NULL,
            attachment_id uuid NOT NULL,
            number integer NOT NULL,
            data bytea NOT NULL CONSTRAINT ck_attachment_chunks_size CHECK (octet_length(data) <= 262144),
            CONSTRAINT pk_attachment_chunks PRIMARY KEY (workspace_id, attachment_id, number),
            CONSTRAINT fk_attachment_chunks_workspace_id_attachment_id FOREIGN KEY (workspace_id, attachment_id)
                REFERENCES attachments (workspace_id, id) ON DELETE CASCADE
        )
        """
    )
    # Images are compressed already.
    op.execute("ALTER TABLE attachment_chunks ALTER COLUMN data SET STORAGE EXTERNAL")
    # One row for every object that may be in the bucket, written before the object. No key to what it belongs to: the
    # row outlives it, so that whatever removed an attachment, its object is found and removed too.
    op.execute(
        """
        CREATE TABLE stored_objects (
            workspace_id uuid NOT NULL,
            id uuid NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_stored_objects PRIMARY KEY (workspace_id, id)
        )
        """
    )
    protect_tenant_table(op.execute, "attachments", system="SELECT, DELETE")
    protect_tenant_table(op.execute, "attachment_chunks", app="SELECT, INSERT, DELETE")
    protect_tenant_table(op.execute, "stored_objects", app="SELECT, INSERT", system="SELECT, DELETE")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE stored_objects")
    op.execute("DROP TABLE attachment_chunks")
    op.execute("DROP TABLE attachments")
