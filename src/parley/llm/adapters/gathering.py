"""Gathers a tool call that comes in pieces."""

from typing import Any

import orjson

from parley.core.ids import new_id
from parley.llm.errors import BadOutput
from parley.llm.ports import ProviderState, ToolCallChunk
from parley.llm.text import clean, read_arguments

# A reply is bounded by its tokens; these bound what is gathered from a provider that ignores the bound.
MAX_TOOL_CALLS = 128
MAX_ARGUMENT_CHARS = 1024 * 1024
MAX_STATE_CHARS = 1024 * 1024


class GatheredCall:
    """A call on its way. Ids and names may be numbers: some servers count."""

    __slots__ = ("_pieces", "_size", "extra", "id", "name", "state")

    def __init__(self, id: object = None, name: object = None) -> None:
        self.id = as_text(id)
        self.name = as_text(name)
        self.extra: Any = None
        self.state: ProviderState | None = None
        self._pieces: list[str] = []
        self._size = 0

    @property
    def begun(self) -> bool:
        """Whether any of the arguments has come."""
        return self._size > 0

    @property
    def whole(self) -> bool:
        """Whether the arguments are a JSON object already, so that no more of them can come."""
        return self.begun and self._pieces[-1][-1:] == "}" and read_arguments("".join(self._pieces)) is not None

    def add(self, piece: object) -> None:
        """Take a piece of the arguments. Raises `BadOutput` for what is no text, and for too much of it."""
        if not isinstance(piece, str):
            raise BadOutput
        self._size += len(piece)
        if self._size > MAX_ARGUMENT_CHARS:
            raise BadOutput
        if piece:
            self._pieces.append(piece)

    def chunk(self) -> ToolCallChunk:
        """Return the call as it is now."""
        raw = clean("".join(self._pieces))
        return ToolCallChunk(clean(self.id) or new_id().hex, clean(self.name), read_arguments(raw), raw, self.state)


def as_text(value: object) -> str:
    """Read an id or a name. Raises `BadOutput` for what can be neither."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise BadOutput


def state_of(maker: str, value: Any, size: int) -> ProviderState | None:
    """Return what a provider wants back, None when there is nothing, too much of it, or what cannot be sent again."""
    if not value or size > MAX_STATE_CHARS:
        return None
    try:
        orjson.dumps(value)
    except TypeError:  # half a character, a number beyond 64 bits, too deep
        return None
    return ProviderState(maker, value)
