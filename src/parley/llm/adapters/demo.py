"""The built-in model: deterministic, needs no provider, says so, and can drive the task tools."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import chain
from typing import Any

import httpx
import orjson

from parley.llm.adapters.stops import until_stop
from parley.llm.estimates import output_room
from parley.llm.examples import example_of
from parley.llm.ports import (
    Chunk,
    Finish,
    FinishReason,
    ImagePart,
    ModelMessage,
    ModelRequest,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolCallPart,
    ToolResultPart,
    UsageChunk,
)
from parley.llm.registry import ModelEntry
from parley.llm.schemas import schema_for

DEFAULT_DELAY_MS = 20
MAX_REPEATS = 5_000
_MAX_ECHO_WORDS = 100

_PIECE = re.compile(r"\s*\S+|\s+$")
_REPEAT = re.compile(r"\s*repeat\s+(\d{1,9})\s+(\S+)\s*", re.IGNORECASE)
_COMMANDS: tuple[tuple[re.Pattern[str], str, str | None], ...] = (
    (re.compile(r"\s*add (?:a )?task:?\s+(.+?)\s*", re.IGNORECASE | re.DOTALL), "add_task", "title"),
    (re.compile(r"\s*list (?:my |all |the )?tasks\W*", re.IGNORECASE), "list_tasks", None),
    (re.compile(r"\s*complete (?:the )?task:?\s+(.+?)\s*", re.IGNORECASE | re.DOTALL), "complete_task", "task"),
)
"""What a user may write, the tool that it calls, and the argument that takes the rest of the line."""


class DemoModel:
    """Answers without a provider.

    The entry's parameter `delay_ms` is the pause between two words. `repeat N word` streams N numbered words.
    Given a prefill that its answer begins with, it says the rest of that answer, word by word as before. Asked for
    JSON it makes the least that fits the schema, and so it does for the arguments of a tool that it has to call.
    """

    def __init__(self, entry: ModelEntry, http: httpx.AsyncClient | None = None) -> None:  # noqa: ARG002  same for all
        self._entry = entry
        self._delay_ms = float(entry.parameters.get("delay_ms", DEFAULT_DELAY_MS))

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes."""
        chunks = self._stream(request)
        return until_stop(chunks, request.stop) if request.stop else chunks

    async def _stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        delay_s = float(request.parameters.get("delay_ms", self._delay_ms)) / 1000
        input_tokens = sum(len(_text_of(message).split()) for message in request.messages)
        # Who has begun to talk calls no tool any more.
        call = None if request.prefill else _tool_call(request)
        if call is not None:
            yield call
            yield UsageChunk(input_tokens=input_tokens, output_tokens=len(call.raw.split()))
            yield Finish(FinishReason.TOOL_CALLS)
            return
        wanted = schema_for(self._entry, request)
        said = _words(orjson.dumps(example_of(wanted.schema)).decode()) if wanted else _pieces(request)
        limit = min(request.max_output_tokens, output_room(self._entry))
        # The words of the prefill count: the whole is as long as if nobody had broken it off.
        pieces, given = _behind(request.prefill, said) if request.prefill else (said, 0)
        written = given
        reason = FinishReason.STOP
        for piece in pieces:
            if written >= limit:
                reason = FinishReason.LENGTH
                break
            if written:
                await asyncio.sleep(delay_s)
            yield TextChunk(piece)
            written += 1
        yield UsageChunk(input_tokens=input_tokens, output_tokens=written - given)
        yield Finish(reason)


def _text_of(message: ModelMessage) -> str:
    return "\n\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _last_user_text(request: ModelRequest) -> str:
    return next((_text_of(message) for message in reversed(request.messages) if message.role == "user"), "")


def _answers_tools(request: ModelRequest) -> bool:
    return bool(request.messages) and request.messages[-1].role == "tool"


def _tool_call(request: ModelRequest) -> ToolCallChunk | None:
    choice = request.tool_choice
    if _answers_tools(request) or choice == "none":
        return None
    text = _last_user_text(request)
    offered = {tool.name for tool in request.tools}
    for pattern, name, argument in _COMMANDS:
        if name in offered and (match := pattern.fullmatch(text)):
            arguments = {argument: match[1]} if argument else {}
            made = sum(isinstance(part, ToolCallPart) for message in request.messages for part in message.parts)
            return ToolCallChunk(f"demo_{made + 1}", name, arguments, orjson.dumps(arguments).decode())
    if choice not in {None, "auto"} and request.tools:
        tool = next((tool for tool in request.tools if tool.name == choice), request.tools[0])
        arguments = example_of(tool.parameters)
        arguments = arguments if isinstance(arguments, dict) else {}
        return ToolCallChunk("demo_1", tool.name, arguments, orjson.dumps(arguments).decode())
    return None


def _pieces(request: ModelRequest) -> Iterator[str]:
    if _answers_tools(request):
        return _words(_outcome(request.messages))
    text = _last_user_text(request)
    if match := _REPEAT.fullmatch(text):
        count, word = min(int(match[1]), MAX_REPEATS), match[2]
        return (f"{'' if number == 1 else ' '}{word}{number}" for number in range(1, count + 1))
    said = text.split()
    echo = " ".join(said[:_MAX_ECHO_WORDS]) + (" …" if len(said) > _MAX_ECHO_WORDS else "")
    return _words(
        "I am Parley's demo model: no provider is configured. "
        + (f"You said: {echo}" if echo else "You said nothing that I can read.")
        + _seen(request)
    )


def _seen(request: ModelRequest) -> str:
    """Say what images came with the last question."""
    asked = next((message for message in reversed(request.messages) if message.role == "user"), None)
    images = [part for part in asked.parts if isinstance(part, ImagePart)] if asked else []
    if not images:
        return ""
    kinds = ", ".join(f"{image.media_type} of {len(image.data)} bytes" for image in images)
    return f" I cannot look at {'this image' if len(images) == 1 else 'these images'}: {kinds}."


def _behind(prefill: str, pieces: Iterator[str]) -> tuple[Iterator[str], int]:
    """Return what follows the prefill, and how many pieces it stands for: all of them and 0 when it is no beginning."""
    whole = tuple(pieces)
    left = prefill
    for index, piece in enumerate(whole):
        if not left.startswith(piece):
            if not piece.startswith(left):
                break
            return chain((piece[len(left) :],), whole[index + 1 :]), index
        left = left[len(piece) :]
        if not left:
            return iter(whole[index + 1 :]), index + 1
    return iter(whole), 0


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in _PIECE.finditer(text))


def _outcome(messages: tuple[ModelMessage, ...]) -> str:
    """Say what the tools did that the last assistant message called."""
    called = {
        part.call_id: part.arguments for message in messages for part in message.parts if isinstance(part, ToolCallPart)
    }
    sentences = [
        _sentence(part, called.get(part.call_id, {})) for part in messages[-1].parts if isinstance(part, ToolResultPart)
    ]
    return " ".join(sentences) or "The tool answered nothing."


def _sentence(result: ToolResultPart, arguments: dict[str, Any]) -> str:
    try:
        value = orjson.loads(result.content)
    except orjson.JSONDecodeError:
        value = None
    if result.failed or (isinstance(value, dict) and value.get("error")):
        reason = value.get("message") or value.get("error") if isinstance(value, dict) else result.content
        return f"That did not work: {reason}"
    if result.name == "add_task":
        return f'Done: added the task "{_title(value) or arguments.get("title", "")}".'
    if result.name == "complete_task":
        return f'Done: completed the task "{_title(value) or arguments.get("task", "")}".'
    if result.name == "list_tasks":
        titles = [f"{_title(item)}{' (done)' if item.get('completed') else ''}" for item in _items(value)]
        return (
            f"You have {len(titles)} task{'' if len(titles) == 1 else 's'}: {'; '.join(titles)}."
            if titles
            else ("You have no tasks.")
        )
    return f"The tool {result.name} answered: {result.content}"


def _title(value: object) -> str:
    """Find a title in a task, or in a task inside an envelope."""
    if not isinstance(value, dict):
        return ""
    inner = value.get("task")
    title = value.get("title") or (inner.get("title") if isinstance(inner, dict) else "")
    return title if isinstance(title, str) else ""


def _items(value: object) -> Iterable[dict[str, Any]]:
    found = value
    if isinstance(value, dict):
        found = next((item for item in value.values() if isinstance(item, list)), [])
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
