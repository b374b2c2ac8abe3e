"""`parley workspace …`: workspaces and who belongs to them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from parley.cli.options import AsJson, Limit, Who, WorkspaceId
from parley.core.scope import Role

if TYPE_CHECKING:
    from parley.cli.operating import Operating

app = typer.Typer(no_args_is_help=True, help="Workspaces and their members.")


@app.command("list")
def list_(limit: Limit = 100, as_json: AsJson = False) -> None:
    """List workspaces, the oldest first."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - long to import

    show(operate(lambda o: o.workspaces.list(limit=limit)), as_json=as_json)


@app.command("show")
def show_(workspace: WorkspaceId, as_json: AsJson = False) -> None:
    """Show a workspace."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - as above

    show([operate(lambda o: o.workspaces.show(workspace))], as_json=as_json)


@app.command()
def members(workspace: WorkspaceId, as_json: AsJson = False) -> None:
    """List the members of a workspace."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - as above

    show(operate(lambda o: o.workspaces.members(workspace)), as_json=as_json)


@app.command("add-member")
def add_member(
    workspace: WorkspaceId,
    user: Who,
    role: Annotated[Role, typer.Option(help="What they may")] = Role.MEMBER,
    as_json: AsJson = False,
) -> None:
    """Give a user a place in a workspace."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        await o.workspaces.add_member(workspace, found["id"], role)
        return {"workspace_id": workspace, "user_id": found["id"], "role": role.value}

    done = operate(work)
    tell(f"{done['user_id']} is {role.value} of {workspace}.", done, as_json=as_json)


@app.command("set-role")
def set_role(
    workspace: WorkspaceId,
    user: Who,
    role: Annotated[Role, typer.Argument(help="What they may")],
    as_json: AsJson = False,
) -> None:
    """Change what a member may."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        await o.workspaces.set_role(workspace, found["id"], role)
        return {"workspace_id": workspace, "user_id": found["id"], "role": role.value}

    done = operate(work)
    tell(f"{done['user_id']} is {role.value} of {workspace}.", done, as_json=as_json)


@app.command()
def delete(
    workspace: WorkspaceId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a workspace with everything in it, at once and for good."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    if not yes:
        typer.confirm(f"Remove {workspace} with everything in it?", abort=True)
    operate(lambda o: o.workspaces.delete(workspace))
    tell(f"{workspace} is gone.", {"workspace_id": workspace, "deleted": True}, as_json=as_json)
