"""Migrations go up and down, agree with the models, and a process refuses a schema that is not its own."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from parley.core import migrate
from parley.core.db import Database, DatabaseUrls
from parley.core.settings import DatabaseSettings
from parley.main import SchemaNotCurrent
from tests.conftest import make_settings, running

_LEFT = """
    SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S', 'v', 'i')
      AND relname NOT LIKE 'alembic_version%'
    UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


async def test_each_migration_down_and_up_again(urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    before = await _shape(admin)
    revisions = [script.revision for script in migrate.scripts()]
    for revision in [*revisions[1:], "base"]:
        await asyncio.to_thread(migrate.downgrade, urls, revision)
    assert [row["relname"] for row in await admin.fetch(_LEFT)] == []
    for revision in reversed(revisions):
        await asyncio.to_thread(migrate.upgrade, urls, revision)
    assert await _shape(admin) == before


async def _shape(admin: asyncpg.Connection) -> list[str]:
    """Return everything that a migration can make, as text."""
    rows = await admin.fetch(
        """
        SELECT table_name || '.' || column_name || ' ' || data_type || is_nullable || coalesce(column_default, '') AS x
        FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
                  WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT tablename || policyname || permissive || roles::text || cmd || coalesce(qual, '')
                  || coalesce(with_check, '') FROM pg_policies
        UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT relname || coalesce(relacl::text, '') || relrowsecurity || relforcerowsecurity
                  FROM pg_class WHERE relnamespace = 'public'::regnamespace
        ORDER BY 1
        """
    )
    return [row["x"] for row in rows]


async def test_models_and_migrations_agree(urls: DatabaseUrls) -> None:
    await asyncio.to_thread(migrate.check, urls)


async def test_the_revision_is_readable_by_who_serves(urls: DatabaseUrls) -> None:
    database = Database(urls, DatabaseSettings())
    try:
        assert await migrate.current_revision(database) == migrate.head()
        await asyncio.to_thread(migrate.downgrade, urls, "base")
        assert await migrate.current_revision(database) is None
    finally:
        await database.close()


async def test_a_process_refuses_a_schema_that_is_not_at_head(tmp_path: Path, urls: DatabaseUrls) -> None:
    await asyncio.to_thread(migrate.downgrade, urls, "-1")
    with pytest.raises(SchemaNotCurrent, match="parley db upgrade"):
        async with running(make_settings(tmp_path, urls)):
            pass
