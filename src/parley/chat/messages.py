"""Messages as callers see them: rows of the table, and what the log has of those that are being written."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.engine import RowMapping

from parley.chat.models import Conversation
from parley.chat.repository import MessageRepository
from parley.chat.schemas import ConversationRead, MessageRead
from parley.realtime.events import Channel
from parley.realtime.fold import apply_reply_event

OPEN = frozenset({"queued", "streaming"})

TITLE_LENGTH = 60
"""What a title has at most that no person wrote."""


def first_words(text: str) -> str | None:
    """Return the title that a first message makes until there is a better one; None where it says nothing.

    Cut between two words, where that leaves enough.
    """
    line = " ".join(text.split())
    if len(line) <= TITLE_LENGTH:
        return line or None
    whole, space, _ = line[: TITLE_LENGTH + 1].rpartition(" ")
    return whole if space and len(whole) > TITLE_LENGTH // 2 else line[:TITLE_LENGTH].strip()


def conversation_channel(workspace_id: UUID, conversation_id: UUID) -> Channel:
    """Return the channel of a conversation."""
    name = f"conversation:{conversation_id}"
    return Channel(workspace_id, name, name)


def conversation_of(name: str) -> UUID | None:
    """Return the conversation that a channel's name names, written as the server writes it, or None.

    A second spelling of an id would be a second name for one channel.
    """
    prefix, _, text = name.partition(":")
    try:
        found = UUID(text)
    except ValueError:
        return None
    return found if prefix == "conversation" and str(found) == text else None


def conversation_json(row: Mapping[str, Any] | RowMapping | Conversation) -> dict[str, Any]:
    """Return a conversation as events and snapshots carry it."""
    read = ConversationRead.model_validate(row if isinstance(row, Conversation) else dict(row))
    return read.model_dump(mode="json")


def message_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as events and snapshots carry it."""
    return MessageRead.model_validate(row).model_dump(mode="json")


async def materialise(messages: MessageRepository, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as JSON. One that is being written is folded from the log: its row holds no parts yet."""
    found = [message_json(row) for row in rows]
    being_written = {UUID(message["id"]): message for message in found if message["status"] in OPEN}
    if being_written:
        for id_, e, d in await messages.open_events(list(being_written)):
            apply_reply_event(being_written[id_], e, d)
    return found
