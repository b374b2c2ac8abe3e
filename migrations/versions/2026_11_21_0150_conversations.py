"""Conversations that are found, shared and pinned: who set a title, who may read, and what was said, word by word."""

from alembic import op

from parley.core.row_level_security import protect_tenant_table

revision = "0150"
down_revision = "0140"
branch_labels = None
depends_on = None

CONVERSATIONS = """
ALTER TABLE conversations
    ADD COLUMN shared_access varchar(8)
        CONSTRAINT ck_conversations_shared_access CHECK (shared_access IN ('read', 'write')),
    ADD COLUMN pinned boolean NOT NULL DEFAULT false,
    ADD COLUMN title_by varchar(8) DEFAULT 'words'
        CONSTRAINT ck_conversations_title_by CHECK (title_by IN ('person', 'model', 'words')),
    ADD CONSTRAINT ck_conversations_shared CHECK (shared = (shared_access IS NOT NULL))
"""

# Both sides of a search go through it: no accents, no capitals, and every mark between words a space, so that a word
# inside an address or a path is a word. Only text that is not all ASCII is taken apart.
FOLD = r"""
CREATE FUNCTION search_fold(p_text text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog AS $$
    SELECT translate(
        lower(CASE WHEN octet_length(p_text) = length(p_text) THEN p_text
                   ELSE regexp_replace(normalize(p_text, NFKD), '[\u0300-\u036f]', '', 'g') END),
        '!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~', repeat(' ', 32))
$$
"""

# What a reader sees of a message, and no more of it than a tsvector can hold.
TEXT = """
CREATE FUNCTION message_text(p_parts json) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog AS $$
    SELECT left(string_agg(part.value ->> 'text', ' ' ORDER BY part.ordinality), 150000)
    FROM json_array_elements(p_parts) WITH ORDINALITY AS part (value, ordinality)
    WHERE part.value ->> 'type' = 'text'
$$
"""

INDEX_MESSAGE = """
CREATE FUNCTION index_message() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_catalog AS $$
DECLARE
    said CONSTANT text := message_text(NEW.parts);
BEGIN
    IF said <> '' THEN
        INSERT INTO search_entries (workspace_id, conversation_id, id, tsv)
        VALUES (NEW.workspace_id, NEW.conversation_id, NEW.id, to_tsvector('pg_catalog.simple', search_fold(said)))
        ON CONFLICT (workspace_id, conversation_id, id) DO UPDATE SET tsv = EXCLUDED.tsv;
    ELSIF TG_OP = 'UPDATE' THEN
        DELETE FROM search_entries
        WHERE workspace_id = NEW.workspace_id AND conversation_id = NEW.conversation_id AND id = NEW.id;
    END IF;
    RETURN NULL;
END
$$
"""

# A title's entry has the id of its conversation.
INDEX_TITLE = """
CREATE FUNCTION index_title() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_catalog AS $$
BEGIN
    IF NEW.title <> '' THEN
        INSERT INTO search_entries (workspace_id, conversation_id, id, tsv)
        VALUES (NEW.workspace_id, NEW.id, NEW.id, to_tsvector('pg_catalog.simple', search_fold(NEW.title)))
        ON CONFLICT (workspace_id, conversation_id, id) DO UPDATE SET tsv = EXCLUDED.tsv;
    ELSIF TG_OP = 'UPDATE' THEN
        DELETE FROM search_entries WHERE workspace_id = NEW.workspace_id AND conversation_id = NEW.id AND id = NEW.id;
    END IF;
    RETURN NULL;
END
$$
"""

# In the transaction of their cause, whoever causes it: a send, a reply's end, an import, an erasure.
TRIGGERS = (
    """
    CREATE TRIGGER index_new_message AFTER INSERT ON messages FOR EACH ROW
    WHEN (NEW.status NOT IN ('queued', 'streaming')) EXECUTE FUNCTION index_message()
    """,
    """
    CREATE TRIGGER index_message AFTER UPDATE OF parts, status ON messages FOR EACH ROW
    WHEN (NEW.status NOT IN ('queued', 'streaming')) EXECUTE FUNCTION index_message()
    """,
    """
    CREATE TRIGGER index_new_title AFTER INSERT ON conversations FOR EACH ROW
    WHEN (NEW.title IS NOT NULL) EXECUTE FUNCTION index_title()
    """,
    """
    CREATE TRIGGER index_title AFTER UPDATE OF title ON conversations FOR EACH ROW
    WHEN (NEW.title IS DISTINCT FROM OLD.title) EXECUTE FUNCTION index_title()
    """,
)

# What is there already. Migrations run as the owner, for whom forced row-level security shows nothing.
FILL = (
    "ALTER TABLE conversations NO FORCE ROW LEVEL SECURITY",
    "ALTER TABLE messages NO FORCE ROW LEVEL SECURITY",
    """
    INSERT INTO search_entries (workspace_id, conversation_id, id, tsv)
    SELECT m.workspace_id, m.conversation_id, m.id, to_tsvector('pg_catalog.simple', search_fold(t.said))
    FROM messages m CROSS JOIN LATERAL (SELECT message_text(m.parts) AS said) t
    WHERE m.status NOT IN ('queued', 'streaming') AND t.said <> ''
    """,
    """
    INSERT INTO search_entries (workspace_id, conversation_id, id, tsv)
    SELECT workspace_id, id, id, to_tsvector('pg_catalog.simple', search_fold(title))
    FROM conversations WHERE title <> ''
    """,
    "ALTER TABLE messages FORCE ROW LEVEL SECURITY",
    "ALTER TABLE conversations FORCE ROW LEVEL SECURITY",
)

# Events of another user's inbox, which only that user may write: whoever writes in a shared conversation tells its
# owner. Bound to the owner for this one statement; the workspace stays what it is.
APPEND_FOR = """
CREATE FUNCTION realtime_append_for(
    p_user uuid, p_workspace uuid, p_channels text[], p_owners uuid[], p_events text[], p_data text[]
) RETURNS TABLE (ord integer, seq bigint, epoch text, at timestamptz)
LANGUAGE plpgsql VOLATILE SET search_path = public, pg_catalog AS $$
DECLARE
    before CONSTANT text := current_setting('app.user_id', true);
BEGIN
    PERFORM set_config('app.user_id', p_user::text, true);
    RETURN QUERY SELECT a.ord, a.seq, a.epoch, a.at
    FROM realtime_append(p_workspace, p_channels, p_owners, p_events, p_data) a;
    PERFORM set_config('app.user_id', before, true);
END
$$
"""


def upgrade() -> None:
    """Apply."""
    op.execute(CONVERSATIONS)
    # The titles that are there stay; those of new conversations are nobody's until someone sets them.
    op.execute("ALTER TABLE conversations ALTER COLUMN title_by DROP DEFAULT")
    op.execute(
        "CREATE INDEX ix_conversations_listed ON conversations "
        "(workspace_id, owner_id, archived, pinned DESC, updated_at DESC, id DESC)"
    )
    op.execute(
        "CREATE INDEX ix_conversations_shared ON conversations (workspace_id, updated_at DESC, id DESC) WHERE shared"
    )
    op.execute(
        """
        CREATE TABLE conversation_pins (
            workspace_id uuid NOT NULL,
            user_id uuid NOT NULL,
            conversation_id uuid NOT NULL,
            CONSTRAINT pk_conversation_pins PRIMARY KEY (workspace_id, user_id, conversation_id),
            CONSTRAINT fk_conversation_pins_workspace_id_conversation_id
                FOREIGN KEY (workspace_id, conversation_id)
                REFERENCES conversations (workspace_id, id) ON DELETE CASCADE
        )
        """
    )
    # The newest of a message's children is looked up at each step down a branch.
    op.execute("CREATE INDEX ix_messages_children ON messages (workspace_id, parent_id, id)")
    op.execute("DROP INDEX ix_messages_parent_id")
    op.execute("CREATE INDEX ix_conversation_pins_conversation ON conversation_pins (workspace_id, conversation_id)")
    # Kept in the row and uncompressed up to a page: a search reads every entry that its caller may see.
    op.execute(
        """
        CREATE TABLE search_entries (
            workspace_id uuid NOT NULL,
            conversation_id uuid NOT NULL,
            id uuid NOT NULL,
            tsv tsvector STORAGE EXTERNAL NOT NULL,
            CONSTRAINT pk_search_entries PRIMARY KEY (workspace_id, conversation_id, id),
            CONSTRAINT fk_search_entries_workspace_id_conversation_id FOREIGN KEY (workspace_id, conversation_id)
                REFERENCES conversations (workspace_id, id) ON DELETE CASCADE
        ) WITH (toast_tuple_target = 8160)
        """
    )
    protect_tenant_table(op.execute, "conversation_pins", owner="user_id")
    for function in (FOLD, TEXT, INDEX_MESSAGE, INDEX_TITLE, APPEND_FOR):
        op.execute(function)
    for statement in FILL:
        op.execute(statement)
    protect_tenant_table(op.execute, "search_entries")
    for trigger in TRIGGERS:
        op.execute(trigger)


def downgrade() -> None:
    """Take back."""
    for name in ("index_new_message", "index_message"):
        op.execute(f"DROP TRIGGER {name} ON messages")
    for name in ("index_new_title", "index_title"):
        op.execute(f"DROP TRIGGER {name} ON conversations")
    for name in ("realtime_append_for", "index_title", "index_message", "message_text", "search_fold"):
        op.execute(f"DROP FUNCTION {name}")
    op.execute("CREATE INDEX ix_messages_parent_id ON messages (workspace_id, parent_id)")
    op.execute("DROP INDEX ix_messages_children")
    op.execute("DROP TABLE search_entries")
    op.execute("DROP TABLE conversation_pins")
    op.execute("DROP INDEX ix_conversations_shared")
    op.execute("DROP INDEX ix_conversations_listed")
    op.execute("ALTER TABLE conversations DROP CONSTRAINT ck_conversations_shared")
    op.execute("ALTER TABLE conversations DROP COLUMN title_by, DROP COLUMN pinned, DROP COLUMN shared_access")
