"""Options that many commands have."""

from typing import Annotated
from uuid import UUID

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="How many at most")]
Who = Annotated[str, typer.Argument(help="An e-mail address or an id", metavar="USER")]
WorkspaceId = Annotated[UUID, typer.Argument(help="The workspace's id", metavar="WORKSPACE")]
