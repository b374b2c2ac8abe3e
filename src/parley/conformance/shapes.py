"""The shape of every frame that a server sends: which fields there are and of what type. More may come."""

from typing import Any

from parley.conformance.transcript import Frame

_TEXT, _WHOLE, _NUMBER, _BOOL, _OBJECT, _LIST = "text", "whole number", "number", "true or false", "object", "list"

_FRAMES: dict[str, dict[str, str]] = {
    "welcome": {
        "v": _WHOLE, "conn": _TEXT, "user": _TEXT, "workspace": _TEXT, "hb": _NUMBER, "expires_at": _NUMBER,
        "limits": _OBJECT, "durable": _BOOL, "now": _NUMBER,
    },
    "ok": {},
    "err": {"code": _TEXT, "msg": _TEXT, "retry": _TEXT},
    "subbed": {
        "ch": _TEXT, "ep": _TEXT, "head": _WHOLE, "floor": _WHOLE, "mode": _TEXT, "recovered": _BOOL, "why": _TEXT,
    },
    "snap": {"ch": _TEXT, "ep": _TEXT, "seq": _WHOLE, "part": _WHOLE, "more": _BOOL, "state": _OBJECT},
    "ev": {"ch": _TEXT, "seq": _WHOLE, "e": _TEXT, "d": _OBJECT, "ts": _NUMBER},
    "live": {"ch": _TEXT, "seq": _WHOLE},
    "eph": {"ch": _TEXT, "e": _TEXT, "d": _OBJECT},
    "hb": {"ts": _NUMBER, "heads": _OBJECT},
    "auth.expiring": {"at": _NUMBER},
    "unsubbed": {"ch": _TEXT, "code": _TEXT, "retry": _TEXT},
    "goaway": {"reason": _TEXT, "reconnect_after_ms": _NUMBER, "deadline_ms": _NUMBER},
}  # fmt: skip

_END = {"reply": _TEXT, "message": _OBJECT, "len": _WHOLE, "sha256": _TEXT}
_EVENTS: dict[str, dict[str, str]] = {
    "message.created": {"id": _TEXT, "role": _TEXT, "parts": _LIST, "status": _TEXT},
    "message.updated": {"id": _TEXT, "role": _TEXT, "parts": _LIST, "status": _TEXT},
    "message.deleted": {"id": _TEXT},
    "reply.queued": {"reply": _TEXT, "to": _TEXT, "pos": _WHOLE},
    "reply.started": {"reply": _TEXT, "to": _TEXT, "model": _TEXT, "attempt": _WHOLE},
    "reply.part": {"reply": _TEXT, "part": _WHOLE, "kind": _TEXT, "state": _TEXT},
    "reply.delta": {"reply": _TEXT, "part": _WHOLE, "off": _WHOLE, "x": _TEXT},
    "reply.tool": {"reply": _TEXT, "part": _WHOLE, "call": _TEXT, "name": _TEXT, "state": _TEXT},
    "reply.resumed": {"reply": _TEXT, "attempt": _WHOLE, "model": _TEXT, "strategy": _TEXT},
    "reply.reset": {"reply": _TEXT, "attempt": _WHOLE, "part": _WHOLE, "to_off": _WHOLE},
    "reply.completed": _END,
    "reply.failed": {**_END, "error": _OBJECT, "partial": _BOOL, "can": _LIST},
    "reply.cancelled": {**_END, "by": _TEXT, "partial": _BOOL},
}

_CLOSED: dict[tuple[str, str], set[str]] = {
    ("err", "code"): {
        "bad_frame", "invalid", "unauthenticated", "forbidden", "not_found", "conflict", "busy", "rate_limited",
        "too_large", "active_reply", "limit_subs", "over_budget", "unavailable", "expired", "internal",
    },
    ("err", "retry"): {"never", "now", "backoff"},
    ("unsubbed", "retry"): {"never", "now", "backoff"},
    ("subbed", "why"): {"ok", "initial", "epoch", "trimmed", "too_far"},
    ("subbed", "mode"): {"log", "keyed", "latest"},
    ("reply.part", "kind"): {"text", "reasoning", "tool"},
    ("reply.part", "state"): {"start", "end"},
    ("reply.tool", "state"): {"input", "approval", "running", "done", "failed", "unknown"},
    ("reply.resumed", "strategy"): {"restart", "reattach", "prefill", "fallback"},
}  # fmt: skip


def misshapen(frame: Frame) -> str | None:
    """Return what is wrong with the shape of a server's frame, None when nothing is."""
    t = frame["t"]
    if t not in _FRAMES:
        return f"the protocol has no frame `{t}`"
    if problem := _fields(t, _FRAMES[t], frame):
        return problem
    if t == "ev":
        e = frame["e"]
        if "from" in frame and not _is(_WHOLE, frame["from"]):
            return "`ev.from` must be a whole number"
        if e in _EVENTS:
            return _fields(e, _EVENTS[e], frame["d"])
    return None


def _fields(name: str, fields: dict[str, str], value: dict[str, Any]) -> str | None:
    for field, kind in fields.items():
        if field not in value:
            return f"`{name}` lacks its field `{field}`"
        if not _is(kind, value[field]):
            return f"`{name}.{field}` must be a {kind}"
        known = _CLOSED.get((name, field))
        if known is not None and value[field] not in known:
            return f"`{name}.{field}` must be one of {', '.join(sorted(known))}"
    return None


def _is(kind: str, value: object) -> bool:
    match kind:
        case "text":
            return isinstance(value, str)
        case "whole number":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "true or false":
            return isinstance(value, bool)
        case "object":
            return isinstance(value, dict)
        case _:
            return isinstance(value, list)
