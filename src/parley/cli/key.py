"""`parley key …`: API keys."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from parley.cli.options import AsJson, Limit, Who, WorkspaceId
from parley.cli.problems import CommandFailed, explained

if TYPE_CHECKING:
    from parley.cli.operating import Operating

app = typer.Typer(no_args_is_help=True, help="API keys.")


@app.command("list")
def list_(
    user: Annotated[str | None, typer.Option(help="Only those of this user: e-mail address or id")] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List API keys, without what they are."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - long to import

    async def work(o: "Operating") -> Any:
        user_id = (await o.operators.find_user(user))["id"] if user else None
        return await o.operators.keys(user_id=user_id, limit=limit)

    show(operate(work), as_json=as_json)


@app.command()
def create(
    user: Who,
    workspace: WorkspaceId,
    name: Annotated[str, typer.Option(help="What it is for")],
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may, like tasks:read; all that a key can if left out")
    ] = None,
    expires: Annotated[datetime | None, typer.Option(help="Until when, in UTC")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key with the rights of a member. It is printed now and never again."""
    from datetime import UTC  # noqa: PLC0415 - as above

    from pydantic import ValidationError  # noqa: PLC0415 - as above

    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above
    from parley.identity.api_key_schemas import ApiKeyCreate  # noqa: PLC0415 - as above

    given: dict[str, Any] = {"name": name}
    if scope:
        given["scopes"] = scope
    if expires is not None:
        given["expires_at"] = expires.replace(tzinfo=UTC).isoformat()
    with explained():
        try:
            wanted = ApiKeyCreate.model_validate_json(_json(given))
        except ValidationError as error:
            lines = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
            raise CommandFailed(f"the key cannot be made: {lines}") from None

    async def work(o: "Operating") -> dict[str, Any]:
        found = await o.operators.find_user(user)
        return (await o.operators.create_key(found["id"], workspace, wanted)).model_dump(mode="json")

    made = operate(work)
    tell(str(made["key"]), made, as_json=as_json)


@app.command()
def revoke(
    key: Annotated[UUID, typer.Argument(help="The key's id, as `parley key list` shows it", metavar="KEY")],
    as_json: AsJson = False,
) -> None:
    """End a key, at once."""
    from parley.cli.operating import operate, tell  # noqa: PLC0415 - as above

    operate(lambda o: o.operators.revoke_key(key))
    tell(f"{key} is revoked.", {"id": key, "revoked": True}, as_json=as_json)


def _json(value: dict[str, Any]) -> bytes:
    import orjson  # noqa: PLC0415 - as above

    return orjson.dumps(value)
