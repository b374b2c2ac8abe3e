"""Conversations: making, listing, changing, reading. What answers a message is in `turns.py`."""

from typing import Any
from uuid import UUID

from parley.chat.errors import ConversationNotFound
from parley.chat.messages import conversation_channel, conversation_json, materialise
from parley.chat.models import Conversation
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.chat.schemas import ConversationCreate, ConversationRead, ConversationUpdate
from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.scope import Scope
from parley.realtime.bus import Bus
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import append, forget_channel

_table = Conversation.__table__  # type: ignore[attr-defined]  # SQLModel does not type it


class ConversationService:
    """What a user does with conversations, inside one unit of work."""

    def __init__(self, unit: UnitOfWork, scope: Scope, bus: Bus) -> None:
        self._unit = unit
        self._scope = scope
        self._bus = bus
        self._conversations = ConversationRepository(unit, scope)
        self._messages = MessageRepository(unit, scope)

    async def _tell(self, e: str, d: dict[str, Any]) -> None:
        channel = user_channel(self._scope.workspace_id, self._scope.user_id)
        await append(self._unit, self._bus, [NewEvent(channel, e, d)])

    async def start(self, wanted: ConversationCreate) -> ConversationRead:
        """Make a conversation."""
        moment = clock.now()
        row = await self._conversations.add(
            Conversation(
                workspace_id=self._scope.workspace_id,
                owner_id=self._scope.user_id,
                title=wanted.title,
                model=wanted.model,
                assistant=wanted.assistant,
                created_at=moment,
                updated_at=moment,
            )
        )
        await self._tell("conversation.created", conversation_json(row))
        return ConversationRead.model_validate(row)

    async def get(self, id: UUID) -> ConversationRead:
        """Return a conversation, or raise."""
        return ConversationRead.model_validate(dict(await self._conversations.get(id)))

    async def page(self, page: PageRequest, *, archived: bool) -> tuple[list[ConversationRead], int]:
        """Return the user's conversations, the one that moved last first."""
        order = (_table.c.updated_at.desc(), _table.c.id.desc())
        rows, total = await self._conversations.page(page, _table.c.archived == archived, order_by=order)
        return [ConversationRead.model_validate(dict(row)) for row in rows], total

    async def change(self, id: UUID, wanted: ConversationUpdate) -> ConversationRead:
        """Change what is named, or raise."""
        values = wanted.model_dump(exclude_unset=True)
        row = await self._conversations.change(id, {**values, "updated_at": clock.now()})
        await self._tell("conversation.updated", conversation_json(row))
        return ConversationRead.model_validate(dict(row))

    async def delete(self, id: UUID) -> None:
        """Remove a conversation with its messages and its log. A reply that is being written there is given up."""
        channel = conversation_channel(self._scope.workspace_id, id)
        # The lock first, then the log's rows: the order in which a send takes them.
        await self._conversations.lock(id)
        await self._conversations.delete(id)
        await forget_channel(self._unit, channel)
        await self._tell("conversation.deleted", {"id": str(id)})
        self._unit.after_commit(lambda: self._bus.close_channel(channel.address))

    async def messages(self, id: UUID, *, before: UUID | None, limit: int) -> tuple[list[dict[str, Any]], UUID | None]:
        """Return the newest messages before one, ascending, and where the next stretch starts."""
        rows = await self._messages.page(id, before=before, limit=limit + 1)
        if not rows:
            # An empty conversation is not an absent one.
            await self._conversations.get(id)
        more = len(rows) > limit
        rows = rows[:limit][::-1]
        return await materialise(self._messages, rows), rows[0]["id"] if more else None

    async def snapshot(self, id: UUID, *, limit: int = 50) -> dict[str, Any]:
        """Return the state of the conversation's channel."""
        row = await self._conversations.find(id)
        if row is None:
            raise ConversationNotFound
        rows = await self._messages.page(id, before=None, limit=limit)
        return {"conversation": conversation_json(row), "messages": await materialise(self._messages, rows[::-1])}

    async def inbox(self, *, limit: int = 50) -> dict[str, Any]:
        """Return the chat's part of the state of the user's own channel."""
        order = (_table.c.updated_at.desc(), _table.c.id.desc())
        rows, _ = await self._conversations.page(
            PageRequest(1, limit),
            _table.c.archived.is_(False),
            order_by=order,
        )
        return {"conversations": [conversation_json(row) for row in rows]}
