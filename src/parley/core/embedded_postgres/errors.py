"""What can keep the embedded PostgreSQL from running. Messages are for the person at the console."""


class EmbeddedPostgresError(RuntimeError):
    """The embedded PostgreSQL cannot run; the message says why and what to do."""


class BinariesMissing(EmbeddedPostgresError):
    """The wheel with the PostgreSQL binaries is not installed, or has none for this platform."""


class DataDirectoryInUse(EmbeddedPostgresError):
    """Another server works on the same data directory."""


class UnusableDataDirectory(EmbeddedPostgresError):
    """The data directory is of another PostgreSQL version, another user, or no data directory at all."""


class StartFailed(EmbeddedPostgresError):
    """PostgreSQL or initdb ended by itself or was not ready in time; the message ends with its last words."""


class NamespaceRefused(EmbeddedPostgresError):
    """The kernel or the container does not let this process make a user namespace."""
