"""Our own export, which loses nothing on the way back but ids, usage and cost."""

import base64
import binascii
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid5

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
from parley.chat.transfer.schemas import FORMAT, VERSION

_ROLES: Final = frozenset({"user", "assistant", "system"})
_STATUSES: Final = frozenset({"completed", "failed", "cancelled"})
_STATES: Final = frozenset({"done", "failed", "unknown"})
_ESCAPED_NUL: Final = re.compile(r"(\\\\)|\\u0000")
_NAMESPACE: Final = UUID("0193c0de-0000-7000-8000-000000000000")


def is_own(value: Mapping[str, Any]) -> bool:
    """Whether an element is one of ours."""
    return value.get("format") == FORMAT


def read_own(value: Mapping[str, Any]) -> DraftConversation:
    """Read a conversation. Files whose bytes are not in the export become a note."""
    if value.get("version") != VERSION:
        raise ItemRefused("It was exported by a later version.")
    about = mapping_of(value.get("conversation"))
    source = text_of(about.get("id"), limit=200)
    if not source:
        raise ItemRefused("It has no id.")
    files = {
        text_of(found.get("id")): (text_of(found.get("name"), limit=200), found.get("data"))
        for found in map(mapping_of, list_of(value.get("attachments")))
    }
    messages = [_message(found, files) for found in map(mapping_of, list_of(value.get("messages")))]
    return DraftConversation(
        source=f"parley:{source}",
        title=title_of(about.get("title")),
        messages=messages,
        current=text_of(about.get("current_id")) or None,
        at=moment_of(about.get("created_at")),
        changed_at=moment_of(about.get("updated_at")),
        archived=about.get("archived") is True,
    )


def _message(found: Mapping[str, Any], files: Mapping[str, tuple[str, object]]) -> DraftMessage:
    id_, role = text_of(found.get("id"), limit=200), text_of(found.get("role"))
    if not id_ or role not in _ROLES:
        raise ItemRefused("One of its messages has no id, or no role that is known.")
    message = DraftMessage(
        source=id_,
        parent=text_of(found.get("parent_id"), limit=200) or None,
        role=role,
        parts=[],
        at=moment_of(found.get("created_at")),
        model=text_of(found.get("model"), limit=100) or None,
        # What was being written when it was exported goes no further here.
        status=status if (status := text_of(found.get("status"))) in _STATUSES else "cancelled",
    )
    for part in map(mapping_of, list_of(found.get("parts"))):
        match part.get("type"):
            case "text" | "reasoning" as kind:
                message.parts.append({"type": kind, "text": text_of(part.get("text"))})
            case "tool":
                message.parts.append(_tool(part))
            case "image" | "file" as kind:
                name, data = files.get(text_of(part.get("attachment")), (text_of(part.get("name"), limit=200), None))
                if (content := _decoded(data)) is None:
                    message.parts.append(text_part(f"[{name or kind}: not in the export]"))
                else:
                    message.parts.append({"type": kind, "attachment": len(message.files)})
                    message.files.append(DraftFile(name or kind, partial(bytes, content)))
    return message


def _tool(part: Mapping[str, Any]) -> dict[str, Any]:
    call = text_of(part.get("call"), limit=200)
    try:
        id_ = UUID(call)
    except ValueError:
        id_ = uuid5(_NAMESPACE, call)
    state = text_of(part.get("state"))
    return {
        "type": "tool",
        "call": str(id_),
        "name": text_of(part.get("name"), limit=100) or "tool",
        # A call that nobody knows the end of is made by nobody here.
        "state": state if state in _STATES else "unknown",
        "input": _storable(part.get("input")) if isinstance(part.get("input"), dict) else None,
        "output": _storable(part.get("output")) if isinstance(part.get("output"), dict) else None,
    }


def _storable(value: object) -> Any:
    """Return JSON without what PostgreSQL cannot hold."""
    text = orjson.dumps(value).decode()
    # A backslash that is itself escaped goes first: what follows it is no escape.
    return orjson.loads(_ESCAPED_NUL.sub(lambda found: found[1] or "", text))


def _decoded(data: object) -> bytes | None:
    if not isinstance(data, str):
        return None
    try:
        return base64.b64decode(data, validate=True) or None
    except (ValueError, binascii.Error):
        return None
