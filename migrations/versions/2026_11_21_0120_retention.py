"""Retention: what has had its time is found by index, in a log of any size."""

from alembic import op

revision = "0120"
down_revision = "0110"
branch_labels = None
depends_on = None

# Deltas are most of the log, and in none of these: writing one costs no more than the test of the conditions. Trimming
# takes a row out of all three, so that each is its own list of work.
INDEXES = (
    # Ends of replies.
    """
    CREATE INDEX ix_channel_events_ended ON channel_events (at)
    WHERE e IN ('reply.completed', 'reply.failed', 'reply.cancelled')
    """,
    # All that is kept for its own age.
    "CREATE INDEX ix_channel_events_at ON channel_events (at) WHERE e <> 'reply.delta'",
    # One row in a thousand: a channel with many of these is a long one.
    "CREATE INDEX ix_channel_events_thousands ON channel_events (workspace_id, channel) WHERE seq % 1000 = 0",
)


def upgrade() -> None:
    """Apply."""
    for index in INDEXES:
        op.execute(index)


def downgrade() -> None:
    """Take back."""
    for name in ("thousands", "at", "ended"):
        op.execute(f"DROP INDEX ix_channel_events_{name}")
