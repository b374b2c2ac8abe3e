"""ChatGPT's export: `conversations.json`, a list of trees of nodes, of which many are not meant to be seen."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

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
from parley.chat.transfer.items import Beside

# The user's own standing instructions and memory, which ChatGPT puts in front of every conversation.
_HIDDEN: Final = frozenset({"user_editable_context", "model_editable_context", "reasoning_recap"})
_IMAGE: Final = "image_asset_pointer"
_ROLES: Final = {"user": "user", "assistant": "assistant", "tool": "assistant", "system": "system"}


def is_chatgpt(value: Mapping[str, Any]) -> bool:
    """Whether an element looks like one of these."""
    return isinstance(value.get("mapping"), dict)


def read_chatgpt(value: Mapping[str, Any], beside: Beside | None = None) -> DraftConversation:
    """Read a conversation. What is hidden is left out, and what follows it goes on from what came before it."""
    nodes = mapping_of(value["mapping"])
    source = text_of(value.get("conversation_id") or value.get("id"), limit=200)
    if not source:
        raise ItemRefused("It has no id.")
    shown = {id_: message for id_, node in nodes.items() if (message := _message(id_, node, beside)) is not None}
    above: dict[str, str | None] = {}
    for id_, message in shown.items():
        message.parent = _shown_above(id_, nodes, shown, above)
    current = text_of(value.get("current_node"))
    if current not in shown:
        current = _shown_above(current, nodes, shown, above) or ""
    return DraftConversation(
        source=f"chatgpt:{source}",
        title=title_of(value.get("title")),
        messages=list(shown.values()),
        current=current or None,
        at=moment_of(value.get("create_time")),
        changed_at=moment_of(value.get("update_time")),
        archived=value.get("is_archived") is True,
    )


def _shown_above(
    id: str, nodes: Mapping[str, Any], shown: Mapping[str, DraftMessage], known: dict[str, str | None]
) -> str | None:
    """Return the nearest node above that is shown; a circle of hidden ones leads nowhere."""
    way: list[str] = []
    seen: set[str] = set()
    at = id
    found: str | None = None
    while at not in seen:
        if at in known:
            found = known[at]
            break
        seen.add(at)
        way.append(at)
        parent = text_of(mapping_of(nodes.get(at)).get("parent"))
        if not parent or parent not in nodes:
            break
        if parent in shown:
            found = parent
            break
        at = parent
    known.update(dict.fromkeys(way, found))
    return found


def _message(id: str, node: object, beside: Beside | None) -> DraftMessage | None:
    message = mapping_of(mapping_of(node).get("message"))
    author, content = mapping_of(message.get("author")), mapping_of(message.get("content"))
    about = mapping_of(message.get("metadata"))
    role = _ROLES.get(text_of(author.get("role")))
    if role is None or about.get("is_visually_hidden_from_conversation") is True or message.get("weight") == 0:
        return None
    to = text_of(message.get("recipient")) or "all"
    parts = _parts(content, author=text_of(author.get("role")), to=to, beside=beside)
    files: list[DraftFile] = []
    if beside is not None and role == "user":
        # Only users' messages carry files here.
        files = _pictures(content, beside)
        parts = [{"type": "image", "attachment": number} for number in range(len(files))] + parts
    if not parts:
        return None
    return DraftMessage(
        source=id,
        parent=None,
        role=role,
        parts=parts,
        at=moment_of(message.get("create_time")),
        model=text_of(about.get("model_slug"), limit=100) or None if role == "assistant" else None,
        files=files,
    )


def _pictures(content: Mapping[str, Any], beside: Beside) -> list[DraftFile]:
    ids = (_asset(mapping_of(piece)) for piece in list_of(content.get("parts")))
    return [DraftFile(name, partial(beside.read, id_)) for id_ in ids if (name := beside.name(id_)) is not None]


def _asset(about: Mapping[str, Any]) -> str:
    """Return the id of an image: `file-service://file-AbC` and `sediment://file_00ab` are its forms."""
    pointer = text_of(about.get("asset_pointer"), limit=300) if about.get("content_type") == _IMAGE else ""
    return pointer.rpartition("/")[2]


def _parts(content: Mapping[str, Any], *, author: str, to: str, beside: Beside | None) -> list[dict[str, Any]]:
    kind = text_of(content.get("content_type"))
    if kind in _HIDDEN:
        return []
    if kind == "thoughts":
        said = [
            "\n\n".join(filter(None, (text_of(thought.get("summary")), text_of(thought.get("content")))))
            for thought in map(mapping_of, list_of(content.get("thoughts")))
        ]
        return [{"type": "reasoning", "text": text} for text in ["\n\n".join(filter(None, said))] if text]
    if kind in {"code", "execution_output"}:
        text = text_of(content.get("text"))
        language = text_of(content.get("language"), limit=30)
        language = "" if language == "unknown" else language
        return [text_part(_fenced(text, language or ("python" if to == "python" else "")))] if text.strip() else []
    if kind in {"tether_browsing_display", "tether_quote", "system_error"}:
        text = text_of(content.get("text") or content.get("result"))
        where = text_of(content.get("url"), limit=2000)
        quoted = "\n".join(f"> {line}" for line in [*text.splitlines(), *([where] if where else [])])
        return [text_part(quoted)] if text.strip() else []
    there = beside if author == "user" else None
    pieces = [_piece(piece, there) for piece in list_of(content.get("parts"))]
    text = "\n\n".join(filter(str.strip, pieces)) or text_of(content.get("text"))
    if author == "tool" and text.strip():
        text = _fenced(text, "")
    return [text_part(text)] if text.strip() else []


def _piece(piece: object, beside: Beside | None) -> str:
    if isinstance(piece, str):
        return text_of(piece)
    about = mapping_of(piece)
    if spoken := text_of(about.get("text")):
        return spoken
    if beside is not None and beside.name(_asset(about)) is not None:
        return ""
    kind = text_of(about.get("content_type")).removesuffix("_asset_pointer").replace("_", " ")
    # The export's files stand under other names, if at all.
    return f"[{kind or 'attachment'}: not in the export]" if about else ""


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
