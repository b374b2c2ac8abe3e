"""The state of each kind of channel, folded from its events.

A fold returns False when an event does not fit the state: text is missing before it.
"""

from collections.abc import Callable
from typing import Any

from parley.realtime.fold import TERMINAL, apply_reply_event, digest, visible_text

State = dict[str, Any]
Data = dict[str, Any]
Fold = Callable[[State, str, Data], bool]

FINISHED = frozenset({"completed", "failed", "cancelled"})
"""The statuses that a message does not leave."""
_JOB_OVER = FINISHED | {"succeeded", "done", "dead"}


def fold_for(channel: str) -> Fold:
    """Return the fold of a channel, by its name."""
    return _FOLDS.get(channel.partition(":")[0], _fold_items)


def find_message(state: State, id: str) -> dict[str, Any] | None:
    """Return a message of a conversation's state. Replies are mostly the newest: looked for from the end."""
    for message in reversed(state.get("messages", ())):
        if message["id"] == id:
            found: dict[str, Any] = message
            return found
    return None


def is_intact(state: State, e: str, d: Data) -> bool:
    """Rule 4: whether the text that was folded is the text that a terminal event vouches for."""
    if e not in TERMINAL or "sha256" not in d:
        return True
    message = find_message(state, d["reply"])
    return message is None or digest(visible_text(message)) == (d["len"], d["sha256"])


def unseen(state: State, e: str, d: Data) -> Data:
    """Return the part of a merged delta that the state does not hold yet."""
    if e != "reply.delta":
        return d
    message = find_message(state, d["reply"])
    if message is None or d["part"] >= len(message["parts"]):
        return d
    held = len(message["parts"][d["part"]].get("text") or "")
    return d if d["off"] >= held else {**d, "off": held, "x": d["x"][held - d["off"] :]}


def _fold_conversation(state: State, e: str, d: Data) -> bool:
    if e.startswith("reply."):
        message = find_message(state, d["reply"])
        return message is None or apply_reply_event(message, e, d)
    messages = state.setdefault("messages", [])
    conversation = state.setdefault("conversation", {})
    match e:
        case "message.created" | "message.updated":
            message = {key: value for key, value in d.items() if key != "cid"}
            message["parts"] = [dict(part) for part in d.get("parts") or ()]
            _put(messages, message)
            if e == "message.created":
                conversation["current_id"] = message["id"]
        case "message.deleted":
            gone = find_message(state, d["id"])
            if gone is not None:
                messages.remove(gone)
                if conversation.get("current_id") == gone["id"]:
                    conversation["current_id"] = gone.get("parent_id")
        case "conversation.changed":
            conversation.update(d)
    return True


def _fold_inbox(state: State, e: str, d: Data) -> bool:
    conversations, jobs = state.setdefault("conversations", []), state.setdefault("jobs", [])
    match e:
        case "conversation.created" | "conversation.updated":
            _put(conversations, d, first=True)
            conversations.sort(key=lambda item: (str(item.get("updated_at") or ""), str(item["id"])), reverse=True)
        case "conversation.deleted":
            _remove(conversations, d["id"])
        case "job.updated":
            if d.get("status") in _JOB_OVER:
                _remove(jobs, d["id"])
            else:
                _put(jobs, d)
    return True


def _fold_tasks(state: State, e: str, d: Data) -> bool:
    items = state.setdefault("items", [])
    match e:
        case "task.created" | "task.updated":
            _put(items, d, first=True)
        case "task.deleted":
            _remove(items, d["id"])
    return True


def _fold_items(state: State, e: str, d: Data) -> bool:
    """Keyed channels: the latest full value per key. Others hold no state that we know how to fold."""
    if "key" in d and isinstance(state.setdefault("items", {}), dict):
        if e.endswith(".remove"):
            state["items"].pop(d["key"], None)
        else:
            state["items"][d["key"]] = d
    return True


def _put(items: list[dict[str, Any]], value: dict[str, Any], *, first: bool = False) -> None:
    for index in range(len(items) - 1, -1, -1):
        if items[index]["id"] == value["id"]:
            items[index] = value
            return
    items.insert(0 if first else len(items), value)


def _remove(items: list[dict[str, Any]], id: str) -> None:
    items[:] = [item for item in items if item["id"] != id]


_FOLDS: dict[str, Fold] = {
    "conversation": _fold_conversation,
    "user": _fold_inbox,
    "tasks": _fold_tasks,
}
