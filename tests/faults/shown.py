"""The text that a device shows, put together by offset. Not the product's fold: a second opinion of it."""

import hashlib
from typing import Any

Frame = dict[str, Any]

TERMINAL = frozenset({"reply.completed", "reply.failed", "reply.cancelled"})


class Shown:
    """The parts of each reply: their kinds and their texts."""

    def __init__(self) -> None:
        self.texts: dict[str, dict[int, str]] = {}
        self.kinds: dict[str, dict[int, str]] = {}

    def visible(self, reply: str) -> str:
        """Return the visible text of a reply."""
        kinds = self.kinds.get(reply, {})
        return "".join(text for part, text in sorted(self.texts.get(reply, {}).items()) if kinds.get(part) == "text")

    def adopt(self, message: Frame) -> None:
        """Show a message as it is."""
        parts = message["parts"]
        self.texts[message["id"]] = {n: part.get("text") or "" for n, part in enumerate(parts)}
        self.kinds[message["id"]] = {n: part["type"] for n, part in enumerate(parts)}

    def fold(self, e: str, d: Frame) -> bool:
        """Apply what changes text. Returns False when the text is not the one that the server speaks of."""
        if e == "message.created":
            self.adopt(d)
            return True
        reply = d.get("reply")
        if reply is None:
            return True
        texts, kinds = self.texts.setdefault(reply, {}), self.kinds.setdefault(reply, {})
        match e:
            case "reply.part" if d["state"] == "start":
                kinds[d["part"]] = d["kind"]
                texts.setdefault(d["part"], "")
            case "reply.delta":
                held = texts.get(d["part"], "")
                if d["off"] > len(held):
                    return False
                texts[d["part"]] = held[: d["off"]] + d["x"] if d["off"] + len(d["x"]) > len(held) else held
            case "reply.reset":
                for part in [part for part in texts if part > d["part"]]:
                    del texts[part], kinds[part]
                texts[d["part"]] = texts.get(d["part"], "")[: d["to_off"]]
            case _ if e in TERMINAL:
                return self._check(reply, d)
        return True

    def _check(self, reply: str, d: Frame) -> bool:
        text = self.visible(reply)
        fits = (d["len"], d["sha256"]) == (len(text), hashlib.sha256(text.encode()).hexdigest())
        self.adopt(d["message"])
        return fits
