"""The outbox: work that must happen, written in the transaction of its cause."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0060"
down_revision = "0050"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # No key to `workspaces`: work of the installation itself has the nil workspace. A trigger removes what is left.
    op.execute(
        """
        CREATE TABLE jobs (
            workspace_id uuid NOT NULL,
            id uuid NOT NULL,
            user_id uuid,
            kind varchar(64) NOT NULL,
            status varchar(16) NOT NULL DEFAULT 'queued' CONSTRAINT ck_jobs_status
                CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
            payload json NOT NULL,
            dedupe_key varchar(128),
            progress json,
            result json,
            error varchar(500),
            attempts integer NOT NULL DEFAULT 0,
            max_attempts integer NOT NULL,
            run_at timestamptz NOT NULL DEFAULT now(),
            owner uuid,
            lease_until timestamptz,
            created_at timestamptz NOT NULL DEFAULT now(),
            started_at timestamptz,
            finished_at timestamptz,
            CONSTRAINT pk_jobs PRIMARY KEY (workspace_id, id)
        ) WITH (fillfactor = 70)
        """
    )
    op.execute(
        """
        CREATE UNIQUE INDEX uq_jobs_dedupe_key ON jobs (workspace_id, kind, dedupe_key)
        WHERE dedupe_key IS NOT NULL
        """
    )
    op.execute("CREATE INDEX ix_jobs_due ON jobs (workspace_id, run_at) WHERE status = 'queued'")
    op.execute("CREATE INDEX ix_jobs_running ON jobs (workspace_id, lease_until) WHERE status = 'running'")
    op.execute("CREATE INDEX ix_jobs_user_id ON jobs (workspace_id, user_id, id)")
    protect_tenant_table(
        op.execute,
        "jobs",
        owner="user_id",
        owner_may_be_null=True,
        app="SELECT, INSERT",
        system="SELECT, INSERT, UPDATE, DELETE",
    )


def downgrade() -> None:
    """Take back."""
    op.execute("DROP TABLE jobs")
