"""What operators' commands have in common: the database beside a running server, the services, the output."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import typer

from parley.cli.beside import urls_beside
from parley.cli.problems import CommandFailed, explained
from parley.core import migrate
from parley.core.db import Database, DatabaseUrls
from parley.core.errors import AppError
from parley.core.revocations import Revocations
from parley.core.secrets import load_secrets
from parley.core.settings import Settings, load_settings
from parley.identity.erasures import ErasureService
from parley.identity.operators import UnscopedOperators
from parley.identity.session_repository import leave_workspace as move_sessions
from parley.identity.setup import build_identity
from parley.main import PERSONAL_DATA
from parley.realtime.personal_data import leave_workspace as stop_replies
from parley.tenancy.operators import UnscopedWorkspaceOperators

_SEPARATOR = "  "


@dataclass(frozen=True, slots=True)
class Operating:
    """What a command works with."""

    settings: Settings
    database: Database
    operators: UnscopedOperators
    workspaces: UnscopedWorkspaceOperators
    erasures: ErasureService


class _NoMail:
    """Commands queue mail; the server sends it."""

    async def send(self, mail: object) -> None:
        raise NotImplementedError(mail)


def operate[T](work: Callable[[Operating], Awaitable[T]]) -> T:
    """Run `work` on the database; what an operator can mend becomes a message and exit code 2."""
    with explained():
        settings = load_settings()
        with urls_beside(settings) as urls:
            return asyncio.run(_with_services(settings, urls, work))


async def _with_services[T](settings: Settings, urls: DatabaseUrls, work: Callable[[Operating], Awaitable[T]]) -> T:
    database = Database(urls, settings.database)
    revocations = Revocations()
    identity = build_identity(database, settings, load_secrets(settings), revocations=revocations)
    try:
        if (found := await migrate.current_revision(database)) != migrate.head():
            raise CommandFailed(f"the schema is at {found}, this version needs {migrate.head()}: `parley db upgrade`")
        return await work(
            Operating(
                settings=settings,
                database=database,
                operators=UnscopedOperators(
                    database,
                    passwords=identity.passwords,
                    revocations=revocations,
                    key_format=identity.api_keys.format,
                ),
                workspaces=UnscopedWorkspaceOperators(database, revocations, leaving=(move_sessions, stop_replies)),
                erasures=ErasureService(
                    database,
                    PERSONAL_DATA,
                    confirm=identity.password_service.confirm,
                    revocations=revocations,
                    mailer=_NoMail(),
                    days=settings.auth.erasure_days,
                ),
            )
        )
    except AppError as problem:
        details = f" ({json.dumps(problem.details)})" if problem.details else ""
        raise CommandFailed(f"{problem.detail}{details}") from None
    except (ConnectionError, OSError) as problem:
        raise CommandFailed(f"the database cannot be reached: {problem}") from None
    finally:
        await identity.close()
        await database.close()


def read_password() -> str:
    """Read a password: asked for twice at a terminal, else the first line of the standard input."""
    if sys.stdin.isatty():
        answer: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
        return answer
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        typer.secho("parley: no password on the standard input", err=True, fg=typer.colors.RED)
        raise typer.Exit(2)
    return password


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps([dict(row) for row in rows], indent=2, default=str))
        return
    if not rows:
        print("There is none.")
        return
    names = list(rows[0])
    table = [names, *([_text(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(names))]
    for line in table:
        print(_SEPARATOR.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def tell(sentence: str, facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what was done: a sentence, or the facts as JSON."""
    print(json.dumps(dict(facts), default=str) if as_json else sentence)


def _text(value: object) -> str:
    if value is None:
        return "-"
    shown = value.isoformat(sep=" ", timespec="seconds") if isinstance(value, datetime) else str(value)
    # A name may hold what moves the cursor of the terminal.
    return "".join(letter if letter.isprintable() else "?" for letter in shown)
