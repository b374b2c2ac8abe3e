"""Writing replies. A reply belongs to the process and not to a socket: nobody has to watch it to be finished."""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

import orjson

from parley.chat.draft import Draft
from parley.chat.repository import MessageRepository
from parley.chat.tools import ToolBox
from parley.chat.turns import Ending, Turns, failure
from parley.core.db import Database
from parley.core.error_handlers import translate
from parley.core.errors import AppError
from parley.core.logging import log_context
from parley.core.settings import LlmSettings
from parley.llm.errors import ModelError
from parley.llm.ports import (
    Finish,
    FinishReason,
    ModelMessage,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolCallPart,
    ToolResultPart,
)
from parley.llm.prompts import PromptLibrary, RenderedPrompt
from parley.realtime.runs import Run
from parley.realtime.tick import TickWriter
from parley.usage.service import Tally, UsageService

logger = logging.getLogger(__name__)

_UNWRITTEN_CHARACTERS = 64 * 1024
_FAULTS = 3


class _Stopped(Exception):
    """The reply cannot go on; `error` is what its reader is told."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["code"])
        self.error = error


@dataclass
class _Account:
    """What a reply used, over all its model calls."""

    model: str | None = None
    prompt: RenderedPrompt | None = None
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = field(default_factory=Decimal)

    def add(self, tally: Tally) -> None:
        self.model = tally.model_id
        self.input_tokens += tally.input_tokens
        self.cached_tokens += tally.cached_tokens
        self.output_tokens += tally.output_tokens
        self.cost += tally.cost

    @property
    def usage(self) -> dict[str, int]:
        return {
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
        }


class Generator:
    """Writes all replies of this process."""

    def __init__(
        self,
        *,
        database: Database,
        turns: Turns,
        writer: TickWriter,
        usage: UsageService,
        prompts: PromptLibrary,
        tools: ToolBox,
        settings: LlmSettings,
    ) -> None:
        self._database = database
        self._turns = turns
        self._writer = writer
        self._usage = usage
        self._prompts = prompts
        self._tools = tools
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def running(self) -> int:
        """How many replies are being written."""
        return len(self._tasks)

    def start(self, run: Run) -> None:
        """Begin to write a reply."""
        task = asyncio.create_task(self._run(run), name=f"reply-{run.reply_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, *, drain_s: float) -> None:
        """Let running replies end; what has not ended by then is ended with what it has."""
        if self._tasks:
            logger.info("waiting for %d replies to end", len(self._tasks))
            await asyncio.wait(self._tasks, timeout=drain_s)
        self.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)

    def stop(self) -> None:
        """Cut running replies off; each is ended with what it has."""
        self._stopping = True
        for run in self._writer.tracked():
            run.signal(stopped=True)

    async def _run(self, run: Run) -> None:
        ids = {"reply_id": str(run.reply_id), "workspace_id": str(run.scope.workspace_id)}
        with log_context(**ids):
            draft, account = Draft(run, self._writer), _Account(model=run.options.get("model"))
            work = asyncio.create_task(self._write(run, draft, account), name=f"model-{run.reply_id}")
            run.on_signal = partial(_cancel, work)
            if run.cancelled or run.lost:
                work.cancel()
            await asyncio.wait({work})
            if run.lost:
                logger.warning("reply is no longer ours")
                self._writer.untrack(run)
                return
            end = self._ending(run, draft, account, work)
            await self._end(run, end)
            logger.info("reply ended", extra={"status": end.status, "model": end.model, **(end.usage or {})})

    def _ending(self, run: Run, draft: Draft, account: _Account, work: asyncio.Task[None]) -> Ending:
        status, error = "completed", None
        if work.cancelled():
            status = "cancelled" if run.cancelled else "failed"
            error = None if run.cancelled else failure("worker_lost")
        elif (problem := work.exception()) is not None:
            status = "failed"
            match problem:
                case _Stopped():
                    error = problem.error
                case ModelError():
                    error = failure(problem.code, problem.detail, retryable=problem.retryable)
                case AppError():
                    error = failure("internal", problem.detail)
                case _:
                    logger.error("reply failed", exc_info=problem)
                    error = failure("internal")
        return Ending(
            status=status, parts=draft.parts, model=account.model, usage=account.usage, cost=account.cost, error=error,
            prompt_path=account.prompt.path if account.prompt else None,
            prompt_hash=account.prompt.sha256 if account.prompt else None,
        )  # fmt: skip

    async def _end(self, run: Run, end: Ending) -> None:
        """Store the end, however long the database is away: a reply has exactly one."""
        await self._writer.settle(run)
        delay, faults = 0.1, 0
        while True:
            try:
                await self._turns.finish(run, end)
                break
            except Exception as error:
                if translate(error) is None:
                    logger.exception("the end of a reply could not be stored")
                    faults += 1
                if faults == _FAULTS:
                    # It is this end that cannot be stored. The sweep makes one from what the log has.
                    await self._turns.release(run)
                    break
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)
            if await self._ended_meanwhile(run):
                break
        self._writer.untrack(run)
        if not self._stopping:
            try:
                await self._turns.start_next(run.scope, run.channel)
            except Exception:
                # The sweep of open replies finds it.
                logger.exception("the next reply could not be started")

    async def _ended_meanwhile(self, run: Run) -> bool:
        try:
            return await self._turns.is_ended(run)
        except Exception as error:
            if translate(error) is None:
                logger.exception("a reply could not be looked up")
            return False

    # -- the model -----------------------------------------------------------------------------------------------

    async def _write(self, run: Run, draft: Draft, account: _Account) -> None:
        account.prompt = prompt = self._prompts.render(f"chat/{run.options.get('assistant', 'general')}")
        messages = [ModelMessage("system", (TextPart(prompt.text),)), *await self._history(run)]
        tools = self._tools.specs(run.scope, run.options.get("tools"))
        for _ in range(self._settings.max_steps):
            request = ModelRequest(messages=tuple(messages), tools=tools)
            calls, said = await self._step(run, draft, account, request)
            if not calls:
                return
            messages.append(ModelMessage("assistant", (*said, *(_call_part(call) for call in calls))))
            for call in calls:
                result = await self._call(run, draft, call)
                messages.append(ModelMessage("tool", (result,)))
        raise _Stopped(failure("bad_output", "The model kept calling tools and gave no answer.", retryable=True))

    async def _step(
        self, run: Run, draft: Draft, account: _Account, request: ModelRequest
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        calls: list[ToolCallChunk] = []
        said: list[str] = []
        call = self._usage.stream(request, run.options.get("model"))
        try:
            async with call:
                async for item in call:
                    match item:
                        case TextChunk(text=text):
                            draft.text(text)
                            said.append(text)
                            if run.buffered > _UNWRITTEN_CHARACTERS:
                                await self._writer.room(run)
                        case ReasoningChunk(text=text):
                            draft.reasoning(text)
                        case ToolCallChunk():
                            calls.append(item)
                        case Finish(reason=FinishReason.CONTENT_FILTER):
                            raise _Stopped(failure("content_filtered", "The provider filtered the answer."))
        finally:
            account.add(call.tally)
        return calls, (TextPart("".join(said)),) if said else ()

    async def _call(self, run: Run, draft: Draft, call: ToolCallChunk) -> ToolResultPart:
        index, _ = draft.tool_call(call.name[:100], call.arguments)
        await draft.tool_running(index)
        state, output = await self._tools.run(run.scope, call)
        draft.tool_ended(index, state=state, output=output)
        return ToolResultPart(call.call_id, call.name, orjson.dumps(output).decode(), failed=state == "failed")

    async def _history(self, run: Run) -> list[ModelMessage]:
        path, run.history = run.history, None
        if path is None:
            async with self._database.unit_of_work(run.scope) as unit:
                path = await MessageRepository(unit, run.scope).path_to(run.question_id)
        return [message for role, parts in path for message in _model_messages(role, parts)]


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _call_part(call: ToolCallChunk) -> ToolCallPart:
    return ToolCallPart(call.call_id, call.name, call.arguments or {})


def _model_messages(role: str, parts: list[dict[str, Any]]) -> Iterable[ModelMessage]:
    """Return a stored message as models take it: a reply with tool calls is several of theirs."""
    if role != "assistant":
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        yield ModelMessage("system" if role == "system" else "user", (TextPart(text),))
        return
    said: list[TextPart | ToolCallPart] = []
    results: list[ToolResultPart] = []
    for part in parts:
        if part["type"] == "text" and part["text"]:
            if results:
                yield ModelMessage("assistant", tuple(said))
                yield from (ModelMessage("tool", (result,)) for result in results)
                said, results = [], []
            said.append(TextPart(part["text"]))
        elif part["type"] == "tool":
            said.append(ToolCallPart(part["call"], part["name"], part["input"] or {}))
            output = part["output"] if part["output"] is not None else {"error": "the outcome is unknown"}
            results.append(
                ToolResultPart(
                    part["call"], part["name"], orjson.dumps(output).decode(), failed=part["state"] != "done"
                )
            )
    if said:
        yield ModelMessage("assistant", tuple(said))
    yield from (ModelMessage("tool", (result,)) for result in results)
