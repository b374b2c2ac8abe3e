"""Sharing a conversation with the workspace, and taking that back."""

from collections.abc import Mapping
from typing import Any

from parley.chat.messages import conversation_channel
from parley.core.db import UnitOfWork
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Scope
from parley.jobs.outbox import enqueue

SHARED = "conversation_shared"
"""The kind of the job that tells the others."""

# As when someone leaves the workspace: what they asked is brought to its end, and no more is written.
_STOP_OTHERS = """
    UPDATE replies SET cancel_requested = true, cancelled_by = $3
    WHERE workspace_id = $1 AND channel = $2 AND user_id <> $3 AND status IN ('queued', 'streaming')
      AND NOT cancel_requested
"""


class Sharing:
    """What follows from a change of who may read and write, in the unit of that change."""

    def __init__(self, unit: UnitOfWork, scope: Scope, revocations: Revocations | None) -> None:
        self._unit = unit
        self._scope = scope
        self._revocations = revocations

    async def change(self, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that a wish makes, given as `shared` and `shared_access`; none where it wishes nothing.

        Whoever may write no more has their replies there stopped, and every process looks again at who reads along when
        they may read no more: within two seconds, wherever they are connected.
        """
        if not wanted.keys() & {"shared", "shared_access"}:
            return {}
        access = wanted.get("shared_access")
        if wanted.get("shared") and access is None:
            access = before["shared_access"] or "read"
        if before["shared_access"] == "write" and access != "write":
            channel = conversation_channel(self._scope.workspace_id, before["id"])
            connection = await self._unit.driver()
            await connection.execute(_STOP_OTHERS, *channel.address, self._scope.user_id)
        if before["shared"] and access is None and self._revocations is not None:
            await self._revocations.announce(
                self._unit, Revocation("conversation", self._scope.workspace_id, before["id"])
            )
        if before["shared_access"] != access:
            await enqueue(
                self._unit,
                SHARED,
                {"conversation": str(before["id"])},
                workspace_id=self._scope.workspace_id,
                user_id=self._scope.user_id,
            )
        return {"shared": access is not None, "shared_access": access}
