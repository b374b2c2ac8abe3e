"""The log of live channels: heads, events, run records, tickets, and the two functions that append."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0020"
down_revision = "0010"
branch_labels = None
depends_on = None

# Append inside the caller's transaction. The upsert takes the heads' locks in channel order and holds them to the
# commit, so `seq` is dense and commit order is `seq` order.
APPEND = """
CREATE FUNCTION realtime_append(
    p_workspace uuid, p_channels text[], p_owners uuid[], p_events text[], p_data text[]
) RETURNS TABLE (ord integer, seq bigint, epoch text, at timestamptz)
LANGUAGE sql VOLATILE SET search_path = public, pg_catalog AS $$
    WITH input AS (
        SELECT i.ord::integer AS ord, i.channel, i.owner_id, i.e, i.d,
               row_number() OVER (PARTITION BY i.channel ORDER BY i.ord) AS n,
               count(*) OVER (PARTITION BY i.channel) AS total
        FROM unnest(p_channels, p_owners, p_events, p_data) WITH ORDINALITY AS i (channel, owner_id, e, d, ord)
    ), heads AS (
        INSERT INTO channel_heads AS h (workspace_id, channel, owner_id, seq)
        SELECT p_workspace, t.channel, t.owner_id, t.total
        FROM (SELECT DISTINCT channel, owner_id, total FROM input) t ORDER BY t.channel
        ON CONFLICT (workspace_id, channel) DO UPDATE SET seq = h.seq + EXCLUDED.seq
        RETURNING h.channel, h.seq, h.epoch
    ), written AS (
        INSERT INTO channel_events AS c (workspace_id, channel, seq, owner_id, e, d, at)
        SELECT p_workspace, i.channel, heads.seq - i.total + i.n, i.owner_id, i.e, i.d::json, clock_timestamp()
        FROM input i JOIN heads USING (channel)
        RETURNING c.channel, c.seq, c.at
    )
    SELECT i.ord, w.seq, heads.epoch::text, w.at
    FROM input i JOIN heads USING (channel)
    JOIN written w ON w.channel = i.channel AND w.seq = heads.seq - i.total + i.n
    ORDER BY i.ord
$$
"""

# One tick of a generating process: all its replies in one statement. A reply that is not in the answer was fenced (or
# has ended, or its count of events is not what the caller believed) and must be given up. The plan is pinned: left
# free it flips when statistics change and a tick takes five times as long. The planner takes an array for ten rows, so
# there is no join of one CTE with another: it would be a nested loop, and a tick of 400 replies took 110 ms instead of
# 5. A channel has one streaming reply at most, so a reply's events stand alone: those of reply `ix` follow the counts
# of the replies before it. `status || ''` keeps the index of all streaming replies out of it: only keys are looked up.
TICK = """
CREATE FUNCTION realtime_tick(
    p_owner bigint, p_lease interval, p_status text,
    p_workspaces uuid[], p_replies uuid[], p_fences integer[], p_appended bigint[], p_counts integer[],
    p_events text[], p_data text[]
) RETURNS TABLE (ix integer, base bigint, epoch text, cancel_requested boolean, at timestamptz)
LANGUAGE plpgsql VOLATILE
SET search_path = public, pg_catalog SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
DECLARE
    moment CONSTANT timestamptz := clock_timestamp();
BEGIN
    PERFORM 1 FROM channel_heads h
    JOIN (SELECT DISTINCT r.workspace_id, r.channel
          FROM unnest(p_workspaces, p_replies, p_counts) AS i (workspace_id, id, n)
          JOIN replies r ON r.workspace_id = i.workspace_id AND r.id = i.id WHERE i.n > 0) t
      ON t.workspace_id = h.workspace_id AND t.channel = h.channel
    ORDER BY h.workspace_id, h.channel FOR UPDATE OF h;

    RETURN QUERY
    WITH input AS (
        SELECT i.ord::integer AS ix, i.workspace_id, i.id, i.fence, i.appended, i.n,
               (sum(i.n) OVER (ORDER BY i.ord) - i.n)::integer AS before
        FROM unnest(p_workspaces, p_replies, p_fences, p_appended, p_counts)
             WITH ORDINALITY AS i (workspace_id, id, fence, appended, n, ord)
    ), held AS (
        UPDATE replies r
        SET lease_until = moment + p_lease, appended = r.appended + i.n, status = coalesce(p_status, r.status),
            ended_at = CASE WHEN p_status IS NULL THEN NULL ELSE moment END
        FROM input i
        WHERE r.workspace_id = i.workspace_id AND r.id = i.id AND r.owner = p_owner AND r.fence = i.fence
          AND r.appended = i.appended AND r.status || '' = 'streaming'
        RETURNING i.ix, r.workspace_id, r.channel, i.n, i.before, r.cancel_requested
    ), heads AS (
        UPDATE channel_heads c SET seq = c.seq + h.n
        FROM held h
        WHERE h.n > 0 AND c.workspace_id = h.workspace_id AND c.channel = h.channel
        RETURNING h.ix, h.n, h.before, h.cancel_requested,
                  c.workspace_id, c.channel, c.owner_id, c.seq - h.n AS base, c.epoch
    ), written AS (
        INSERT INTO channel_events (workspace_id, channel, seq, owner_id, e, d, at)
        SELECT h.workspace_id, h.channel, h.base + k, h.owner_id, p_events[h.before + k],
               p_data[h.before + k]::json, moment
        FROM heads h, generate_series(1, h.n) AS k
    )
    SELECT h.ix, h.base, h.epoch::text, h.cancel_requested, moment FROM heads h
    UNION ALL
    SELECT h.ix, NULL, NULL, h.cancel_requested, moment FROM held h WHERE h.n = 0;
END
$$
"""


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE channel_heads (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_channel_heads_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            channel varchar(200) NOT NULL,
            owner_id uuid,
            seq bigint NOT NULL,
            floor bigint NOT NULL DEFAULT 0,
            epoch varchar(16) NOT NULL DEFAULT substr(md5(gen_random_uuid()::text), 1, 8),
            CONSTRAINT pk_channel_heads PRIMARY KEY (workspace_id, channel)
        ) WITH (fillfactor = 50)
        """
    )
    op.execute(
        """
        CREATE TABLE channel_events (
            workspace_id uuid NOT NULL,
            channel varchar(200) NOT NULL,
            seq bigint NOT NULL,
            owner_id uuid,
            e varchar(40) NOT NULL,
            d json NOT NULL,
            at timestamptz NOT NULL,
            CONSTRAINT pk_channel_events PRIMARY KEY (workspace_id, channel, seq)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE replies (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_replies_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            channel varchar(200) NOT NULL,
            user_id uuid NOT NULL,
            question_id uuid NOT NULL,
            status varchar(16) NOT NULL CONSTRAINT ck_replies_status
                CHECK (status IN ('queued', 'streaming', 'completed', 'failed', 'cancelled')),
            options json NOT NULL,
            owner bigint,
            fence integer NOT NULL,
            attempt integer NOT NULL,
            appended bigint NOT NULL,
            start_seq bigint NOT NULL,
            lease_until timestamptz,
            cancel_requested boolean NOT NULL,
            cancelled_by uuid,
            provider_cursor varchar(400),
            created_at timestamptz NOT NULL DEFAULT now(),
            ended_at timestamptz,
            CONSTRAINT pk_replies PRIMARY KEY (workspace_id, id)
        ) WITH (fillfactor = 50)
        """
    )
    op.execute("CREATE UNIQUE INDEX uq_replies_streaming ON replies (workspace_id, channel) WHERE status = 'streaming'")
    op.execute(
        "CREATE INDEX ix_replies_open ON replies (workspace_id, channel, id) WHERE status IN ('queued', 'streaming')"
    )
    op.execute(
        """
        CREATE TABLE realtime_tickets (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_realtime_tickets_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            hash bytea NOT NULL,
            user_id uuid NOT NULL,
            session_id uuid,
            expires_at timestamptz NOT NULL,
            CONSTRAINT pk_realtime_tickets PRIMARY KEY (workspace_id, hash)
        )
        """
    )
    everything = "SELECT, INSERT, UPDATE, DELETE"
    for table in ("channel_heads", "channel_events"):
        protect_tenant_table(op.execute, table, owner="owner_id", owner_may_be_null=True, system=everything)
    protect_tenant_table(op.execute, "replies", system=everything)
    protect_tenant_table(op.execute, "realtime_tickets", app="INSERT", system="SELECT, DELETE")
    op.execute(APPEND)
    op.execute(TICK)


def downgrade() -> None:
    """Take back."""
    op.execute("DROP FUNCTION realtime_tick")
    op.execute("DROP FUNCTION realtime_append")
    for table in ("realtime_tickets", "replies", "channel_events", "channel_heads"):
        op.execute(f"DROP TABLE {table}")
