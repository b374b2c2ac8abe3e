"""A reply on a terminal. It shows the state and not the events, so a resume neither loses nor repeats anything."""

import json
from typing import Any

from parley.client.terminal import Screen

_ARGUMENTS_LENGTH = 200
_OVER = {"done": "✓", "failed": "✗", "unknown": "?"}


class ReplyView:
    """How far a reply is shown: up to a part, and up to a place in it."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._part = 0
        self._off = 0
        self._announced: set[str] = set()
        self._open: dict[int, str] = {}

    def resumed(self, d: dict[str, Any]) -> None:
        """Tell that another process or model writes the reply on, unless nothing of it was to be seen yet."""
        fallback = d.get("strategy") == "fallback"
        if self._part or self._off or self._announced or fallback:
            model = f" with {d['model']}" if fallback else ""
            self._screen.note(f"… the reply goes on{model}")

    def show(self, message: dict[str, Any]) -> None:
        """Write what is new of the message."""
        parts = message["parts"]
        self._rewind(parts)
        for index in list(self._open):
            self._tool(index, parts[index])
        while self._part < len(parts):
            self._write(self._part, parts[self._part])
            if self._part + 1 == len(parts):
                return
            self._part, self._off = self._part + 1, 0

    def _rewind(self, parts: list[dict[str, Any]]) -> None:
        """`reply.reset` is the only thing that shortens a reply; what stands on the screen cannot be taken back."""
        last = min(self._part, max(len(parts) - 1, 0))
        held = len(parts[last].get("text") or "") if parts else 0
        if last == self._part and held >= self._off:
            return
        self._screen.note("… the reply goes on from an earlier point")
        self._screen.end_line()
        self._part, self._off = last, held
        self._open = {index: call for index, call in self._open.items() if index < len(parts)}

    def _write(self, index: int, part: dict[str, Any]) -> None:
        if part["type"] == "tool":
            self._tool(index, part)
            return
        if part["type"] == "text" or self._screen.is_terminal:
            self._screen.text(part["text"][self._off :], dim=part["type"] != "text")
        self._off = len(part["text"])

    def _tool(self, index: int, part: dict[str, Any]) -> None:
        call = part.get("call")
        if call is None or part.get("type") != "tool":
            return
        if call not in self._announced:
            self._announced.add(call)
            self._open[index] = call
            arguments = json.dumps(part["input"] or {}, ensure_ascii=False)
            if len(arguments) > _ARGUMENTS_LENGTH:
                arguments = arguments[:_ARGUMENTS_LENGTH] + "…"
            self._screen.line(f"→ {part['name']} {arguments}", dim=True)
        sign = _OVER.get(part["state"])
        if sign is not None and self._open.pop(index, None) is not None:
            self._screen.line(sign + _problem(part), dim=True)


def _problem(part: dict[str, Any]) -> str:
    output = part["output"]
    if part["state"] == "done" or not isinstance(output, dict) or not output.get("error"):
        return ""
    return f" {output['error']}"
