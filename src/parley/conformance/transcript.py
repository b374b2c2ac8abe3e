"""Everything that was said in one check, both ways, in order."""

import time
from typing import Any

import orjson

Frame = dict[str, Any]

_SECRET = ("auth", "token", "ticket", "api_key")


class Transcript:
    """The lines of a check. Credentials are never kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._begun = time.monotonic()

    def sent(self, who: str, what: str | bytes | Frame) -> None:
        """Note what was said to the server."""
        self._note(who, "→", what)

    def received(self, who: str, what: str | bytes | Frame) -> None:
        """Note what the server said."""
        self._note(who, "←", what)

    def _note(self, who: str, arrow: str, what: str | bytes | Frame) -> None:
        ms = int((time.monotonic() - self._begun) * 1000)
        self.lines.append(f"{ms:6} ms  {who:<10} {arrow} {show(what)}")


def show(what: object, *, length: int = 400) -> str:
    """Return a frame as a line that can be read, without its credential."""
    match what:
        case dict():
            hidden = {key: "…" if key in _SECRET else value for key, value in what.items()}
            text = orjson.dumps(hidden, default=str).decode()
        case bytes():
            text = f"{len(what)} bytes"
        case _:
            text = str(what)
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"
