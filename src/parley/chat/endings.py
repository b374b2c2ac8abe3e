"""How a reply ends, and the event that says so."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from parley.realtime.fold import digest, visible_text
from parley.usage.ledger import CallRecord

_RETRYABLE = frozenset({"provider_rate_limited", "provider_unavailable", "provider_timeout", "worker_lost", "internal"})


@dataclass(frozen=True, slots=True)
class Ending:
    """How a reply ended."""

    status: str
    parts: list[dict[str, Any]]
    model: str | None = None
    usage: dict[str, int] | None = None
    cost: Decimal | None = None
    error: dict[str, Any] | None = None
    records: tuple[CallRecord, ...] = ()
    """What the ledger is to have of it; the usage and the cost follow from that when it is stored."""
    prompt_path: str | None = None
    prompt_hash: str | None = None


class Stopped(Exception):
    """The reply cannot go on; `error` is what its reader is told."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["code"])
        self.error = error


def failure(code: str, message: str | None = None, *, retryable: bool | None = None) -> dict[str, Any]:
    """Return the `error` of a failed reply."""
    texts = {
        "worker_lost": "The server stopped while it was writing this reply. What it had written is kept.",
        "internal": "Something went wrong on our side. What was written is kept.",
        "bad_output": "The model's answer could not be used.",
    }
    return {
        "code": code,
        "msg": message or texts[code],
        "retryable": code in _RETRYABLE if retryable is None else retryable,
    }


def terminal_data(reply_id: UUID, message: dict[str, Any], end: Ending, by: UUID | None) -> dict[str, Any]:
    """Return the data of a reply's terminal event: the whole message, and what every client checks its text by."""
    d = {
        "reply": str(reply_id),
        "message": message,
        "usage": message["usage"],
        "cost": message["cost"],
        **_check(end.parts),
    }
    if end.status == "completed":
        return d
    d["partial"] = True
    if end.status == "cancelled":
        return {**d, "by": str(by)}
    return {**d, "error": end.error, "can": ["continue", "regenerate"]}


def _check(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the check of a terminal event: `len` in code points and `sha256` of the visible text."""
    length, sha256 = digest(visible_text({"parts": parts}))
    return {"len": length, "sha256": sha256}
