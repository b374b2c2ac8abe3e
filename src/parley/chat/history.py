"""What a model is given of a conversation: stored messages as models take them, cut to the model's context.

The rule: the system prompt and the newest turn are always given, before them as many whole turns as fit, the newest
first. A turn is a message of the user with all that follows until the next one, so a tool call is never without its
result. What may be used is the model's context less the room for its answer, less the prompt and the tools, all in the
cautious estimate of `parley.llm.estimates`. Where the newest turn alone does not fit, nothing is sent and the reply
fails with `context_too_long`.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from parley.llm.errors import ContextTooLong
from parley.llm.estimates import IMAGE_TOKENS, byte_tokens, message_tokens, output_room, text_tokens, tool_tokens
from parley.llm.ports import ImagePart, ModelMessage, Part, TextPart, ToolCallPart, ToolResultPart, ToolSpec
from parley.llm.registry import Capability, ModelEntry

logger = logging.getLogger(__name__)

# Providers refuse requests beyond a few dozen images or megabytes; the newest are what the question is about.
IMAGES = 20
IMAGE_BYTES = 20 * 1024 * 1024

_TOO_LONG = "The last message, with what belongs to it, is too long for this model."

Stored = tuple[str, Sequence[dict[str, Any]]]
"""A stored message: its role and its parts."""

Load = Callable[[Sequence[UUID]], Awaitable[Mapping[UUID, bytes]]]
"""Gives the bytes of attachments; one that is no longer there is left out."""


@dataclass(frozen=True, slots=True)
class _Attached:
    """A part whose bytes are not here yet."""

    id: UUID
    image: bool
    media_type: str
    name: str
    size: int

    @property
    def tokens(self) -> int:
        return IMAGE_TOKENS if self.image else byte_tokens(self.size) + text_tokens(self.name) + 20

    def note(self, why: str) -> TextPart:
        return TextPart(f"[{'image' if self.image else 'file'} {orjson.dumps(self.name).decode()}: {why}]")

    def filled(self, data: bytes | None) -> Part:
        if data is None:
            return self.note("no longer there")
        if self.image:
            return ImagePart(self.media_type, data)
        return TextPart(
            f"<file name={orjson.dumps(self.name).decode()} type={orjson.dumps(self.media_type).decode()}>\n"
            f"{data.decode(errors='replace')}\n</file>"
        )


@dataclass(slots=True)
class _Message:
    """A message on its way to a model."""

    role: str
    parts: list[Part | _Attached]

    @property
    def tokens(self) -> int:
        plain = ModelMessage("user", tuple(part for part in self.parts if not isinstance(part, _Attached)))
        return message_tokens(plain) + sum(part.tokens for part in self.parts if isinstance(part, _Attached))


class _Images:
    """Chooses the images that are given, asked for the newest message first; a note takes the place of the others."""

    def __init__(self, *, sees: bool) -> None:
        self._sees = sees
        self._count = 0
        self._size = 0

    def choose(self, turn: list[_Message]) -> None:
        for message in reversed(turn):
            for index, part in enumerate(message.parts):
                if isinstance(part, _Attached) and part.image and (why := self._why_not(part)):
                    message.parts[index] = part.note(why)

    def _why_not(self, part: _Attached) -> str | None:
        if not self._sees:
            return "this model sees no images"
        if self._count == IMAGES or self._size + part.size > IMAGE_BYTES:
            return "left out, there are too many"
        self._count += 1
        self._size += part.size
        return None


class History:
    """The messages of a reply's calls. What the reply adds to `messages` belongs to the newest turn.

    `left_out` counts the messages that were cut off.
    """

    def __init__(self, messages: list[ModelMessage], turns: list[int], *, room: int, left_out: int = 0) -> None:
        self.messages = messages
        """The system prompt, then the turns."""
        self.left_out = left_out
        self._turns = turns
        self._room = room

    def fit(self) -> None:
        """Leave out the oldest turns until the rest fits, before each call. Raises `ContextTooLong`."""
        used = sum(message_tokens(message) for message in self.messages)
        dropped = 0
        for turn in self._turns[:-1]:
            if used <= self._room:
                break
            used -= sum(message_tokens(message) for message in self.messages[1 + dropped : 1 + dropped + turn])
            dropped += turn
        if used > self._room:
            raise ContextTooLong(_TOO_LONG)
        if dropped:
            del self.messages[1 : 1 + dropped]
            self.left_out += dropped
            count = 0
            while count < dropped:
                count += self._turns.pop(0)
            logger.info("older messages were left out", extra={"left_out": self.left_out})


async def model_history(
    path: Iterable[Stored], *, system: str, entry: ModelEntry, tools: Iterable[ToolSpec] = (), load: Load | None = None
) -> History:
    """Return what a model is given: the prompt, then of the stored messages, oldest first, as many as fit.

    The path may have been cut by whoever read it. Only the attachments of messages that are given are loaded, and only
    images that the model can see. Raises `ContextTooLong` when the newest turn does not fit.
    """
    room = entry.context - output_room(entry) - tool_tokens(tools)
    prompt = ModelMessage("system", (TextPart(system),))
    turns = _turns(message for role, parts in path for message in _messages(role, parts))
    left = room - message_tokens(prompt)
    images = _Images(sees=Capability.IMAGES in entry.capabilities)
    given: list[list[_Message]] = []
    for turn in reversed(turns):
        images.choose(turn)
        left -= sum(message.tokens for message in turn)
        if left < 0:
            break
        given.append(turn)
    if turns and not given:
        raise ContextTooLong(_TOO_LONG)
    left_out = sum(len(turn) for turn in turns[: len(turns) - len(given)])
    if left_out:
        logger.info("older messages were left out", extra={"left_out": left_out})
    given.reverse()
    found = await _loaded(given, load)
    messages = [prompt, *(_filled(message, found) for turn in given for message in turn)]
    return History(messages, [len(turn) for turn in given], room=room, left_out=left_out)


def model_messages(role: str, parts: Iterable[dict[str, Any]]) -> Iterable[ModelMessage]:
    """Return a stored message without attachments as models take it: a reply with tool calls is several of theirs."""
    return [_filled(message, {}) for message in _messages(role, parts)]


def _messages(role: str, parts: Iterable[dict[str, Any]]) -> Iterable[_Message]:
    if role != "assistant":
        yield _Message("system" if role == "system" else "user", _said(parts))
        return
    said: list[Part | _Attached] = []
    results: list[ToolResultPart] = []
    for part in parts:
        if part["type"] == "text" and part["text"]:
            if results:
                yield _Message("assistant", said)
                yield from (_Message("tool", [result]) for result in results)
                said, results = [], []
            said.append(TextPart(part["text"]))
        elif part["type"] == "tool":
            said.append(ToolCallPart(part["call"], part["name"], part["input"] or {}))
            output = part["output"] if part["output"] is not None else {"error": "the outcome is unknown"}
            failed = part["state"] != "done"
            results.append(ToolResultPart(part["call"], part["name"], orjson.dumps(output).decode(), failed=failed))
    if said:
        yield _Message("assistant", said)
    yield from (_Message("tool", [result]) for result in results)


def _said(parts: Iterable[dict[str, Any]]) -> list[Part | _Attached]:
    """Return what a user said. Texts are one; attachments stand before the text that is about them."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    attached: list[Part | _Attached] = [
        _Attached(UUID(part["attachment"]), part["type"] == "image", part["media_type"], part["name"], part["size"])
        for part in parts
        if part["type"] in {"image", "file"}
    ]
    return [*attached, TextPart("\n\n".join(texts))] if texts or not attached else attached


def _turns(messages: Iterable[_Message]) -> list[list[_Message]]:
    turns: list[list[_Message]] = []
    for message in messages:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    if len(turns) > 1 and turns[0][0].role not in {"user", "system"}:
        # The path begins in the middle of a turn, whose question is not in it.
        turns = turns[1:]
    return turns


async def _loaded(turns: Iterable[list[_Message]], load: Load | None) -> Mapping[UUID, bytes]:
    wanted = {part.id for turn in turns for message in turn for part in message.parts if isinstance(part, _Attached)}
    return await load(list(wanted)) if wanted and load is not None else {}


def _filled(message: _Message, found: Mapping[UUID, bytes]) -> ModelMessage:
    parts = tuple(part.filled(found.get(part.id)) if isinstance(part, _Attached) else part for part in message.parts)
    return ModelMessage(message.role, parts)  # type: ignore[arg-type]  # a role of ours
