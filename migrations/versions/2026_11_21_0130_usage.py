"""What models cost: the ledger of calls, budgets and what is reserved of them."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0130"
down_revision = "0120"
branch_labels = None
depends_on = None

# The first day of the period of a budget that a moment is in. Days and months are those of UTC.
STARTS_ON = """
CREATE FUNCTION usage_starts_on(p_period text, p_at timestamptz) RETURNS date LANGUAGE sql STABLE
SET search_path = pg_catalog AS $$
    SELECT CASE p_period WHEN 'day' THEN (p_at AT TIME ZONE 'UTC')::date
                         ELSE date_trunc('month', p_at AT TIME ZONE 'UTC')::date END
$$
"""

# Makes the counters of some budgets for the period of a moment, where there are none. A budget that is made in the
# middle of a period begins with what the ledger says was spent.
OPEN = """
CREATE FUNCTION usage_open_counters(p_workspace uuid, p_budgets uuid[], p_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_catalog AS $$
BEGIN
    INSERT INTO budget_counters (workspace_id, budget_id, starts_on, spent)
    SELECT p_workspace, b.id, s.starts_on,
           usage_spent(p_workspace, b.user_id, b.key_id, b.operator, b.period, s.starts_on)
    FROM budgets b, LATERAL (SELECT usage_starts_on(b.period, p_at) AS starts_on) s
    WHERE b.workspace_id = p_workspace AND b.id = ANY(p_budgets)
      AND NOT EXISTS (SELECT FROM budget_counters c
                      WHERE c.workspace_id = p_workspace AND c.budget_id = b.id AND c.starts_on = s.starts_on)
    ORDER BY b.id
    ON CONFLICT DO NOTHING;
END
$$
"""

# What the ledger says of a budget's subject in one period. An operator's ceiling is about the operator's keys.
SPENT = """
CREATE FUNCTION usage_spent(
    p_workspace uuid, p_user uuid, p_key uuid, p_operator boolean, p_period text, p_starts_on date
) RETURNS numeric LANGUAGE sql STABLE SET search_path = public, pg_catalog AS $$
    SELECT coalesce(sum(e.cost), 0) FROM usage_entries e
    WHERE e.workspace_id = p_workspace
      AND e.started_at >= p_starts_on::timestamp AT TIME ZONE 'UTC'
      AND e.started_at < (p_starts_on + CASE p_period WHEN 'day' THEN interval '1 day' ELSE interval '1 month' END)
                         AT TIME ZONE 'UTC'
      AND (p_user IS NULL OR e.user_id = p_user) AND (p_key IS NULL OR e.key_id = p_key)
      AND NOT (p_operator AND e.own_key)
$$
"""

# Makes the rows that count for the operator's ceilings of the settings, where there are none. What such a ceiling is
# stands in the settings and is given with each call: it holds for all workspaces as soon as it is changed.
OPEN_CEILINGS = """
CREATE FUNCTION usage_open_ceilings(p_workspace uuid, p_day numeric, p_month numeric) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_catalog AS $$
BEGIN
    INSERT INTO budgets (workspace_id, id, period, alert_at, operator)
    SELECT p_workspace, gen_random_uuid(), p.period, 0.8, true
    FROM (VALUES ('day', p_day), ('month', p_month)) AS p (period, ceiling)
    WHERE p.ceiling IS NOT NULL AND EXISTS (SELECT FROM workspaces w WHERE w.id = p_workspace)
      AND NOT EXISTS (SELECT FROM budgets b WHERE b.workspace_id = p_workspace AND b.operator AND b.period = p.period)
    ON CONFLICT DO NOTHING;
END
$$
"""

# What a budget allows. An operator's has an amount of its own, or that of the settings; NULL when it has neither.
CEILING = """
CREATE FUNCTION usage_ceiling(p_own numeric, p_period text, p_day numeric, p_month numeric) RETURNS numeric
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog AS $$
    SELECT coalesce(p_own, CASE p_period WHEN 'day' THEN p_day ELSE p_month END)
$$
"""

# Reserves, and returns nothing; or returns the budget that has nothing left, and has done nothing. A reservation of
# the same id is replaced. Without budgets nothing is locked, and only a reservation that is to expire is kept: when its
# process is lost, it says what to put into the ledger. Counters are locked in the order of their budgets and periods.
RESERVE = """
CREATE FUNCTION usage_reserve(
    p_workspace uuid, p_user uuid, p_key uuid, p_id uuid, p_conversation uuid, p_message uuid, p_purpose text,
    p_provider text, p_model text, p_amount numeric, p_input_tokens integer, p_input_cost numeric,
    p_own_key boolean, p_by_operator boolean, p_at timestamptz, p_expires_at timestamptz, p_day numeric, p_month numeric
) RETURNS TABLE (subject text, period text, operator boolean)
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_catalog AS $$
DECLARE
    ids uuid[];
    held usage_reservations;
BEGIN
    IF p_by_operator THEN
        PERFORM usage_open_ceilings(p_workspace, p_day, p_month);
    END IF;
    SELECT array_agg(b.id ORDER BY b.id) INTO ids FROM budgets b
    WHERE b.workspace_id = p_workspace
      AND (b.user_id IS NULL AND b.key_id IS NULL OR b.user_id = p_user OR b.key_id = p_key)
      AND NOT (b.operator AND (NOT p_by_operator OR usage_ceiling(b.ceiling, b.period, p_day, p_month) IS NULL));
    IF ids IS NULL AND p_expires_at IS NULL THEN
        RETURN;
    END IF;
    IF ids IS NOT NULL THEN
        PERFORM usage_open_counters(p_workspace, ids, p_at);
        SELECT * INTO held FROM usage_reservations r WHERE r.workspace_id = p_workspace AND r.id = p_id;
        PERFORM 1 FROM budget_counters c JOIN budgets b ON b.workspace_id = c.workspace_id AND b.id = c.budget_id
        WHERE c.workspace_id = p_workspace
          AND (b.id = ANY(ids) AND c.starts_on = usage_starts_on(b.period, p_at)
               OR b.id = ANY(held.budgets) AND c.starts_on = usage_starts_on(b.period, held.reserved_at))
        ORDER BY c.budget_id, c.starts_on FOR UPDATE OF c;
        RETURN QUERY
        SELECT CASE WHEN b.user_id IS NOT NULL THEN 'user' WHEN b.key_id IS NOT NULL THEN 'api_key'
                    ELSE 'workspace' END, b.period::text, b.operator
        FROM budgets b
        JOIN budget_counters c ON c.workspace_id = b.workspace_id AND c.budget_id = b.id
                              AND c.starts_on = usage_starts_on(b.period, p_at)
        WHERE b.workspace_id = p_workspace AND b.id = ANY(ids)
          AND c.spent + c.reserved >= usage_ceiling(b.ceiling, b.period, p_day, p_month)
          -- What was admitted in this period stays admitted.
          AND NOT coalesce(b.id = ANY(held.budgets) AND usage_starts_on(b.period, held.reserved_at) = c.starts_on,
                           false)
        -- Whoever is refused is told of the one that lasts longest.
        ORDER BY b.period = 'month' DESC, b.id LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    IF held.id IS NOT NULL THEN
        PERFORM usage_settle(p_workspace, p_user, p_key, p_id, p_conversation, p_message, p_purpose, '[]', p_day,
                             p_month);
    END IF;
    UPDATE budget_counters c SET reserved = c.reserved + p_amount
    FROM budgets b
    WHERE b.workspace_id = p_workspace AND b.id = ANY(ids) AND c.workspace_id = p_workspace AND c.budget_id = b.id
      AND c.starts_on = usage_starts_on(b.period, p_at);
    INSERT INTO usage_reservations (
        workspace_id, id, user_id, key_id, conversation_id, message_id, purpose, provider, model, amount, input_tokens,
        input_cost, own_key, budgets, reserved_at, expires_at)
    VALUES (p_workspace, p_id, p_user, p_key, p_conversation, p_message, p_purpose, p_provider, p_model, p_amount,
            p_input_tokens, p_input_cost, p_own_key, coalesce(ids, '{}'), p_at, p_expires_at);
END
$$
"""

# Adds records to the ledger, counts those that were not there yet, and gives back what was reserved. Returns the
# budgets that have passed their alert or their end by this, each once in a period.
SETTLE = """
CREATE FUNCTION usage_settle(
    p_workspace uuid, p_user uuid, p_key uuid, p_id uuid, p_conversation uuid, p_message uuid, p_purpose text,
    p_records json, p_day numeric, p_month numeric
) RETURNS TABLE (
    budget_id uuid, user_id uuid, key_id uuid, operator boolean, period text, starts_on date, ceiling numeric,
    spent numeric, level text)
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_catalog AS $$
#variable_conflict use_column
DECLARE
    ids uuid[];
    held usage_reservations;
    started timestamptz[];
    costs numeric[];
    own_keys boolean[];
    moment timestamptz;
    due record;
    now_spent numeric;
    passed text;
BEGIN
    SELECT array_agg(b.id ORDER BY b.id) INTO ids FROM budgets b
    WHERE b.workspace_id = p_workspace
      AND (b.user_id IS NULL AND b.key_id IS NULL OR b.user_id = p_user OR b.key_id = p_key);
    DELETE FROM usage_reservations r WHERE r.workspace_id = p_workspace AND r.id = p_id RETURNING * INTO held;
    IF ids IS NOT NULL THEN
        -- Before the rows are there: a new counter begins with what the ledger has, and must not count them twice.
        FOR moment IN
            SELECT min(x.started_at) FROM json_to_recordset(p_records) AS x (started_at timestamptz)
            GROUP BY (x.started_at AT TIME ZONE 'UTC')::date ORDER BY 1
        LOOP
            PERFORM usage_open_counters(p_workspace, ids, moment);
        END LOOP;
    END IF;
    WITH added AS (
        INSERT INTO usage_entries (
            workspace_id, id, user_id, key_id, conversation_id, message_id, purpose, provider, model, attempt, status,
            error, input_tokens, cached_tokens, output_tokens, images, estimated, own_key, cost, started_at, ended_at)
        SELECT p_workspace, x.id, p_user, p_key, p_conversation, p_message, p_purpose, x.provider, x.model, x.attempt,
               x.status, x.error, x.input_tokens, x.cached_tokens, x.output_tokens, x.images, x.estimated,
               x.own_key, x.cost, x.started_at, x.ended_at
        FROM json_to_recordset(p_records) AS x (
            id uuid, provider text, model text, attempt integer, status text, error text, input_tokens integer,
            cached_tokens integer, output_tokens integer, images integer, estimated boolean, own_key boolean,
            cost numeric, started_at timestamptz, ended_at timestamptz)
        ON CONFLICT DO NOTHING
        RETURNING started_at, cost, own_key
    )
    SELECT array_agg(a.started_at), array_agg(a.cost), array_agg(a.own_key) INTO started, costs, own_keys
    FROM added a;
    IF ids IS NULL AND coalesce(cardinality(held.budgets), 0) = 0 THEN
        RETURN;
    END IF;
    FOR due IN
        SELECT c.budget_id, c.starts_on, c.spent, c.reserved, c.alerted, c.stopped, b.user_id, b.key_id, b.operator,
               b.period, usage_ceiling(b.ceiling, b.period, p_day, p_month) AS ceiling, b.alert_at, t.more, t.less
        FROM (
            SELECT y.budget_id, y.starts_on, sum(y.more) AS more, sum(y.less) AS less
            FROM (
                SELECT b.id AS budget_id, usage_starts_on(b.period, n.at) AS starts_on, n.cost AS more, 0 AS less
                FROM unnest(started, costs, own_keys) AS n (at, cost, own_key), budgets b
                WHERE b.workspace_id = p_workspace AND b.id = ANY(ids) AND NOT (b.operator AND n.own_key)
                UNION ALL
                SELECT b.id, usage_starts_on(b.period, held.reserved_at), 0, held.amount
                FROM budgets b WHERE b.workspace_id = p_workspace AND b.id = ANY(held.budgets)
            ) y GROUP BY 1, 2
        ) t
        JOIN budgets b ON b.workspace_id = p_workspace AND b.id = t.budget_id
        JOIN budget_counters c ON c.workspace_id = p_workspace AND c.budget_id = t.budget_id
                              AND c.starts_on = t.starts_on
        ORDER BY c.budget_id, c.starts_on FOR UPDATE OF c
    LOOP
        now_spent := due.spent + due.more;
        -- A mark that was passed under a lower limit is one that can be passed again.
        due.stopped := due.stopped AND due.spent >= due.ceiling;
        due.alerted := due.alerted AND due.spent >= due.ceiling * due.alert_at;
        passed := CASE WHEN due.more = 0 THEN NULL
                       WHEN NOT due.stopped AND now_spent >= due.ceiling THEN 'stop'
                       WHEN NOT due.alerted AND NOT due.stopped AND now_spent >= due.ceiling * due.alert_at THEN 'alert'
                  END;
        UPDATE budget_counters c
        SET spent = now_spent, reserved = due.reserved - due.less,
            alerted = coalesce(due.alerted OR passed IS NOT NULL, c.alerted),
            stopped = coalesce(due.stopped OR coalesce(passed = 'stop', false), c.stopped)
        WHERE c.workspace_id = p_workspace AND c.budget_id = due.budget_id AND c.starts_on = due.starts_on;
        IF passed IS NOT NULL THEN
            RETURN QUERY SELECT due.budget_id, due.user_id, due.key_id, due.operator, due.period::text, due.starts_on,
                                due.ceiling, now_spent, passed;
        END IF;
    END LOOP;
END
$$
"""

# Sets counters to what the ledger and the reservations say; returns those that said something else. Whoever settles
# meanwhile waits for the counter, and adds to what was set here.
RECONCILE = """
CREATE FUNCTION usage_reconcile(p_workspace uuid, p_budgets uuid[]) RETURNS TABLE (
    budget_id uuid, starts_on date, spent numeric, reserved numeric, was_spent numeric, was_reserved numeric)
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_catalog AS $$
#variable_conflict use_column
DECLARE
    found record;
    right_spent numeric;
    right_reserved numeric;
BEGIN
    FOR found IN
        SELECT c.budget_id, c.starts_on, c.spent, c.reserved, b.user_id, b.key_id, b.operator, b.period
        FROM budget_counters c JOIN budgets b ON b.workspace_id = c.workspace_id AND b.id = c.budget_id
        WHERE c.workspace_id = p_workspace AND (p_budgets IS NULL OR b.id = ANY(p_budgets))
        ORDER BY c.budget_id, c.starts_on FOR UPDATE OF c
    LOOP
        -- Statements of their own, so that they see all that was committed before the lock was had.
        right_spent := usage_spent(p_workspace, found.user_id, found.key_id, found.operator, found.period,
                                   found.starts_on);
        SELECT coalesce(sum(r.amount), 0) INTO right_reserved FROM usage_reservations r
        WHERE r.workspace_id = p_workspace AND found.budget_id = ANY(r.budgets)
          AND usage_starts_on(found.period, r.reserved_at) = found.starts_on;
        IF (right_spent, right_reserved) IS DISTINCT FROM (found.spent, found.reserved) THEN
            UPDATE budget_counters c SET spent = right_spent, reserved = right_reserved
            WHERE c.workspace_id = p_workspace AND c.budget_id = found.budget_id AND c.starts_on = found.starts_on;
            RETURN QUERY SELECT found.budget_id, found.starts_on, right_spent, right_reserved, found.spent,
                                found.reserved;
        END IF;
    END LOOP;
END
$$
"""


def upgrade() -> None:
    """Apply."""
    op.execute(
        """
        CREATE TABLE usage_entries (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_usage_entries_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            user_id uuid,
            key_id uuid,
            conversation_id uuid,
            message_id uuid,
            purpose varchar(16) NOT NULL,
            provider varchar(100) NOT NULL,
            model varchar(100) NOT NULL,
            attempt integer NOT NULL,
            status varchar(16) NOT NULL CONSTRAINT ck_usage_entries_status
                CHECK (status IN ('completed', 'failed', 'stopped', 'lost')),
            error varchar(64),
            input_tokens integer NOT NULL,
            cached_tokens integer NOT NULL,
            output_tokens integer NOT NULL,
            images integer NOT NULL,
            estimated boolean NOT NULL,
            own_key boolean NOT NULL DEFAULT false,
            cost numeric(18, 8) NOT NULL,
            started_at timestamptz NOT NULL,
            ended_at timestamptz NOT NULL,
            CONSTRAINT pk_usage_entries PRIMARY KEY (workspace_id, id)
        )
        """
    )
    op.execute("CREATE INDEX ix_usage_entries_started_at ON usage_entries (workspace_id, started_at)")
    op.execute("CREATE INDEX ix_usage_entries_user_id ON usage_entries (workspace_id, user_id, started_at)")
    op.execute("CREATE INDEX ix_usage_entries_message_id ON usage_entries (workspace_id, message_id)")
    op.execute(
        """
        CREATE TABLE budgets (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_budgets_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            user_id uuid,
            key_id uuid,
            period varchar(8) NOT NULL CONSTRAINT ck_budgets_period CHECK (period IN ('day', 'month')),
            ceiling numeric(18, 8),
            alert_at numeric(4, 3) NOT NULL,
            operator boolean NOT NULL DEFAULT false,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_budgets PRIMARY KEY (workspace_id, id),
            CONSTRAINT ck_budgets_subject CHECK (user_id IS NULL OR key_id IS NULL),
            CONSTRAINT ck_budgets_operator
                CHECK (CASE WHEN operator THEN user_id IS NULL AND key_id IS NULL ELSE ceiling IS NOT NULL END),
            CONSTRAINT fk_budgets_workspace_id_user_id FOREIGN KEY (workspace_id, user_id)
                REFERENCES memberships (workspace_id, user_id) ON DELETE CASCADE,
            CONSTRAINT fk_budgets_workspace_id_key_id FOREIGN KEY (workspace_id, key_id)
                REFERENCES api_keys (workspace_id, id) ON DELETE CASCADE
        )
        """
    )
    op.execute(
        "CREATE UNIQUE INDEX uq_budgets_subject ON budgets (workspace_id, operator, user_id, key_id, period)"
        " NULLS NOT DISTINCT"
    )
    op.execute(
        """
        CREATE TABLE budget_counters (
            workspace_id uuid NOT NULL,
            budget_id uuid NOT NULL,
            starts_on date NOT NULL,
            spent numeric(18, 8) NOT NULL,
            reserved numeric(18, 8) NOT NULL DEFAULT 0,
            alerted boolean NOT NULL DEFAULT false,
            stopped boolean NOT NULL DEFAULT false,
            CONSTRAINT pk_budget_counters PRIMARY KEY (workspace_id, budget_id, starts_on),
            CONSTRAINT fk_budget_counters_workspace_id_budget_id FOREIGN KEY (workspace_id, budget_id)
                REFERENCES budgets (workspace_id, id) ON DELETE CASCADE
        ) WITH (fillfactor = 50)
        """
    )
    op.execute(
        """
        CREATE TABLE usage_reservations (
            workspace_id uuid NOT NULL
                CONSTRAINT fk_usage_reservations_workspace_id REFERENCES workspaces (id) ON DELETE CASCADE,
            id uuid NOT NULL,
            user_id uuid,
            key_id uuid,
            conversation_id uuid,
            message_id uuid,
            purpose varchar(16) NOT NULL,
            provider varchar(100) NOT NULL,
            model varchar(100) NOT NULL,
            amount numeric(18, 8) NOT NULL,
            input_tokens integer NOT NULL,
            input_cost numeric(18, 8) NOT NULL,
            own_key boolean NOT NULL DEFAULT false,
            budgets uuid[] NOT NULL,
            reserved_at timestamptz NOT NULL,
            expires_at timestamptz,
            CONSTRAINT pk_usage_reservations PRIMARY KEY (workspace_id, id)
        )
        """
    )
    op.execute(
        "CREATE INDEX ix_usage_reservations_expires_at ON usage_reservations (workspace_id, expires_at)"
        " WHERE expires_at IS NOT NULL"
    )
    op.execute(
        "CREATE INDEX ix_usage_reservations_conversation_id ON usage_reservations (workspace_id, conversation_id)"
    )
    # The app adds to the ledger and changes nothing in it. The system role takes an erased person's name out.
    protect_tenant_table(op.execute, "usage_entries", app="SELECT, INSERT", system="SELECT, INSERT")
    op.execute("GRANT UPDATE (user_id, key_id) ON usage_entries TO parley_system")
    protect_tenant_table(op.execute, "budgets", system="SELECT, INSERT, UPDATE")
    # What an operator has set is not a workspace's to change. A row that only counts may come with the first call.
    op.execute("CREATE POLICY operator_update ON budgets AS RESTRICTIVE FOR UPDATE TO parley_app USING (NOT operator)")
    op.execute("CREATE POLICY operator_delete ON budgets AS RESTRICTIVE FOR DELETE TO parley_app USING (NOT operator)")
    op.execute(
        "CREATE POLICY operator_insert ON budgets AS RESTRICTIVE FOR INSERT TO parley_app"
        " WITH CHECK (NOT operator OR ceiling IS NULL)"
    )
    protect_tenant_table(op.execute, "budget_counters", system="SELECT, INSERT, UPDATE")
    protect_tenant_table(op.execute, "usage_reservations", system="SELECT, UPDATE, DELETE")
    for function in (STARTS_ON, SPENT, OPEN, OPEN_CEILINGS, CEILING, SETTLE, RESERVE, RECONCILE):
        op.execute(function)


def downgrade() -> None:
    """Take back."""
    for function in (
        "usage_reconcile", "usage_reserve", "usage_settle", "usage_ceiling", "usage_open_ceilings",
        "usage_open_counters", "usage_spent", "usage_starts_on",
    ):  # fmt: skip
        op.execute(f"DROP FUNCTION {function}")
    for table in ("usage_reservations", "budget_counters", "budgets", "usage_entries"):
        op.execute(f"DROP TABLE {table}")
