"""The fold of a reply: events in, message out. Server snapshots and clients run the same code.

A message is a plain dict in the shape of the HTTP contract. Nothing here raises on an event that does not fit: the
answer is False, and who holds the log decides what that means (a client takes a snapshot).
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

Message = dict[str, Any]
Data = dict[str, Any]

TERMINAL = frozenset({"reply.completed", "reply.failed", "reply.cancelled"})


def apply_reply_event(message: Message, e: str, d: Data) -> bool:
    """Apply one reply event to its message, in place.

    Returns False when the event does not fit what the message holds (text is missing before it): the message is
    unchanged then. Events that this version does not know are taken and change nothing.
    """
    if e == "reply.delta":
        return _delta(message, d)
    if e in TERMINAL:
        return _terminal(message, d)
    handler = _HANDLERS.get(e)
    return handler(message, d) if handler else True


def apply_reply_events(message: Message, events: Iterable[tuple[str, Data]]) -> bool:
    """Apply many events in order; False when one of them did not fit (the rest is still applied)."""
    fits = True
    for e, d in events:
        fits = apply_reply_event(message, e, d) and fits
    return fits


def visible_text(message: Message) -> str:
    """Return what a reader sees: the text parts, joined."""
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def digest(text: str) -> tuple[int, str]:
    """Return `len` and `sha256` of a terminal event: code points, and the hex digest of the UTF-8."""
    return len(text), hashlib.sha256(text.encode()).hexdigest()


def empty_part(kind: str) -> dict[str, Any]:
    """Return a part as `reply.part start` makes it."""
    if kind == "tool":
        return {"type": "tool", "call": None, "name": None, "state": "input", "input": None, "output": None}
    return {"type": kind, "text": ""}


def _delta(message: Message, d: Data) -> bool:
    parts = message["parts"]
    index = d["part"]
    if not 0 <= index < len(parts):
        return False
    part = parts[index]
    text = part.get("text")
    if text is None:
        return False
    x = d["x"]
    known = len(text) - d["off"]
    if known < 0:
        return False
    if known:
        x = x[known:]
    if x:
        # CPython grows a string in place while nothing else refers to it: thousands of deltas stay linear.
        part["text"] = None
        text += x
        part["text"] = text
    return True


def _queued(message: Message, d: Data) -> bool:  # noqa: ARG001 - one signature for all
    message["status"] = "queued"
    return True


def _running(message: Message, d: Data) -> bool:
    message["status"] = "streaming"
    if d.get("model") is not None:
        message["model"] = d["model"]
    return True


def _part(message: Message, d: Data) -> bool:
    if d["state"] != "start":
        return True
    parts = message["parts"]
    index, kind = d["part"], d["kind"]
    if index < len(parts):
        # After a reset the same place may be taken by another kind.
        if parts[index]["type"] != kind:
            parts[index:] = [empty_part(kind)]
        return True
    if index > len(parts):
        return False
    parts.append(empty_part(kind))
    return True


def _tool(message: Message, d: Data) -> bool:
    parts = message["parts"]
    index = d["part"]
    if index == len(parts):
        parts.append(empty_part("tool"))
    if index >= len(parts) or parts[index]["type"] != "tool":
        return False
    part = parts[index]
    if part["call"] not in {None, d["call"]}:
        part = parts[index] = empty_part("tool")
    part["call"] = d["call"]
    for key in ("name", "state", "input", "output"):
        if key in d:
            part[key] = d[key]
    return True


def _reset(message: Message, d: Data) -> bool:
    parts = message["parts"]
    index, to_off = d["part"], d["to_off"]
    if index >= len(parts):
        return not (to_off or index > len(parts))
    part = parts[index]
    if "text" in part:
        if to_off > len(part["text"]):
            return False
        part["text"] = part["text"][:to_off]
    del parts[index + 1 :]
    return True


def _terminal(message: Message, d: Data) -> bool:
    final = d["message"]
    message.clear()
    message.update(final)
    message["parts"] = [dict(part) for part in final["parts"]]
    return True


_HANDLERS: dict[str, Callable[[Message, Data], bool]] = {
    "reply.queued": _queued,
    "reply.started": _running,
    "reply.resumed": _running,
    "reply.part": _part,
    "reply.tool": _tool,
    "reply.reset": _reset,
}
