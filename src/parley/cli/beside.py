"""The database of a command that works beside a running server."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from parley.cli.database import embedded_urls
from parley.core.db import DatabaseUrls
from parley.core.embedded_postgres import DataDirectoryInUse, EmbeddedPostgres
from parley.core.embedded_postgres.beside import running_server
from parley.core.settings import Settings


@contextmanager
def urls_beside(settings: Settings) -> Iterator[DatabaseUrls]:
    """Yield the addresses of the database. Ours is started unless a server runs it; then that one is used."""
    if not settings.uses_embedded_postgres:
        yield DatabaseUrls.from_settings(settings.database)
        return
    with ExitStack() as stack:
        try:
            urls = embedded_urls(stack.enter_context(EmbeddedPostgres(settings.data_dir)))
        except DataDirectoryInUse:
            url = running_server(settings.data_dir)
            system = url("parley_system")
            urls = DatabaseUrls(app=url("parley_app"), system=system, owner=url("parley_owner"), direct=system)
        yield urls
