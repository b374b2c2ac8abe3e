"""Other versions of a message: an edit stands beside what it edits, and both keep what followed them."""

from dataclasses import dataclass
from uuid import UUID

from parley.chat.errors import MessageNotFound, NotAQuestion
from parley.chat.repository import MessageRepository
from parley.chat.turns import Send, Sent, Turns
from parley.core.db import Database
from parley.core.scope import Scope


@dataclass(frozen=True, slots=True)
class Edit:
    """A wish for another version of a question. `cid` makes it idempotent, as with a send."""

    message_id: UUID
    cid: UUID
    contents: tuple[str | UUID, ...]
    model: str | None = None
    on_active: str = "queue"


class Branches:
    """Makes branches of conversations."""

    def __init__(self, database: Database, turns: Turns) -> None:
        self._database = database
        self._turns = turns

    async def edit(self, scope: Scope, wanted: Edit) -> Sent:
        """Store another version of a question beside it and have it answered; the old branch stays.

        Raises `MessageNotFound`, `NotAQuestion` for what a model said, and what `Turns.send` raises.
        """
        async with self._database.unit_of_work(scope) as unit:
            # None of what is read here ever changes, so the send need not read it again.
            message = (await MessageRepository(unit, scope).find_all([wanted.message_id])).get(wanted.message_id)
        if message is None:
            raise MessageNotFound
        if message["role"] != "user":
            raise NotAQuestion
        return await self._turns.send(
            scope,
            Send(
                conversation_id=message["conversation_id"],
                cid=wanted.cid,
                contents=wanted.contents,
                model=wanted.model,
                parent=message["parent_id"],
                on_active=wanted.on_active,
                edits=wanted.message_id,
            ),
        )
