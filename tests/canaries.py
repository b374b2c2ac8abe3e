"""What must stand in no log, no table and no job: the suite's passwords, and every secret that the service issues."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg

from parley.core.logging import JsonFormatter

PASSWORDS = ("correct horse 1", "a walk 1842", "a long walk 1842")
# What workspaces' own keys of providers look like in the suite: each begins with this.
PROVIDER_KEY = "sk-of-a-workspace-"

# Issued secrets are longer than the examples in documents and than what tests make up.
ISSUED = re.compile(
    r"eyJ[\w-]{16,}\.[\w-]{16,}\.[\w-]{16,}"  # an access token
    r"|parley_(?:rt|sk|ot|in)_[\w=-]{48,}"  # refresh tokens, API keys, one-time tokens, invitations
    r"|\btk_[\w=-]{48,}"  # tickets
    rf"|{PROVIDER_KEY}\w+"
)


def secrets_in(text: str, *more: str) -> list[str]:
    """Return the secrets that stand in a text, cut so that a report does not spread them."""
    found = [password for password in (*PASSWORDS, *more) if password in text]
    return [*found, *(match.group()[:14] + "…" for match in ISSUED.finditer(text))]


class CanaryHandler(logging.Handler):
    """Formats every record as production does, and keeps the secrets that are left in it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a record."""
        if record.name.startswith("parley") and (secrets := secrets_in(self.format(record))):
            self.found.append(f"{record.name}:{record.lineno}: {secrets}")


def secrets_in_files(*paths: Path) -> list[str]:
    """Return the secrets in files, and in files below directories."""

    def files() -> Iterator[Path]:
        for path in paths:
            yield from (one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]

    return [f"{path.name}: {secret}" for path in files() for secret in secrets_in(path.read_text(errors="replace"))]


async def secrets_in_tables(admin: asyncpg.Connection, *more: str) -> list[str]:
    """Return the secrets in any column of any table, the jobs and the log of channels among them."""
    found = []
    for (table,) in await admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"):
        for (text,) in await admin.fetch(f"SELECT to_jsonb(t)::text FROM {table} t"):
            # bytea is shown as hex, under which a text would hide.
            plain = re.sub(r"\\\\x((?:[0-9a-f]{2})+)", lambda m: bytes.fromhex(m[1]).decode("latin-1"), text)
            found += [f"{table}: {secret}" for secret in secrets_in(plain, *more)]
    return found
