"""Several processes: the provider's cursor is committed with the text that it stands behind."""

from alembic import op

revision = "0110"
down_revision = "0100"
branch_labels = None
depends_on = None

# As before (0020), with one more: where the provider's stream can be read on from, once these events are written. An
# empty text takes it away, NULL leaves it.
TICK = """
CREATE FUNCTION realtime_tick(
    p_owner bigint, p_lease interval, p_status text,
    p_workspaces uuid[], p_replies uuid[], p_fences integer[], p_appended bigint[], p_counts integer[],
    p_events text[], p_data text[], p_cursors text[]
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
        SELECT i.ord::integer AS ix, i.workspace_id, i.id, i.fence, i.appended, i.n, i.cursor,
               (sum(i.n) OVER (ORDER BY i.ord) - i.n)::integer AS before
        FROM unnest(p_workspaces, p_replies, p_fences, p_appended, p_counts, p_cursors)
             WITH ORDINALITY AS i (workspace_id, id, fence, appended, n, cursor, ord)
    ), held AS (
        UPDATE replies r
        SET lease_until = moment + p_lease, appended = r.appended + i.n, status = coalesce(p_status, r.status),
            ended_at = CASE WHEN p_status IS NULL THEN NULL ELSE moment END,
            provider_cursor = CASE WHEN i.cursor IS NULL THEN r.provider_cursor ELSE nullif(i.cursor, '') END
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

BEFORE = """
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
    op.execute("DROP FUNCTION realtime_tick")
    op.execute(TICK)


def downgrade() -> None:
    """Take back."""
    op.execute("DROP FUNCTION realtime_tick")
    op.execute(BEFORE)
