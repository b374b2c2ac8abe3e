"""`parley session …`: who is signed in."""

from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from parley.cli.options import AsJson, Limit
from parley.cli.problems import CommandFailed, explained

if TYPE_CHECKING:
    from parley.cli.operating import Operating

app = typer.Typer(no_args_is_help=True, help="Sessions: who is signed in.")

UserOption = Annotated[str | None, typer.Option("--user", help="Those of this user: e-mail address or id")]


@app.command("list")
def list_(user: UserOption = None, limit: Limit = 100, as_json: AsJson = False) -> None:
    """List sessions that hold, the last used first."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - long to import

    async def work(o: "Operating") -> Any:
        user_id = (await o.operators.find_user(user))["id"] if user else None
        return await o.operators.sessions(user_id=user_id, limit=limit)

    show(operate(work), as_json=as_json)


@app.command()
def revoke(
    session: Annotated[UUID | None, typer.Argument(help="The session's id", metavar="[SESSION]")] = None,
    user: UserOption = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every session of everyone, as after a restore")] = False,
    as_json: AsJson = False,
) -> None:
    """End a session, a user's sessions, or all of them."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    with explained():
        if [session is not None, user is not None, everyone].count(True) != 1:
            raise CommandFailed("name one of: a session's id, --user, --all")

    async def work(o: "Operating") -> int:
        user_id = (await o.operators.find_user(user))["id"] if user else None
        return await o.operators.end_sessions(id=session, user_id=user_id)

    ended = operate(work)
    tell(f"{ended} sessions have ended.", {"ended": ended}, as_json=as_json)
