"""Running migrations, and knowing whether the schema is the one that this code expects."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from parley.core.db import Database, DatabaseUrls
from parley.core.paths import project_path


def alembic_config(urls: DatabaseUrls | None) -> Config:
    """Return Alembic's configuration for a database."""
    ini = project_path("alembic.ini")
    config = Config(str(ini) if ini.exists() else None)
    config.set_main_option("script_location", str(project_path("migrations")))
    config.set_main_option("path_separator", "os")
    config.attributes["urls"] = urls
    return config


def head() -> str:
    """Return the revision that this code expects."""
    revision = ScriptDirectory.from_config(alembic_config(None)).get_current_head()
    assert revision is not None
    return revision


def upgrade(urls: DatabaseUrls, revision: str = "head") -> None:
    """Apply migrations. Blocks; not to be called from a running event loop."""
    command.upgrade(alembic_config(urls), revision)


def downgrade(urls: DatabaseUrls, revision: str) -> None:
    """Take migrations back."""
    command.downgrade(alembic_config(urls), revision)


def check(urls: DatabaseUrls) -> None:
    """Raise if the tables in the code and the migrations differ."""
    command.check(alembic_config(urls))


async def current_revision(database: Database) -> str | None:
    """Return the revision of the database, or None where nothing was ever migrated."""
    async with database.system.connect() as connection:
        try:
            if database.urls.become:
                await connection.execute(text("SELECT set_config('role', 'parley_system', true)"))
            return (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar_one_or_none()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == "42P01":
                return None
            raise


def scripts() -> list[Script]:
    """Return the migrations, the newest first."""
    return list(ScriptDirectory.from_config(alembic_config(None)).walk_revisions())


def migrations_folder() -> Path:
    """Return where the migrations are."""
    return project_path("migrations")
