"""What the chat has to have done in the background: finding titles, telling people what is shared with them."""

import logging
from typing import Any
from uuid import UUID

from parley.chat.repository import ConversationRepository
from parley.chat.sharing import SHARED
from parley.chat.titles import TITLE, Titles
from parley.core.scope import Role, Scope
from parley.jobs.registry import JobRun, JobType
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import Publisher, append
from parley.tenancy.operators import members_with

logger = logging.getLogger(__name__)

_TOLD = 500


class ShareNotices:
    """Tells the others of a workspace that a conversation is shared with them now, or no longer."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def handle(self, run: JobRun) -> None:
        """Append a notice to each inbox, of how it is by now. One that is told twice has the same `id`.

        In a workspace of more than 500 nobody is told: the list of conversations has it.
        """
        if run.user_id is None:
            return
        owner = Scope(run.workspace_id, run.user_id, Role.VIEWER, subject=str(run.user_id))
        conversation_id = UUID(run.payload["conversation"])
        async with run.database.unit_of_work(owner) as unit:
            row = await ConversationRepository(unit, owner).find(conversation_id)
        data: dict[str, Any] = {
            "id": str(run.id),
            "kind": "conversation_unshared",
            "text": "A conversation is no longer shared with you.",
            "conversation": {"id": str(conversation_id)},
        }
        if row is not None and row["shared"]:
            data["kind"] = "conversation_shared"
            may = "read and write in" if row["shared_access"] == "write" else "read"
            data["text"] = f"You may {may} a conversation of this workspace: {row['title'] or 'New conversation'}"
            data["conversation"] |= {
                "title": row["title"], "owner_id": str(run.user_id), "shared_access": row["shared_access"]
            }  # fmt: skip
        async with run.database.system_unit_of_work() as unit:
            others = set(await members_with(unit, run.workspace_id, Role.VIEWER)) - {run.user_id}
            if len(others) > _TOLD:
                logger.info("too many members to be told what is shared")
            elif others:
                events = [NewEvent(user_channel(run.workspace_id, one), "notice", data) for one in sorted(others)]
                await append(unit, self._publisher, events)


def job_types(titles: Titles, publisher: Publisher) -> list[JobType]:
    """Return the chat's kinds of jobs."""
    return [
        JobType(TITLE, titles.make, timeout_s=120, max_attempts=3, shown=False),
        JobType(SHARED, ShareNotices(publisher).handle, shown=False),
    ]
