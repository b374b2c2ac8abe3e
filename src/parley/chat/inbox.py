"""Telling a conversation's owner how it stands, whoever has moved it."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from parley.chat.messages import conversation_channel, conversation_json
from parley.core.db import UnitOfWork
from parley.realtime.events import NewEvent, user_channel
from parley.realtime.log import Publisher, append


async def tell_owner(
    unit: UnitOfWork, publisher: Publisher, conversation: Mapping[str, Any], *, readers: bool = False
) -> None:
    """Append `conversation.updated` to the owner's inbox, with `readers` also `conversation.changed` for who reads it.

    `conversation` is the row, `pinned` the owner's. The inbox comes last in a transaction, right before the commit:
    all sends of a user meet at its head.
    """
    workspace_id: UUID = unit.scope.workspace_id
    owner_id: UUID = conversation["owner_id"]
    whole = conversation_json(conversation)
    events = [NewEvent(user_channel(workspace_id, owner_id), "conversation.updated", whole)]
    if readers:
        channel = conversation_channel(workspace_id, conversation["id"])
        events.insert(0, NewEvent(channel, "conversation.changed", common(whole)))
    await append(unit, publisher, events, as_user=owner_id if owner_id != unit.scope.user_id else None)


def common(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is the same for everyone who reads a conversation: not whether they have pinned it."""
    return {key: value for key, value in conversation.items() if key != "pinned"}
