"""`parley usage …`: the ledger of model calls."""

from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from parley.cli.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parley.cli.operating import Operating

app = typer.Typer(no_args_is_help=True, help="The ledger of model calls, and budgets.")


@app.callback()
def _group() -> None:
    """Keep `reconcile` a command of its own: a group of one would be taken for that one."""


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
