"""Claude's export: `conversations.json`, a list of conversations with their messages one after the other."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import orjson

from parley.chat.transfer.drafts import (
    DraftConversation,
    DraftFile,
    DraftMessage,
    list_of,
    mapping_of,
    moment_of,
    text_of,
    text_part,
    title_of,
)
from parley.chat.transfer.errors import ItemRefused

_ROLES = {"human": "user", "assistant": "assistant"}


def is_claude(value: Mapping[str, Any]) -> bool:
    """Whether an element looks like one of these."""
    return isinstance(value.get("chat_messages"), list)


def read_claude(value: Mapping[str, Any]) -> DraftConversation:
    """Read a conversation. Newer exports name each message's parent; in older ones it is the message before."""
    source = text_of(value.get("uuid"), limit=200)
    if not source:
        raise ItemRefused("It has no id.")
    messages: list[DraftMessage] = []
    # A message that is left out leads to the one before it.
    instead: dict[str, str | None] = {}
    before: str | None = None
    for number, found in enumerate(map(mapping_of, list_of(value["chat_messages"]))):
        id_ = text_of(found.get("uuid"), limit=200) or f"number {number}"
        parent = text_of(found.get("parent_message_uuid"), limit=200)
        above = (instead.get(parent, parent) if parent else before) or None
        message = _message(id_, above, found)
        if message is None:
            instead[id_] = above
            continue
        messages.append(message)
        before = id_
    current = text_of(value.get("current_leaf_message_uuid"), limit=200)
    return DraftConversation(
        source=f"claude:{source}",
        title=title_of(value.get("name")),
        messages=messages,
        current=instead.get(current, current) or before,
        at=moment_of(value.get("created_at")),
        changed_at=moment_of(value.get("updated_at")),
    )


def _message(id: str, parent: str | None, found: Mapping[str, Any]) -> DraftMessage | None:
    role = _ROLES.get(text_of(found.get("sender")))
    if role is None:
        return None
    parts = [part for block in map(mapping_of, list_of(found.get("content"))) if (part := _part(block))]
    if not any(part["type"] == "text" for part in parts) and (text := text_of(found.get("text"))).strip():
        parts.append(text_part(text))
    files: list[DraftFile] = []
    for about in map(mapping_of, list_of(found.get("attachments"))):
        name, said = text_of(about.get("file_name"), limit=200), text_of(about.get("extracted_content"))
        if said:
            parts.append({"type": "file", "attachment": len(files)})
            files.append(DraftFile(name or "attachment.txt", partial(str.encode, said)))
        elif name:
            parts.append(text_part(f"[{name}: not in the export]"))
    names = (text_of(mapping_of(about).get("file_name"), limit=200) for about in list_of(found.get("files")))
    parts += [text_part(f"[{name}: not in the export]") for name in names if name]
    if not parts:
        return None
    return DraftMessage(id, parent, role, parts, at=moment_of(found.get("created_at")), files=files)


def _part(block: Mapping[str, Any]) -> dict[str, Any] | None:
    match block.get("type"):
        case "text":
            text = text_of(block.get("text"))
            return text_part(text) if text.strip() else None
        case "thinking":
            text = text_of(block.get("thinking"))
            return {"type": "reasoning", "text": text} if text.strip() else None
        case "tool_use":
            said = orjson.dumps(mapping_of(block.get("input")), option=orjson.OPT_INDENT_2).decode()
            return text_part(f"Tool {text_of(block.get('name'), limit=100)}:\n\n```json\n{text_of(said)}\n```")
        case "tool_result":
            texts = [text_of(mapping_of(one).get("text")) for one in list_of(block.get("content"))]
            said = "\n".join(filter(str.strip, texts)) or text_of(block.get("content"))
            return text_part("\n".join(f"> {line}" for line in said.splitlines())) if said.strip() else None
        case _:
            return None
