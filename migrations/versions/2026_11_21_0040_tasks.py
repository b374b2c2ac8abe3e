"""Tasks."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0040"
down_revision = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE tasks (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_tasks_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            user_id uuid NOT NULL,
            title varchar(200) NOT NULL,
            description varchar(5000),
            completed boolean NOT NULL,
            due_at timestamptz,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_tasks PRIMARY KEY (workspace_id, id)
        )
        """
    )
    op.execute("CREATE INDEX ix_tasks_user_id ON tasks (workspace_id, user_id, id)")
    protect_tenant_table(op.execute, "tasks", owner="user_id")


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE tasks")
