"""Calls a provider and reads its streamed answer under the four timeouts of the registry. Shared by the adapters."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

import httpx
import orjson

from parley.core.http import OutgoingRefused, chunk_reader
from parley.llm.adapters.deadline import ReadDeadline
from parley.llm.adapters.refusals import read_error, read_refusal
from parley.llm.errors import AddressRefused, BadOutput, ModelError, ProviderTimedOut, ProviderUnavailable
from parley.llm.ports import Chunk
from parley.llm.registry import ModelEntry
from parley.llm.sse import Event, EventSplitter
from parley.llm.text import read_json

_MAX_ERROR_BYTES = 64 * 1024
_MAX_JSON_BYTES = 32 * 1024 * 1024
_LATE = {
    "connect": "The model provider could not be reached in time (connect timeout).",
    "first_token": "The model provider did not start to answer in time (first-token timeout).",
    "idle": "The model provider stopped sending (idle timeout).",
    "total": "The answer took longer than a call may take (total timeout).",
}


def with_parameters(body: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay parameters over a request body, later layers on top. A null leaves the field out."""
    merged = dict(body)
    for layer in layers:
        merged.update(layer)
    return {key: value for key, value in merged.items() if value is not None}


def as_count(value: object) -> int:
    """Read a token count, which may be written as text; what is not one counts as none."""
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) <= len(str(2**31)):
        return as_count(int(value))
    if type(value) is float and value.is_integer():
        return as_count(int(value))
    return value if type(value) is int and 0 <= value < 2**31 else 0


def bearer(entry: ModelEntry) -> dict[str, str]:
    """Return the headers of an entry, with its key as OpenAI and most others take it."""
    key = {"authorization": f"Bearer {entry.api_key.get_secret_value()}"} if entry.api_key else {}
    return {**entry.headers, **key}


class ReplyParser(Protocol):
    """Reads the events of one dialect."""

    started: bool
    """Whether anything of the answer has come."""
    finished: bool
    """Whether the provider has said why it stopped: all that matters has come."""
    done: bool
    """Whether nothing more is to come."""

    def feed(self, event: Event) -> Iterable[Chunk]:
        """Read one event. Raises `ModelError`."""
        ...

    def end(self) -> Iterable[Chunk]:
        """Return what is left when the stream has ended well, a `Finish` last."""
        ...


async def stream_reply(
    http: httpx.AsyncClient,
    entry: ModelEntry,
    *,
    path: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None,
    parser: ReplyParser,
) -> AsyncGenerator[Chunk]:
    """Post a body, or get where there is none, and yield the chunks of the answer. Leaving it closes the connection."""
    async with _open(http, entry, path, headers, body) as source:
        while not parser.done:
            try:
                events = await source.read(started=parser.started)
            except ModelError:
                if parser.finished:
                    break
                raise
            if events is None:
                break
            for event in events:
                for chunk in parser.feed(event):
                    yield chunk
        if not parser.finished:
            raise ProviderUnavailable("The model provider broke off its answer.")
    for chunk in parser.end():
        yield chunk


async def call_json(
    http: httpx.AsyncClient,
    entry: ModelEntry,
    method: Literal["GET", "POST"],
    path: str,
    *,
    headers: Mapping[str, str],
    timeout_s: float,
) -> Any:
    """Make a call whose answer is one JSON value. Raises a `ModelError`, also when `timeout_s` is over."""
    request = http.build_request(
        method,
        f"{entry.base_url}{path}",
        headers={"accept": "application/json", "accept-encoding": "identity", **headers},
        timeout=httpx.Timeout(None, connect=entry.timeouts.connect),
    )
    try:
        async with asyncio.timeout(timeout_s):
            response = await http.send(request, stream=True)
            try:
                body = bytearray()
                read = chunk_reader(response)
                while chunk := await read():
                    body += chunk
                    if len(body) > _MAX_JSON_BYTES:
                        raise BadOutput
            finally:
                await response.aclose()
    except TimeoutError:
        raise ProviderTimedOut(_LATE["idle"]) from None
    except httpx.TimeoutException as error:
        raise ProviderTimedOut(_LATE["connect"]) from error
    except OutgoingRefused as refused:
        raise AddressRefused(f"The URL that is set for this provider cannot be used: {refused}.") from refused
    except httpx.HTTPError as error:
        raise ProviderUnavailable("The model provider cannot be reached.") from error
    if response.status_code != 200:
        raise read_refusal(response.status_code, response.headers, bytes(body))
    return read_json(bytes(body))


class _EventSource:
    """Events of a running answer, each read under its deadline."""

    def __init__(self, read_chunk: Callable[[], Awaitable[bytes]], entry: ModelEntry, began_at: float) -> None:
        self._read_chunk = read_chunk
        self._deadline = ReadDeadline()
        self._now = asyncio.get_running_loop().time
        self._splitter = EventSplitter()
        self._idle_s = entry.timeouts.idle
        self._first_token_at = began_at + entry.timeouts.first_token
        self._total_at = began_at + entry.timeouts.total

    async def read(self, *, started: bool) -> list[Event] | None:
        """Return the events of the next chunk, None at the end."""
        now = self._now()
        step_at, step = (now + self._idle_s, "idle") if started else (self._first_token_at, "first_token")
        if step_at > self._total_at:
            step_at, step = self._total_at, "total"
        try:
            if now >= step_at:  # a read that finds its data waiting never lets the timer run
                raise TimeoutError
            chunk = await self._deadline.read(self._read_chunk, step_at)
        except TimeoutError:
            raise ProviderTimedOut(_LATE[step]) from None
        except OutgoingRefused as refused:
            raise AddressRefused(f"The answer of this provider cannot be used: {refused}.") from refused
        except httpx.HTTPError as error:
            raise ProviderUnavailable("The model provider broke off its answer.") from error
        if not chunk:
            return self._splitter.flush() or None
        return self._splitter.feed(chunk)

    def close(self) -> None:
        """Drop the timer."""
        self._deadline.close()


@asynccontextmanager
async def _open(
    http: httpx.AsyncClient, entry: ModelEntry, path: str, headers: Mapping[str, str], body: Mapping[str, Any] | None
) -> AsyncIterator[_EventSource]:
    began_at = asyncio.get_running_loop().time()
    limits = entry.timeouts
    request = http.build_request(
        "GET" if body is None else "POST",
        f"{entry.base_url}{path}",
        content=None if body is None else orjson.dumps(body),
        headers={
            **({} if body is None else {"content-type": "application/json"}),
            "accept": "text/event-stream",
            "accept-encoding": "identity",
            **headers,
        },
        timeout=httpx.Timeout(None, connect=limits.connect),
    )
    try:
        async with asyncio.timeout_at(began_at + min(limits.first_token, limits.total)):
            response = await http.send(request, stream=True)
    except TimeoutError:
        step = "first_token" if limits.first_token <= limits.total else "total"
        raise ProviderTimedOut(_LATE[step]) from None
    except httpx.TimeoutException as error:
        raise ProviderTimedOut(_LATE["connect"]) from error
    except OutgoingRefused as refused:
        raise AddressRefused(f"The URL that is set for this provider cannot be used: {refused}.") from refused
    except httpx.HTTPError as error:
        raise ProviderUnavailable("The model provider cannot be reached.") from error
    source = _EventSource(chunk_reader(response), entry, began_at)
    try:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if response.status_code != 200:
            raise read_refusal(response.status_code, response.headers, await _read_body(response, began_at, entry))
        if kind in {"application/json", "text/html"}:
            raise _not_a_stream(await _read_body(response, began_at, entry))
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            raise BadOutput
        yield source
    finally:
        source.close()
        await response.aclose()


async def _read_body(response: httpx.Response, began_at: float, entry: ModelEntry) -> bytes:
    """Read the start of a body that is not a stream; what cannot be read in time does not matter."""
    body = bytearray()
    read = chunk_reader(response)
    try:
        async with asyncio.timeout_at(began_at + min(entry.timeouts.first_token, entry.timeouts.total)):
            # Read as it came: what is compressed, though nobody asked for it, may unpack to any size.
            while chunk := await read():
                body += chunk
                if len(body) > _MAX_ERROR_BYTES:
                    break
    except (TimeoutError, httpx.HTTPError):
        pass
    return bytes(body)


def _not_a_stream(body: bytes) -> ModelError:
    try:
        found = read_json(body)
    except BadOutput as error:
        return error
    return read_error(found["error"]) if isinstance(found, dict) and found.get("error") else BadOutput()
