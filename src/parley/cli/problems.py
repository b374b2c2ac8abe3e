"""What an operator is told when a command cannot do its work: the reason and what to do, no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from parley.core.embedded_postgres import EmbeddedPostgresError
from parley.core.settings import SettingsInvalid
from parley.llm.errors import PromptInvalid, RegistryInvalid


class CommandFailed(Exception):
    """A command cannot do what it was asked; the message says why."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn the problems that an operator can mend into a message and exit code 2."""
    try:
        yield
    except (SettingsInvalid, RegistryInvalid, PromptInvalid, EmbeddedPostgresError, CommandFailed) as problem:
        typer.secho(f"parley: {problem}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2) from None
