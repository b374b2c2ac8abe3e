"""A model provider that knows what it should have said, and writes down what became of every call.

It speaks OpenAI's chat completions. A request that ends with an assistant's message is a continuation: the answer
goes on behind it. Network chunks cut characters in two.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from aiohttp import web

from tests.faults.script import Plan

Kind = Literal["first", "after_tool", "continuation"]


@dataclass
class Call:
    """One call. Times are `time.monotonic()`."""

    number: int
    text: str
    plan: Plan
    kind: Kind
    stage: int
    said: str
    began: float
    model: str
    sent: list[str] = field(default_factory=list)
    outcome: Literal["running", "finished", "disconnected", "failed"] = "running"
    ended: float | None = None
    fits: bool = True
    """Whether a continuation's beginning is one that this provider would have said."""

    @property
    def sent_text(self) -> str:
        """The visible text that left the provider in this call."""
        return "".join(self.sent)


class _Cut(Exception):
    """The connection is to be cut."""


class Provider:
    """The server. `calls` is everything that was asked of it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.port = 0
        self._asked: Counter[str] = Counter()
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def of(self, text: str) -> list[Call]:
        """Return the calls for one message."""
        return [call for call in self.calls if call.text == text]

    def running(self) -> list[Call]:
        """Return the calls that are not over."""
        return [call for call in self.calls if call.outcome == "running"]

    async def until(self, holds: Any, timeout_s: float = 10) -> None:
        """Wait until something holds of the calls."""
        async with asyncio.timeout(timeout_s):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator["Provider"]:
        """Serve on a free port."""
        made = cls()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", made._answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.port = runner.addresses[0][1]
        try:
            yield made
        finally:
            await runner.cleanup()

    def _change(self) -> None:
        self._changed.set()

    def _read(self, body: dict[str, Any]) -> Call:
        messages = body["messages"]
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
        text = _text(messages[last_user].get("content"))
        after = messages[last_user + 1 :]
        stage = 1 if any(message["role"] == "tool" for message in after) else 0
        said, kind = "", "after_tool" if stage else "first"
        if after and after[-1]["role"] == "assistant":
            said, kind = _text(after[-1].get("content")), "continuation"
        plan = Plan.read(text)
        return Call(
            number=len(self.calls), text=text, plan=plan, kind=kind, stage=stage, said=said, began=time.monotonic(),  # type: ignore[arg-type]  # a Kind
            model=str(body.get("model")),
        )  # fmt: skip

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        call = self._read(orjson.loads(await request.read()))
        self.calls.append(call)
        self._change()
        self._asked[call.text] += 1
        fault, at = call.plan.fault()
        if call.plan.fail_first and self._asked[call.text] > call.plan.fail_first:
            fault, at = "", 0
        if fault[:3].isdigit():
            self._end(call, "failed")
            return web.json_response({"error": {"message": "no", "type": "x"}}, status=int(fault[:3]))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            await self._stream(call, response, fault, at)
        except _Cut:
            self._end(call, "failed")
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            self._end(call, "disconnected")
        except asyncio.CancelledError:
            self._end(call, "disconnected")
            raise
        else:
            self._end(call, "failed" if fault else "finished")
        return response

    def _end(self, call: Call, outcome: Literal["finished", "disconnected", "failed"]) -> None:
        call.outcome, call.ended = outcome, time.monotonic()
        self._change()

    async def _stream(self, call: Call, response: web.StreamResponse, fault: str, at: int) -> None:
        plan, loop = call.plan, asyncio.get_running_loop()
        due = loop.time() + plan.ttft
        stalls_at, stall_s = plan.pause()
        pieces = list(_rest(call))
        thoughts = plan.thoughts(call.stage) if call.kind == "first" else ()
        count = 0
        for kind, piece in [*(("reasoning_content", t) for t in thoughts), *(("content", p) for p in pieces)]:
            if plan.rate:
                await asyncio.sleep(max(0.0, due - loop.time()))
                due += 1 / plan.rate
            if kind == "content":
                if fault and count == at:
                    return await self._fail(response, fault)
                if count == stalls_at and call.kind != "continuation":
                    await asyncio.sleep(stall_s)
                    due = loop.time()
                count += 1
                call.sent.append(piece)
            await _write(response, _chunk({kind: piece}), cut=count % 3 == 0)
        if fault and count <= at:
            return await self._fail(response, fault)
        if plan.tool and call.stage == 0:
            # A title that no other reply has: a test can count how often the tool really ran.
            arguments = orjson.dumps({"title": f"seed {plan.seed}"}).decode()
            function = {"name": plan.tool, "arguments": arguments}
            calls = [{"index": 0, "id": f"call_{plan.seed}", "type": "function", "function": function}]
            await response.write(_chunk({"tool_calls": calls}))
        reason = "tool_calls" if plan.tool and call.stage == 0 else "stop"
        usage = {"prompt_tokens": 10, "completion_tokens": count}
        last = orjson.dumps({"id": "c", "choices": [], "usage": usage})
        await response.write(_chunk({}, reason) + b"data: " + last + b"\n\ndata: [DONE]\n\n")
        return None

    async def _fail(self, response: web.StreamResponse, fault: str) -> None:
        match fault:
            case "reset":
                raise _Cut
            case "garbage":
                await response.write(b'data: {"choices": [{"delta": nonsense\n\n')
            case "error":
                await response.write(b'data: {"error":{"message":"overloaded","type":"server_error","code":503}}\n\n')
            case "eof":
                return
            case _:
                raise ValueError(fault)


def _rest(call: Call) -> Iterable[str]:
    """Return the deltas that are still to be said."""
    pieces = call.plan.pieces(call.stage)
    if call.kind != "continuation":
        return pieces
    whole = "".join(pieces)
    call.fits = whole.startswith(call.said)
    if not call.fits:
        return ("(a beginning that was never said)",)
    left, rest = len(call.said), []
    for piece in pieces:
        kept = piece[min(left, len(piece)) :]
        left = max(0, left - len(piece))
        if kept:
            rest.append(kept)
    return rest


def _chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: " + orjson.dumps({"id": "c", "model": "faulty", "choices": [choice]}) + b"\n\n"


async def _write(response: web.StreamResponse, data: bytes, *, cut: bool) -> None:
    """Write an event; `cut`: in two network chunks that divide a character, where it has one of several bytes."""
    wide = next((at for at, byte in enumerate(data) if byte >= 0xC0), None)
    if not cut or wide is None:
        await response.write(data)
        return
    await response.write(data[: wide + 1])
    await asyncio.sleep(0)
    await response.write(data[wide + 1 :])


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n\n".join(block["text"] for block in content if block.get("type") == "text")
    return ""
