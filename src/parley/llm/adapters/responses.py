"""OpenAI's Responses API, in background mode: an answer that goes on at OpenAI while nobody reads it.

https://platform.openai.com/docs/guides/background

OpenAI keeps such a response for about ten minutes and streams it again for about five. A place in it is the response's
id and the `sequence_number` of an event; a stream can be read on from there, and after the stream is gone the whole
response can be had. So an answer survives the end of the process that read it, and a broken connection is not the end
of an answer: the adapter reads on by itself.

An entry with `background: false` is asked without all that, and OpenAI keeps nothing of it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Self

import httpx
import orjson

from parley.llm.adapters.images import as_data_url
from parley.llm.adapters.reply_stream import bearer, call_json, stream_reply, with_parameters
from parley.llm.adapters.responses_events import RUNNING, Place, ResponseParser, WholeResponse, failure
from parley.llm.adapters.stops import until_stop
from parley.llm.errors import (
    BadOutput,
    ContentFiltered,
    ContextTooLong,
    ModelError,
    ModelNotFound,
    ProviderAuthFailed,
    ProviderUnavailable,
    ReattachRefused,
    RequestRefused,
)
from parley.llm.estimates import output_room
from parley.llm.ports import (
    Chunk,
    CursorChunk,
    Finish,
    ImagePart,
    ModelMessage,
    ModelRequest,
    OnClose,
    Part,
    TextChunk,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    UsageChunk,
)
from parley.llm.registry import Capability, ModelEntry
from parley.llm.schemas import schema_for, strict_schema

logger = logging.getLogger(__name__)

CANCEL_TIMEOUT_S = 2.0
_POLL_S = 0.25
_POLL_CAP_S = 2.0
_POLL_FAULTS = 5
# The stream cannot be had; these say that the response cannot be had either.
_FINAL = (ProviderAuthFailed, ContentFiltered, ContextTooLong)


class ResponsesModel:
    """A model behind OpenAI's Responses API. `Reattachable`.

    Leaving a stream before its end cancels the response at OpenAI, which takes at most `CANCEL_TIMEOUT_S`, unless
    `request.on_close.keep_running` is set and a cursor has been yielded.
    """

    def __init__(self, entry: ModelEntry, http: httpx.AsyncClient) -> None:
        self._entry = entry
        self._http = http
        self._headers = bearer(entry)
        self.background = entry.background
        self._maker = f"openai_responses:{entry.name}"

    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Ask, and yield what comes. The API knows no stop texts: the answer is ended here."""
        chunks = self._stream(request)
        return until_stop(chunks, request.stop) if request.stop else chunks

    async def _stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        parser = self._parser(request, None)
        said: list[str] = []
        began_at = asyncio.get_running_loop().time()
        async with _Hold(self, parser, request.on_close) as hold:
            try:
                async with aclosing(self._read("/responses", self._body(request), parser)) as chunks:
                    async for chunk in chunks:
                        if type(chunk) is TextChunk:
                            said.append(chunk.text)
                        yield chunk
                return
            except ProviderUnavailable:
                if parser.place is None or parser.called or parser.ended or parser.refused:
                    raise
            logger.warning("A stream of %s broke off and is read on", self._entry.id)
            try:
                async with aclosing(self._read_on(hold, request, parser.place, "".join(said), began_at)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except ReattachRefused:
                raise _broken_off() from None

    async def reattach(self, request: ModelRequest, cursor: str, *, said: str) -> AsyncGenerator[Chunk]:
        """Read on from a cursor; where the stream is gone, wait for the whole response and yield what is missing."""
        place = Place.parse(cursor)
        began_at = asyncio.get_running_loop().time()
        async with (
            _Hold(self, self._parser(request, place), request.on_close) as hold,
            aclosing(self._read_on(hold, request, place, said, began_at)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def _read_on(
        self, hold: "_Hold", request: ModelRequest, place: Place, said: str, began_at: float
    ) -> AsyncGenerator[Chunk]:
        """Yield what follows: text behind `said`, all else behind the place."""
        heard: list[str] = []
        begun = differs = False
        parser = hold.parser = self._parser(request, place)
        # Text that was shown before its cursor was kept comes again, and is taken away again.
        again = said[place.chars :]
        # With less text than the cursor stands for, only the whole response has what is missing.
        if len(said) >= place.chars:
            path = f"/responses/{place.response_id}?stream=true&starting_after={place.number}"
            try:
                async with aclosing(self._read(path, None, parser)) as chunks:
                    async for chunk in chunks:
                        if isinstance(chunk, TextChunk):
                            text = chunk.text
                            same = min(len(again), len(text))
                            if differs := text[:same] != again[:same]:
                                raise ReattachRefused
                            again = again[same:]
                            if same == len(text):
                                continue
                            heard.append(text[same:])
                            chunk = TextChunk(text[same:])  # noqa: PLW2901  what is left of it
                        elif again and isinstance(chunk, CursorChunk):
                            continue
                        elif again and isinstance(chunk, UsageChunk | Finish):
                            differs = True
                            raise ReattachRefused
                        begun = True
                        yield chunk
                return
            except ModelError as error:
                if differs and begun:
                    raise _broken_off() from None
                if differs or parser.called or parser.ended or isinstance(error, _FINAL):
                    raise
        try:
            response = await self._whole(hold, place.response_id, began_at + self._entry.timeouts.total)
            whole = WholeResponse.read(response, refusal_is_filtered=request.response_schema is not None)
            rest = self._rest(whole, said + "".join(heard))
        except ReattachRefused:
            if begun:
                raise _broken_off() from None
            raise
        for chunk in rest:
            yield chunk

    def _rest(self, whole: WholeResponse, said: str) -> Iterable[Chunk]:
        if not whole.text.startswith(said):
            raise ReattachRefused
        text = whole.text[len(said) :]
        return [
            *([TextChunk(text)] if text else []),
            *whole.calls,
            *([whole.usage] if whole.usage else []),
            whole.finish,
        ]

    async def _whole(self, hold: "_Hold", response_id: str, due_at: float) -> dict[str, Any]:
        """Wait for a response to end. Raises `ReattachRefused` when it is gone or does not end in time."""
        now = asyncio.get_running_loop().time
        pause_s, faults = _POLL_S, 0
        while (left_s := due_at - now()) > 0:
            try:
                response = await call_json(
                    self._http,
                    self._entry,
                    "GET",
                    f"/responses/{response_id}",
                    headers=self._headers,
                    timeout_s=min(left_s, self._entry.timeouts.first_token),
                )
                faults = 0
            except (ModelNotFound, RequestRefused):
                hold.ended = True
                raise ReattachRefused from None
            except ModelError as error:
                faults += 1
                if not error.retryable or faults > _POLL_FAULTS:
                    raise
            else:
                status = response.get("status") if isinstance(response, dict) else None
                if not isinstance(status, str):
                    raise BadOutput
                if status not in RUNNING:
                    hold.ended = True
                    if status not in {"completed", "incomplete"}:
                        raise failure(response) if response.get("error") else ReattachRefused
                    return dict(response)
            await asyncio.sleep(min(pause_s, max(due_at - now(), 0)))
            pause_s = min(pause_s * 1.5, _POLL_CAP_S)
        raise ReattachRefused

    def _read(self, path: str, body: Mapping[str, Any] | None, parser: ResponseParser) -> AsyncGenerator[Chunk]:
        return stream_reply(self._http, self._entry, path=path, headers=self._headers, body=body, parser=parser)

    async def cancel(self, response_id: str) -> None:
        """Stop a response at OpenAI, as well as may be. Doing it twice does no harm."""
        try:
            await call_json(
                self._http,
                self._entry,
                "POST",
                f"/responses/{response_id}/cancel",
                headers=self._headers,
                timeout_s=CANCEL_TIMEOUT_S,
            )
        except ModelError as error:
            logger.warning("An answer of %s could not be stopped: %s", self._entry.id, error.code)

    def _parser(self, request: ModelRequest, place: Place | None) -> ResponseParser:
        return ResponseParser(
            place,
            places=self._entry.background,
            maker=self._maker,
            refusal_is_filtered=request.response_schema is not None,
        )

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        entry = self._entry
        body: dict[str, Any] = {"input": [item for message in request.messages for item in self._items(message)]}
        system = [message for message in request.messages if message.role == "system"]
        if instructions := "\n\n".join(filter(None, map(_text_of, system))):
            body["instructions"] = instructions
        if request.tools:
            body |= _tools(request)
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if (wanted := schema_for(entry, request)) is not None:
            strict = strict_schema(wanted.schema) if wanted.strict else None
            schema = {"type": "json_schema", "name": wanted.name, "schema": strict or wanted.schema}
            body["text"] = {"format": schema | {"strict": strict is not None}}
        if Capability.REASONING in entry.capabilities:
            body["include"] = ["reasoning.encrypted_content"]
        body = with_parameters(body, entry.parameters, request.parameters)
        bounds = [request.max_output_tokens, output_room(entry)]
        if "max_output_tokens" in body:
            bounds.append(body["max_output_tokens"])
        # An answer can be read on only with all three of them.
        kept = {"background": True, "store": True} if entry.background else {"store": False}
        return body | {"model": entry.name, "max_output_tokens": min(bounds), "stream": True, **kept}

    def _items(self, message: ModelMessage) -> Iterable[dict[str, Any]]:
        """Map a message. Calls, their results and the reasoning before them are items of their own."""
        if message.role == "system":
            return
        if any(isinstance(part, ImagePart) for part in message.parts):
            yield {"role": message.role, "content": [block for part in message.parts for block in _blocks(part)]}
        elif message.role != "tool" and (text := _text_of(message)):
            yield {"role": message.role, "content": text}
        for part in message.parts:
            if isinstance(part, ToolCallPart):
                if part.state is not None and part.state.maker == self._maker:
                    yield from part.state.value
                arguments = orjson.dumps(part.arguments).decode()
                yield {"type": "function_call", "call_id": part.call_id, "name": part.name, "arguments": arguments}
            elif isinstance(part, ToolResultPart):
                yield {"type": "function_call_output", "call_id": part.call_id, "output": part.content}


def _broken_off() -> ProviderUnavailable:
    return ProviderUnavailable("The model provider broke off its answer.")


class _Hold:
    """Knows the response that is being read, and stops it at the provider when it is left before its end."""

    def __init__(self, model: ResponsesModel, parser: ResponseParser, on_close: OnClose) -> None:
        self.parser = parser
        self.ended = False
        self._model = model
        self._on_close = on_close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        parser = self.parser
        # Without a place nobody can read on, so nothing is left to run.
        kept = self._on_close.keep_running and parser.place is not None
        # One that is not in the background ends with its connection.
        if not self._model.background:
            return
        if parser.response_id and not (self.ended or parser.ended or kept):
            await self._model.cancel(parser.response_id)


def _text_of(message: ModelMessage) -> str:
    return "\n\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def _blocks(part: Part) -> Iterable[dict[str, Any]]:
    if isinstance(part, TextPart) and part.text:
        yield {"type": "input_text", "text": part.text}
    elif isinstance(part, ImagePart):
        yield {"type": "input_image", "image_url": as_data_url(part), "detail": part.detail or "auto"}


def _tools(request: ModelRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                # The default here is to allow only what strict schemas can say.
                "strict": False,
            }
            for tool in request.tools
        ]
    }
    choice = request.tool_choice
    if choice is not None:
        named = choice not in {"auto", "none", "required"}
        fields["tool_choice"] = {"type": "function", "name": choice} if named else choice
    if request.parallel_tools is not None:
        fields["parallel_tool_calls"] = request.parallel_tools
    return fields
