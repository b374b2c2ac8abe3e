"""Accounts: devices of sessions, failed sign-ins, one-time tokens, other issuers' users, erasure."""

from alembic import op

revision = "0050"
down_revision = "0040"
branch_labels = None
depends_on = None

# Global tables: the system role alone.
TABLES = {
    "one_time_tokens": "SELECT, INSERT, UPDATE, DELETE",
    "identities": "SELECT, INSERT, UPDATE, DELETE",
    "webhook_events": "SELECT, INSERT, DELETE",
    "erasures": "SELECT, INSERT, UPDATE, DELETE",
}


def upgrade() -> None:
    """Apply."""
    # `email_norm` is what an account signs in with; users of other issuers have none, so that two may have one address.
    op.execute("ALTER TABLE users ALTER COLUMN email DROP NOT NULL, ALTER COLUMN email_norm DROP NOT NULL")
    op.execute(
        """
        ALTER TABLE users
            ADD COLUMN disabled_at timestamptz,
            ADD COLUMN tokens_valid_after timestamptz
        """
    )
    op.execute(
        """
        ALTER TABLE credentials
            ADD COLUMN failures integer NOT NULL DEFAULT 0,
            ADD COLUMN failed_at timestamptz
        """
    )
    op.execute(
        """
        ALTER TABLE sessions
            ADD COLUMN cookie boolean NOT NULL DEFAULT false,
            ADD COLUMN address varchar(45),
            ADD COLUMN last_used_at timestamptz NOT NULL DEFAULT now()
        """
    )
    op.execute(
        """
        CREATE TABLE one_time_tokens (
            id uuid CONSTRAINT pk_one_time_tokens PRIMARY KEY,
            user_id uuid NOT NULL CONSTRAINT fk_one_time_tokens_user_id REFERENCES users (id) ON DELETE CASCADE,
            purpose varchar(32) NOT NULL,
            hash bytea NOT NULL,
            email varchar(320),
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL,
            used_at timestamptz
        )
        """
    )
    op.execute("CREATE INDEX ix_one_time_tokens_user_id ON one_time_tokens (user_id, purpose)")
    op.execute(
        """
        CREATE TABLE identities (
            issuer varchar(64) NOT NULL,
            subject varchar(255) NOT NULL,
            user_id uuid CONSTRAINT fk_identities_user_id REFERENCES users (id) ON DELETE SET NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz,
            deleted_at timestamptz,
            CONSTRAINT pk_identities PRIMARY KEY (issuer, subject)
        )
        """
    )
    op.execute("CREATE INDEX ix_identities_user_id ON identities (user_id)")
    op.execute(
        """
        CREATE TABLE webhook_events (
            source varchar(64) NOT NULL,
            event_id varchar(255) NOT NULL,
            received_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_webhook_events PRIMARY KEY (source, event_id)
        )
        """
    )
    # The ledger of erased people outlives them: after a restore it is applied again. No key to `users`.
    op.execute(
        """
        CREATE TABLE erasures (
            user_id uuid CONSTRAINT pk_erasures PRIMARY KEY,
            requested_at timestamptz NOT NULL DEFAULT now(),
            erase_after timestamptz NOT NULL,
            erased_at timestamptz
        )
        """
    )
    for table, rights in TABLES.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY system ON {table} FOR ALL TO parley_system USING (true) WITH CHECK (true)")
        op.execute(f"GRANT {rights} ON {table} TO parley_system")
    op.execute("GRANT DELETE ON users, credentials, sessions TO parley_system")


def downgrade() -> None:
    """Take back."""
    op.execute("REVOKE DELETE ON users, credentials, sessions FROM parley_system")
    for table in reversed(TABLES):
        op.execute(f"DROP TABLE {table}")
    op.execute("ALTER TABLE sessions DROP COLUMN cookie, DROP COLUMN address, DROP COLUMN last_used_at")
    op.execute("ALTER TABLE credentials DROP COLUMN failures, DROP COLUMN failed_at")
    op.execute("ALTER TABLE users DROP COLUMN disabled_at, DROP COLUMN tokens_valid_after")
    op.execute("DELETE FROM users WHERE email_norm IS NULL OR email IS NULL")
    op.execute("ALTER TABLE users ALTER COLUMN email SET NOT NULL, ALTER COLUMN email_norm SET NOT NULL")
