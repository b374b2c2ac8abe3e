"""The commands. What takes long to import is imported by the command that needs it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from parley.cli import database, key, session, usage, user, workspace
from parley.cli.options import AsJson
from parley.cli.problems import explained

app = typer.Typer(
    name="parley", no_args_is_help=True, add_completion=False, help="Parley: a self-hosted backend for AI products."
)
app.add_typer(database.app, name="db")
app.add_typer(user.app, name="user")
app.add_typer(workspace.app, name="workspace")
app.add_typer(key.app, name="key")
app.add_typer(session.app, name="session")
app.add_typer(usage.app, name="usage")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (PARLEY_HOST)")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one (PARLEY_PORT)")] = None,
    role: Annotated[
        str | None, typer.Option(help="`web` serves clients, `gen` writes replies, `all` does both (PARLEY_ROLE)")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes behind the port (PARLEY_WORKERS)")] = None,
) -> None:
    """Start the database if it is ours, migrate it, and serve."""
    from parley.cli.serve import serve as run  # noqa: PLC0415 - see above

    with explained():
        given = {"host": host, "port": port, "role": role, "workers": workers}
        run({key: value for key, value in given.items() if value is not None})


@app.command()
def openapi(
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal")] = None,
) -> None:
    """Print the OpenAPI document."""
    from parley.core.settings import load_settings  # noqa: PLC0415 - see above
    from parley.main import create_app  # noqa: PLC0415 - see above

    with explained():
        _write(create_app(load_settings()).openapi(), output)


@app.command()
def asyncapi(
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal")] = None,
) -> None:
    """Print the AsyncAPI document of the socket."""
    from parley.core.settings import load_settings  # noqa: PLC0415 - see above
    from parley.main import asyncapi_document, create_app  # noqa: PLC0415 - see above

    with explained():
        _write(asyncapi_document(create_app(load_settings())), output)


@app.command("doctor")
def doctor(as_json: AsJson = False) -> None:
    """Check settings, database, roles, disk, jobs and what else is reached; exit code 1 when something must be done."""
    from parley.cli.doctor import doctor as run  # noqa: PLC0415 - see above

    run(as_json)


def _write(document: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
    else:
        output.write_text(text)


@app.command(
    "conformance",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def conformance(context: typer.Context) -> None:
    """Check any server of the live protocol from outside: `parley conformance URL`, `--help` for its options."""
    from parley.conformance.command import main as run  # noqa: PLC0415 - see above

    raise typer.Exit(run(context.args, prog="parley conformance"))


def _register_chat() -> None:
    from parley.cli.chat import chat_command  # noqa: PLC0415 - it needs the app that is being built

    app.command("chat")(chat_command)


def main() -> None:
    """Run a command."""
    _register_chat()
    app()
