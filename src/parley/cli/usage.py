"""`parley usage …`: the ledger of model calls."""

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from parley.cli.options import AsJson, WorkspaceId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parley.cli.operating import Operating

app = typer.Typer(no_args_is_help=True, help="The ledger of model calls, budgets and ceilings.")

_DOLLARS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,8})?", re.ASCII)
_Ceiling = Annotated[
    str | None,
    typer.Option(metavar="DOLLARS|default", help="0: nothing; `default`: what the settings say for all workspaces"),
]


@app.command()
def reconcile(
    workspace: Annotated[UUID | None, typer.Option(help="Only this workspace")] = None, as_json: AsJson = False
) -> None:
    """Set the budgets' counters to what the ledger says; print those that said something else."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - long to import
    from parley.usage.sweeping import UnscopedLedger  # noqa: PLC0415 - as above

    async def work(o: "Operating") -> "Sequence[dict[str, Any]]":
        return await UnscopedLedger(o.database).reconcile(workspace)

    show(operate(work), as_json=as_json)


@app.command()
def ceiling(workspace: WorkspaceId, day: _Ceiling = None, month: _Ceiling = None, as_json: AsJson = False) -> None:
    """Show or set what a workspace may spend on the installation's provider keys, whatever its budgets say."""
    from parley.cli.operating import operate, show  # noqa: PLC0415 - as above
    from parley.usage.ceilings import Ceilings  # noqa: PLC0415 - as above
    from parley.usage.operators import UnscopedCeilings  # noqa: PLC0415 - as above
    from parley.usage.periods import Period  # noqa: PLC0415 - as above

    given = ((Period.DAY, "--day", day), (Period.MONTH, "--month", month))
    wanted = {period: _dollars(name, text) for period, name, text in given if text is not None}

    async def work(o: "Operating") -> "Sequence[dict[str, Any]]":
        ceilings = UnscopedCeilings(o.database, o.workspaces, Ceilings.from_settings(o.settings.llm))
        return await (ceilings.set(workspace, wanted) if wanted else ceilings.show(workspace))

    show(operate(work), as_json=as_json)


def _dollars(name: str, text: str) -> Decimal | None:
    if text == "default":
        return None
    if not _DOLLARS.fullmatch(text):
        raise typer.BadParameter("an amount of dollars like 25 or 0.50, or `default`", param_hint=name)
    return Decimal(text)
