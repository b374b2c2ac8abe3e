"""`parley user …`: accounts. Works beside a running server, which hears of it at once."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parley.cli.options import AsJson, Limit, Who
from parley.cli.problems import CommandFailed, explained

if TYPE_CHECKING:
    from parley.cli.operating import Operating

app = typer.Typer(no_args_is_help=True, help="Accounts: make, look at, disable, erase.")


@app.command()
def create(
    email: Annotated[str, typer.Argument(help="The e-mail address that they sign in with")],
    name: Annotated[str | None, typer.Option(help="Their name")] = None,
    verified: Annotated[bool, typer.Option("--verified", help="The address is known to be theirs")] = False,
    as_json: AsJson = False,
) -> None:
    """Make an account with a workspace of its own. The password is asked for, or read from the standard input."""
    from parley.cli.operating import operate, read_password, tell  # noqa: PLC0415 - long to import

    password = read_password()

    async def work(o: "Operating") -> dict[str, Any]:
        return await o.operators.create_user(email=email, password=password, name=name, verified=verified)

    made = operate(work)
    tell(f"Made {made['email']}, id {made['id']}, workspace {made['workspace_id']}.", made, as_json=as_json)


@app.command("list")
def list_(limit: Limit = 100, as_json: AsJson = False) -> None:
    """List accounts, the oldest first."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - as above

    show(operate(lambda o: o.operators.list_users(limit=limit)), as_json=as_json)


@app.command("show")
def show_(user: Who, as_json: AsJson = False) -> None:
    """Show an account and the workspaces that it is in."""
    from parley.cli.operating import operate, show, tell  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        return {**found, "workspaces": await o.operators.places(found["id"])}

    found = operate(work)
    if as_json:
        tell("", found, as_json=True)
        return
    places = found.pop("workspaces")
    show([found], as_json=False)
    print()
    show(places, as_json=False)


@app.command()
def disable(user: Who, as_json: AsJson = False) -> None:
    """Keep a user out, at once. Nothing of theirs is removed."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        await o.operators.disable(found["id"])
        return {"id": found["id"], "disabled": True}

    done = operate(work)
    tell(f"{done['id']} is disabled; every session has ended.", done, as_json=as_json)


@app.command()
def enable(user: Who, as_json: AsJson = False) -> None:
    """Let a disabled user in again. One who is being deleted is brought back with `restore`."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        if found["erase_after"] is not None:
            raise CommandFailed("the account is being deleted: `parley user restore` brings it back")
        await o.operators.enable(found["id"])
        return {"id": found["id"], "disabled": False}

    done = operate(work)
    tell(f"{done['id']} may sign in again.", done, as_json=as_json)


@app.command()
def restore(user: Who, as_json: AsJson = False) -> None:
    """Bring an account back that waits to be erased."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        if not await o.erasures.restore_account(found["id"], actor="operator"):
            raise CommandFailed("the account is not waiting to be erased")
        return {"id": found["id"], "restored": True}

    done = operate(work)
    tell(f"{done['id']} is back; they sign in anew.", done, as_json=as_json)


@app.command()
def erase(
    user: Who,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the days in which it can be restored")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    as_json: AsJson = False,
) -> None:
    """Close an account at once, and erase it with all its data when its days are over."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    if not yes:
        typer.confirm(f"Erase {user}{' now, for good' if now else ''}?", abort=True)

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        wait = timedelta(0) if now else None
        erase_after = await o.erasures.close_account(found["id"], actor="operator", wait=wait)
        if now:
            await o.erasures.erase(found["id"])
        return {"id": found["id"], "erase_after": erase_after, "erased": now}

    done = operate(work)
    sentence = f"{done['id']} is erased." if now else f"{done['id']} is closed, and erased after {done['erase_after']}."
    tell(sentence, done, as_json=as_json)


@app.command("set-password")
def set_password(user: Who, as_json: AsJson = False) -> None:
    """Give a user another password, asked for or read from the standard input; their sessions end."""
    from parley.cli.operating import operate, read_password, tell  # noqa: PLC0415 - as above

    password = read_password()

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        ended = await o.operators.set_password(found["id"], password, email=found["email"])
        return {"id": found["id"], "sessions_ended": ended}

    done = operate(work)
    tell(f"The password is set; {done['sessions_ended']} sessions have ended.", done, as_json=as_json)


@app.command()
def sessions(user: Who, limit: Limit = 100, as_json: AsJson = False) -> None:
    """List a user's sessions that hold."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> Any:
        found = await o.operators.find_user(user)
        return await o.operators.sessions(user_id=found["id"], limit=limit)

    show(operate(work), as_json=as_json)


@app.command("export-erasures")
def export_erasures(
    file: Annotated[Path, typer.Argument(help="Where to write the ledger: keep it beside the backups, not in them")],
) -> None:
    """Write the ledger of erasures to a file."""
    from parley.cli.operating import operate  # noqa: PLC0415 - as above
    from parley.identity.erasures import render_ledger  # noqa: PLC0415 - as above

    entries = operate(lambda o: o.erasures.ledger())
    part = file.with_name(file.name + ".part")
    part.write_text(render_ledger(entries))
    part.replace(file)
    print(f"{len(entries)} entries are in {file}.")


@app.command("reapply-erasures")
def reapply_erasures(
    ledger: Annotated[
        Path | None, typer.Option(help="A ledger written by export-erasures, newer than the backup")
    ] = None,
    keep_sessions: Annotated[bool, typer.Option("--keep-sessions", help="Do not end every session")] = False,
    as_json: AsJson = False,
) -> None:
    """After a restore, before the server opens: erase again whom the ledger names, and end every session."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above
    from parley.identity.erasures import LedgerInvalid, parse_ledger  # noqa: PLC0415 - as above

    with explained():
        try:
            entries = parse_ledger(ledger.read_text()) if ledger is not None else []
        except (LedgerInvalid, OSError, UnicodeDecodeError) as problem:
            raise CommandFailed(f"{ledger} cannot be read as a ledger: {problem}") from None

    async def work(o: "Operating") -> dict[str, Any]:
        taken = await o.erasures.take_in(entries)
        # First of all: whoever comes back with the backup comes back signed in.
        ended = 0 if keep_sessions else await o.operators.end_sessions()
        return {"taken_in": taken, "erased": await o.erasures.reapply(), "sessions_ended": ended}

    done = operate(work)
    tell(
        f"{done['taken_in']} entries taken in, {len(done['erased'])} accounts erased, "
        f"{done['sessions_ended']} sessions ended.",
        done,
        as_json=as_json,
    )
