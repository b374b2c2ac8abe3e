"""`parley db …`: roles, migrations, a shell."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from parley.cli.problems import CommandFailed, explained
from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.embedded_postgres import EmbeddedPostgres, find_binaries
from parley.core.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, help="The database: roles, migrations, a shell.")


def embedded_urls(server: EmbeddedPostgres) -> DatabaseUrls:
    """Return the addresses of our own server, one per role."""
    system = server.url("parley_system")
    return DatabaseUrls(app=server.url("parley_app"), system=system, owner=server.url("parley_owner"), direct=system)


@contextmanager
def database_urls(settings: Settings) -> Iterator[DatabaseUrls]:
    """Yield the addresses of the configured database; ours runs for the length of the block."""
    if not settings.uses_embedded_postgres:
        yield DatabaseUrls.from_settings(settings.database)
        return
    with EmbeddedPostgres(settings.data_dir) as server:
        yield embedded_urls(server)


@app.command()
def init(
    admin_url: Annotated[str, typer.Option(envvar="PARLEY_DATABASE_ADMIN_URL", help="A role that may make roles")],
    database: Annotated[str, typer.Option(help="The database's name")] = "parley",
) -> None:
    """Make the roles and the database on a server of your own. Can be repeated."""
    from parley.core.database_roles import RightsMissing, ensure_roles  # noqa: PLC0415 - only this command needs it

    with explained():
        try:
            asyncio.run(ensure_roles(asyncpg_dsn(admin_url), database))
        except RightsMissing as problem:
            raise CommandFailed(str(problem)) from None
    print(
        "The roles parley_owner, parley_app and parley_system are there. Give them passwords, then `parley db upgrade`."
    )


@app.command()
def upgrade(revision: str = "head") -> None:
    """Apply migrations."""
    from parley.core import migrate  # noqa: PLC0415 - Alembic takes long to import

    with explained(), database_urls(load_settings()) as urls:
        migrate.upgrade(urls, revision)
    print(f"The schema is at {revision}.")


@app.command()
def downgrade(revision: str) -> None:
    """Take migrations back to a revision, or `base`."""
    from parley.core import migrate  # noqa: PLC0415 - as above

    with explained(), database_urls(load_settings()) as urls:
        migrate.downgrade(urls, revision)
    print(f"The schema is at {revision}.")


@app.command()
def check() -> None:
    """Fail if the tables in the code and the migrations differ."""
    from alembic.util import CommandError  # noqa: PLC0415 - as above

    from parley.core import migrate  # noqa: PLC0415 - as above

    with explained(), database_urls(load_settings()) as urls:
        try:
            migrate.upgrade(urls)
            migrate.check(urls)
        except CommandError as problem:
            raise CommandFailed(str(problem)) from None


@app.command()
def epoch() -> None:
    """Void every position that clients hold in live channels: after a restore from a backup.

    Works beside a running server, whose clients get the channels' state anew within a second.
    """
    from parley.cli.operating import operate  # noqa: PLC0415 - long to import
    from parley.realtime.epochs import new_epochs  # noqa: PLC0415 - as above

    count = operate(lambda o: new_epochs(o.database))
    print(f"{count} channels have a new epoch.")


@app.command()
def shell(
    role: Annotated[str, typer.Option(help="parley_app, parley_system or parley_owner")] = "parley_owner",
) -> None:
    """Open psql on the database. The server may not run at the same time if the database is ours."""
    with explained(), database_urls(load_settings()) as urls:
        address = {"parley_app": urls.app, "parley_system": urls.system}.get(role, urls.owner)
        psql = find_binaries() / "psql"
        subprocess.run([str(psql) if psql.exists() else "psql", asyncpg_dsn(address)], check=False, env=os.environ)  # noqa: S603 - our own binary
