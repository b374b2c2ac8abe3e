"""A model provider for tests and load: OpenAI's two dialects and Anthropic's over a bare asyncio protocol.

The last user message says, as `key=value` words, how to answer (see `Plan`):
``deltas=2000 rate=25 ttft=0.2 seed=7 size=4 reasoning=5 tool=add_task:{"title":"x"} fail=die_at:30``.
`script` gives the exact text that a plan streams; a caller that gives a beginning of that text gets the rest. Responses
in the background go on without a reader (see also `fake_requests`). `GET /_requests` tells what was asked and how each
call ended, `GET /_stats` what all of them together used.

    python -m benchmarks.fake_provider --port 0     # first line: listening on 127.0.0.1:PORT
"""

import argparse
import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, cast
from urllib.parse import parse_qs

import orjson
import uvloop

from benchmarks.fake_dialects import DIALECTS, Dialect, Frames
from benchmarks.fake_plan import Plan, script
from benchmarks.fake_requests import Served, count_input, plan_of
from benchmarks.fake_responses import PATHS as RESPONSES_PATHS
from benchmarks.fake_responses import RESPONSES, Background, answer, later_plan

__all__ = ["FakeProvider", "Plan", "Record", "script"]

_REASONS = {400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 503: "Unavailable"}


@dataclass(slots=True)
class Record:
    """What became of one call. Times are `time.monotonic()`."""

    id: int
    dialect: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    began_at: float
    deltas_sent: int = 0
    bytes_sent: int = 0
    completed: bool = False
    closed_early: bool = False
    closed_at: float | None = None
    method: str = "POST"
    asked: str = ""
    """The last user message."""
    generated: bool = False
    """Whether this call made the provider write an answer: one that it is paid for."""
    cancelled: bool = False
    """Whether that answer was stopped before its end."""
    response_id: str | None = None
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    """As its `usage` says; what it has sent, of an answer that was left before that."""
    images: int = 0


class FakeProvider:
    """The server. Use as an async context manager; `requests` holds the latest calls."""

    def __init__(self, port: int = 0, *, keep: int = 10_000) -> None:
        self.port = port
        self.requests: deque[Record] = deque(maxlen=keep)
        self.ids = itertools.count(1)
        self.connections: set[_Connection] = set()
        self.asked: Counter[str] = Counter()
        self.responses: dict[str, Background] = {}
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        """The root; the OpenAI dialect also answers below `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.connections):
            connection.abort()
        while self.connections:
            self._changed.clear()
            await self._changed.wait()
        await self._server.wait_closed()

    def generations(self, asked: str = "") -> list[Record]:
        """Return the calls that made an answer be written, with this in their last user message."""
        return [record for record in self.requests if record.generated and asked in record.asked]

    def served(self, asked: str = "") -> Served:
        """Add up the calls that `generations` returns."""
        return Served.of(self.generations(asked))

    def keep(self, background: Background) -> None:
        """Keep a response, and as many of the latest as there are calls kept."""
        self.responses[background.id] = background
        if len(self.responses) > (self.requests.maxlen or 0):
            del self.responses[next(iter(self.responses))]

    def changed(self) -> None:
        """Wake those who wait in `until`."""
        self._changed.set()

    async def until(self, holds: Callable[[], object], within_s: float) -> None:
        """Wait until something holds of the calls. Looked at when a call comes, ends or loses its connection."""
        async with asyncio.timeout(within_s):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def ended(self, record: Record, within_s: float) -> None:
        """Wait until a call has been answered or its connection closed."""
        await self.until(lambda: record.completed or record.closed_at is not None, within_s)


class _Connection(asyncio.Protocol):
    def __init__(self, provider: FakeProvider) -> None:
        self._provider = provider
        self._received = bytearray()
        self._answer: _Answer | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._provider.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._provider.connections.discard(self)
        if self._answer is not None:
            self._answer.lost()
        self._provider.changed()

    def abort(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        if self._answer is not None:
            self._answer.paused = True

    def resume_writing(self) -> None:
        if self._answer is not None:
            self._answer.resume()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._answer is None:
            self._next_request()

    def answered(self) -> None:
        """Go on with the next request of a kept-alive connection."""
        self._answer = None
        self._provider.changed()
        if self._received:
            self._next_request()

    def _next_request(self) -> None:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        request_line, *lines = self._received[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        stop = end + 4 + int(headers.get("content-length", "0"))
        if len(self._received) < stop:
            return
        content = bytes(self._received[end + 4 : stop])
        del self._received[:stop]
        method, path, _ = request_line.split(" ", 2)
        if method == "GET" and path == "/_requests":
            self.send_whole(200, [asdict(record) for record in self._provider.requests])
            return
        if method == "GET" and path == "/_stats":
            self.send_whole(200, asdict(self._provider.served()))
            return
        bare, _, query = path.partition("?")
        root, _, response_id = bare.partition("/responses/")
        dialect = RESPONSES if (response_id and root in {"", "/v1"}) or bare in RESPONSES_PATHS else DIALECTS.get(bare)
        if dialect is None or (method != "POST" and not response_id):
            self.send_whole(404, {"error": {"message": "no such path"}})
            return
        body = orjson.loads(content) if content else {}
        record = Record(next(self._provider.ids), dialect.name, path, headers, body, time.monotonic(), method=method)
        self._provider.requests.append(record)
        self._provider.changed()
        if response_id:
            self._read_again(record, response_id, parse_qs(query))
            return
        plan = self._plan(dialect, record)
        background = None
        if dialect is RESPONSES and not plan.fault[0][:3].isdigit():
            record.response_id = f"resp_{record.id:08d}"
            background = Background(record.response_id, plan, record)
            self._provider.keep(background)
            plan = replace(plan, stamp=0)  # they are in the text already
        frames = background.frames(-1)[0] if background else dialect.frames(record.body, plan)
        self._answer = _Answer(self, dialect, record, plan, frames, background)
        self._answer.start()

    def _plan(self, dialect: Dialect, record: Record) -> Plan:
        record.asked, plan = plan_of(dialect, record.body)
        if plan.fail_first or plan.spare_first:
            self._provider.asked[record.asked] += 1
            plan.spare(self._provider.asked[record.asked])
        return plan

    def _read_again(self, record: Record, rest: str, query: dict[str, list[str]]) -> None:
        response_id, _, verb = rest.partition("/")
        background = self._provider.responses.get(response_id)
        stream = query.get("stream") == ["true"]
        record.response_id = response_id
        if verb == "cancel" and background is not None and background.plan.deaf:
            return
        if verb == "cancel" and background is not None:
            background.cancel()
            refusal: tuple[int, object] | None = 200, background.whole()
        else:
            refusal = answer(background, stream=stream)
        if background is None or refusal is not None:
            assert refusal is not None
            record.completed = True
            self.send_whole(*refusal)
            self.answered()
            return
        record.body["stream"] = True
        frames, first = background.frames(int(query.get("starting_after", ["-1"])[0]))
        self._answer = _Answer(self, RESPONSES, record, later_plan(background.plan), frames, background, first)
        self._answer.start()

    def send_whole(self, status: int, value: object, *, kind: str = "application/json", extra: str = "") -> None:
        body = value if isinstance(value, bytes) else orjson.dumps(value)
        head = (
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}\r\n"
            f"content-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
        )
        self.transport.write(head.encode() + body)


class _Answer:
    """One answer on its way. Driven by timers, one per delta, and by the transport's back-pressure."""

    def __init__(
        self,
        connection: _Connection,
        dialect: Dialect,
        record: Record,
        plan: Plan,
        frames: Frames,
        background: Background | None = None,
        first: int = 0,
    ) -> None:
        self._connection = connection
        self._write = connection.transport.write
        self._dialect = dialect
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.paused = False
        self.plan = plan
        self._fault, self._fault_at = plan.fault
        self._frames = frames
        self._background = background
        self._first = first
        self._index = 0
        self._count = len(frames.deltas)
        self._carry = b""
        self._due = 0.0

    def start(self) -> None:
        plan, fault = self.plan, self._fault
        if fault == "slow_headers":
            return
        if fault == "html":
            self._connection.send_whole(200, b"<html>a proxy speaks</html>", kind="text/html")
            self._finish()
            return
        if fault[:3].isdigit():
            status, body = self._dialect.refusal(fault)
            extra = f"retry-after: {plan.retry_after}\r\n" if plan.retry_after else ""
            self._connection.send_whole(status, body, extra=extra)
            self._finish()
            return
        self._record.generated = self._record.method == "POST"
        count_input(self._record)
        if self._background is not None and self._record.generated:
            self._record.output_tokens = len(self._background.pieces)  # it is written to its end, whoever reads
        if not self._record.body.get("stream"):
            self._index = self._count
            self._connection.send_whole(200, self._frames.whole)
            self._finish()
            return
        self._write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if fault == "nothing":
            self._end_body()
            return
        self._send(self._frames.opening)
        self._due = self._loop.time() + plan.ttft
        if self._background is not None:
            self._background.readers.add(self)
            self._due += self._background.due_at(self._first) - time.monotonic() - plan.ttft
        step: Callable[[], None] = self._burst if plan.burst else self._tick
        self._timer = self._loop.call_at(self._due, step)

    def resume(self) -> None:
        self.paused = False
        if self._timer is None and self.plan.rate == 0 and not self._record.completed:
            self._tick()

    def lost(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        record = self._record
        record.closed_at = time.monotonic()
        record.closed_early = not record.completed
        if self._background is not None:
            self._background.left(self, record)
        elif record.generated:
            record.cancelled = record.closed_early
            self._count_output()

    def cut(self) -> None:
        """End the stream of a response that has been cancelled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._end_body()

    def _tick(self) -> None:
        """Send what is due: one delta at a rate, else as many as the socket takes in one go."""
        self._timer = None
        rate = self.plan.pace
        batch = 1 if rate or self._fault in {"split_utf8", "surrogates"} else 64
        while not (self.paused and not rate):
            if not self._one():
                return
            batch -= 1
            if batch == 0:
                if rate:
                    # From the schedule, not from now: a late timer does not slow the stream down.
                    self._due += 1 / rate
                    self._timer = self._loop.call_at(self._due, self._tick)
                else:
                    self._timer = self._loop.call_later(0, self._tick)
                return

    def _one(self) -> bool:
        """Send one delta, or the end. Returns whether there is more to come."""
        index = self._index
        if self._fault_at == index and self._fails_here():
            return False
        if index == self._count:
            self._send(self._carry + self._frames.ending)
            self._end_body()
            return False
        frame = self._frames.stamped() if self.plan.stamp else self._frames.deltas[index]
        self._index = index + 1
        self._record.deltas_sent = index + 1
        if self._fault == "split_utf8":
            frame = self._carry + frame
            cut = next((at + 1 for at in range(len(frame) - 1, 0, -1) if frame[at] >= 0xC0), len(frame) // 2)
            frame, self._carry = frame[:cut], frame[cut:]
        self._send(frame)
        return True

    def _fails_here(self) -> bool:
        match self._fault:
            case "die_at":
                # Close with the data sent, without the end of the body.
                self._connection.transport.close()
            case "stall_at":
                pass
            case "end_at" | "garbage" | "huge_line" as name:
                last = {"end_at": b"", "garbage": b'data: {"choices": [{"delta": nonsense\n\n'}
                self._send(last.get(name, b"data: " + b"x" * (2 * 1024 * 1024) + b"\n\n"))
                self._end_body()
            case "endless_line":
                # A gigabyte, as far as it is taken. What cannot be sent now goes with `resume`.
                self._send(b"data: ")
                while not (self.paused or self._connection.transport.is_closing() or self._record.bytes_sent > 2**30):
                    self._send(b"x" * 65536)
            case "error_event_at":
                self._send(self._dialect.error_event)
                self._end_body()
            case _:
                return False
        return True

    def _burst(self) -> None:
        self._timer = None
        chunks = [b"%x\r\n%b\r\n" % (len(frame), frame) for frame in (*self._frames.deltas, self._frames.ending)]
        data = b"".join(chunks)
        self._record.deltas_sent = self._index = self._count
        self._record.bytes_sent += len(data)
        self._write(data)
        self._end_body()

    def _send(self, data: bytes) -> None:
        if data:
            self._record.bytes_sent += len(data)
            self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _end_body(self) -> None:
        self._write(b"0\r\n\r\n")
        self._finish()

    def _count_output(self) -> None:
        made, ended = len(self.plan.pieces()), self._index == self._count
        self._record.output_tokens = made if ended else min(made, max(0, self._index - self.plan.reasoning))

    def _finish(self) -> None:
        self._record.completed = True
        if self._background is not None:
            self._background.readers.discard(self)
        elif self._record.generated:
            self._count_output()
        self._connection.answered()


async def _serve(port: int) -> None:
    async with FakeProvider(port, keep=2_000) as provider:
        print(f"listening on 127.0.0.1:{provider.port}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        # Not asyncio's own loop: the load generator must not be what is measured.
        uvloop.run(_serve(arguments.port))


if __name__ == "__main__":
    main()
