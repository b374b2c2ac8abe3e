"""How many workspaces a person makes: what an operator bounds for each of them is bounded for a person only by this."""

from datetime import timedelta
from typing import Literal
from uuid import UUID

from parley.core import clock
from parley.core.db import UnitOfWork
from parley.tenancy.audit import Action, record
from parley.tenancy.errors import TooManyWorkspaces
from parley.tenancy.repository import UnscopedWorkspaceRepository

_MONTH = timedelta(days=30)


async def keep_few(repository: UnscopedWorkspaceRepository, user_id: UUID, per_month: int | None) -> None:
    """Raise `TooManyWorkspaces` for somebody who has made that many in the last 30 days; None is no bound."""
    if per_month is None:
        return
    made, first = await repository.made_since(user_id, clock.now() - _MONTH)
    if first is not None and made >= per_month:
        raise TooManyWorkspaces(retry_after_s=int((first + _MONTH - clock.now()).total_seconds()) + 1)


async def remember_making(
    unit: UnitOfWork, user_id: UUID, workspace_id: UUID, *, actor: Literal["user", "issuer"]
) -> None:
    """Put it into the installation's audit log, where it stays when the workspace goes."""
    await record(unit, Action.WORKSPACE_CREATED, user_id=user_id, actor=actor, target=str(workspace_id))
