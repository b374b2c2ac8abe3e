"""Conversations: making, listing, changing, reading. What answers a message is in `turns.py`."""

from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ColumnElement

from parley.chat.errors import ConversationNotFound, MessageNotFound
from parley.chat.inbox import tell_owner
from parley.chat.messages import conversation_channel, conversation_json, first_words, materialise
from parley.chat.models import Conversation
from parley.chat.payments import abandon, waiting_in
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.chat.schemas import ConversationCreate, ConversationRead, ConversationUpdate
from parley.chat.sharing import Sharing
from parley.core import clock
from parley.core.db import UnitOfWork
from parley.core.pagination import PageRequest
from parley.core.revocations import Revocations
from parley.core.scope import Scope
from parley.realtime.bus import Bus
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import append, forget_channel

_table = Conversation.__table__  # type: ignore[attr-defined]  # SQLModel does not type it

Whose = Literal["mine", "shared", "all"]


class ConversationService:
    """What a user does with conversations, inside one unit of work."""

    def __init__(self, unit: UnitOfWork, scope: Scope, bus: Bus, revocations: Revocations | None = None) -> None:
        self._unit = unit
        self._scope = scope
        self._bus = bus
        self._revocations = revocations
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
                title_by="person" if wanted.title else None,
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

    async def page(
        self, page: PageRequest, *, archived: bool, whose: Whose = "mine", pinned: bool | None = None
    ) -> tuple[list[ConversationRead], int]:
        """Return conversations of the user's, shared ones of others, or both; pinned first, then what moved last."""
        found = self._conversations
        where = [_table.c.archived == archived]
        if whose != "all":
            where.append(found.mine if whose == "mine" else ~found.mine)
        # An owner's own is a column, and an index has it.
        is_pinned: ColumnElement[bool] = _table.c.pinned if whose == "mine" else found.pinned
        if pinned is not None:
            where.append(is_pinned == pinned)
        order: tuple[ColumnElement[Any], ...] = (is_pinned.desc(), _table.c.updated_at.desc(), _table.c.id.desc())
        rows, total = await found.page(page, *where, order_by=order)
        return [ConversationRead.model_validate(dict(row)) for row in rows], total

    async def change(self, id: UUID, wanted: ConversationUpdate) -> ConversationRead:
        """Change what is named, or raise.

        Whoever may write chooses the branch, whoever sees the conversation may pin it, the rest is its owner's. Raises
        `ConversationNotFound`, `ReadOnly`, `NotTheOwner`, and `MessageNotFound` for a branch that is not here.
        """
        values = wanted.model_dump(exclude_unset=True)
        if values.keys() <= {"pinned"}:
            before = await self._conversations.get(id, lock=True)
        else:
            before = await self._conversations.lock(id, owner=not values.keys() <= {"pinned", "current_id"})
        is_owner = before["owner_id"] == self._scope.user_id
        if not is_owner and "pinned" in values:
            await self._conversations.pin(id, pinned=values.pop("pinned"))
        if "current_id" in values:
            values["current_id"] = await self._messages.end_of(id, values["current_id"])
            if values["current_id"] is None:
                raise MessageNotFound
        if "title" in values:
            values["title_by"] = "person" if values["title"] else None
            values["title"] = values["title"] or first_words(await self._messages.first_text(id))
        sharing = Sharing(self._unit, self._scope, self._revocations)
        values |= await sharing.change(dict(before), values)
        if values:
            # What moved and what one did to the list are not the same: a pin does not bring it to the top.
            moved = {} if values.keys() <= {"pinned", "archived", "current_id"} else {"updated_at": clock.now()}
            row = await self._conversations.change(id, {**values, **moved})
            await tell_owner(self._unit, self._bus, dict(row), readers=not values.keys() <= {"pinned"})
        return ConversationRead.model_validate(dict(await self._conversations.get(id)))

    async def delete(self, id: UUID) -> None:
        """Remove a conversation with its messages and its log. A reply that is being written there is given up."""
        channel = conversation_channel(self._scope.workspace_id, id)
        # The lock first, then the log's rows: the order in which a send takes them.
        await self._conversations.lock(id, owner=True)
        await self._conversations.delete(id)
        waiting = await waiting_in(self._unit, channel)
        await forget_channel(self._unit, channel)
        await self._tell("conversation.deleted", {"id": str(id)})
        await abandon(self._unit, self._scope.workspace_id, {id: waiting})
        self._unit.after_commit(lambda: self._bus.close_channel(channel.address))

    async def messages(
        self, id: UUID, *, before: UUID | None, limit: int, branch: UUID | None = None
    ) -> tuple[list[dict[str, Any]], UUID | None]:
        """Return the newest messages before one, ascending, and where the next stretch starts.

        `branch`: only those that lead to this message, itself included.
        """
        if branch is None:
            rows = await self._messages.page(id, before=before, limit=limit + 1)
        else:
            rows = await self._messages.branch(id, end=branch, before=before, limit=limit + 1)
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
            self._conversations.mine,
            _table.c.archived.is_(False),
            order_by=order,
        )
        return {"conversations": [conversation_json(row) for row in rows]}
