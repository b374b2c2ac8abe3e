"""Writing replies. A reply belongs to the process and not to a socket: nobody has to watch it to be finished."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any

import orjson

from parley.chat.draft import Draft
from parley.chat.endings import Ending, failure
from parley.chat.ends import Ends
from parley.chat.repository import MessageRepository
from parley.chat.resuming import Place, Step, model_messages
from parley.chat.tools import ToolBox
from parley.chat.turns import Turns
from parley.chat.written import Written
from parley.core.db import Database
from parley.core.error_handlers import translate
from parley.core.errors import AppError
from parley.core.logging import log_context
from parley.core.settings import LlmSettings
from parley.llm.errors import ModelError, ReattachRefused
from parley.llm.ports import (
    Chunk,
    CursorChunk,
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
from parley.usage.service import ModelCall, Tally, UsageService

logger = logging.getLogger(__name__)

_UNWRITTEN_CHARACTERS = 64 * 1024
_FAULTS = 3
_HAND_OVER_S = 5.0


class _Stopped(Exception):
    """The reply cannot go on; `error` is what its reader is told."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["code"])
        self.error = error


@dataclass
class _Account:
    """What a reply used, over all its model calls."""

    model: str | None = None
    call: ModelCall | None = None
    """The call that is being read."""
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


def _interrupt(run: Run, account: _Account, work: asyncio.Task[None]) -> None:
    if (run.lost or run.handed_over) and account.call is not None:
        # Another process goes on with it: the provider is not told to stop.
        account.call.detach()
    work.cancel()


class Generator:
    """Writes all replies of this process."""

    def __init__(
        self,
        *,
        database: Database,
        turns: Turns,
        ends: Ends,
        writer: TickWriter,
        usage: UsageService,
        prompts: PromptLibrary,
        tools: ToolBox,
        settings: LlmSettings,
    ) -> None:
        self._database = database
        self._turns = turns
        self._ends = ends
        self._writer = writer
        self._usage = usage
        self._prompts = prompts
        self._tools = tools
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def running(self) -> int:
        """How many replies are being written."""
        return len(self._tasks)

    def start(self, run: Run, written: Written | None = None) -> None:
        """Begin to write a reply, or go on with one that another process has `written` so far."""
        task = asyncio.create_task(self._run(run, written), name=f"reply-{run.reply_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, *, drain_s: float, hand_over: bool) -> None:
        """Let running replies end; what has not by then is handed over to another process, or ends with what it has."""
        self._closing = True
        if self._tasks:
            logger.info("waiting for %d replies to end", len(self._tasks))
            await asyncio.wait(self._tasks, timeout=drain_s)
        if self._tasks and hand_over:
            for run in self._writer.tracked():
                run.signal(handed_over=True)
            await asyncio.wait(self._tasks, timeout=_HAND_OVER_S)
        self.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)

    def stop(self) -> None:
        """Cut running replies off; each is ended with what it has."""
        self._closing = True
        for run in self._writer.tracked():
            run.signal(stopped=True)

    async def _run(self, run: Run, written: Written | None) -> None:
        ids = {"reply_id": str(run.reply_id), "workspace_id": str(run.scope.workspace_id)}
        with log_context(**ids):
            draft, account = Draft(run, self._writer, written), _Account(model=run.options.get("model"))
            work = asyncio.create_task(self._write(run, draft, account, written), name=f"model-{run.reply_id}")
            run.on_signal = partial(_interrupt, run, account, work)
            if run.cancelled or run.lost:
                work.cancel()
            await asyncio.wait({work})
            if run.lost:
                logger.warning("reply is no longer ours")
                self._writer.untrack(run)
                return
            if run.handed_over and work.cancelled() and not run.cancelled and await self._hand_over(run):
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
                await self._ends.finish(run, end)
                break
            except Exception as error:
                if translate(error) is None:
                    logger.exception("the end of a reply could not be stored")
                    faults += 1
                if faults == _FAULTS:
                    # It is this end that cannot be stored. The sweep makes one from what the log has.
                    await self._ends.release(run)
                    break
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)
            if await self._ended_meanwhile(run):
                break
        self._writer.untrack(run)
        if not self._closing:
            try:
                await self._turns.start_next(run.scope, run.channel)
            except Exception:
                # The sweep of open replies finds it.
                logger.exception("the next reply could not be started")

    async def _hand_over(self, run: Run) -> bool:
        """Write what there is and give the run up; False when that could not be done, and the run is to be ended."""
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                await self._writer.flush(run)
                await self._writer.settle(run)
        except TimeoutError:
            return False
        await self._ends.release(run)
        self._writer.untrack(run)
        logger.info("reply handed over")
        return True

    async def _ended_meanwhile(self, run: Run) -> bool:
        try:
            return await self._ends.is_ended(run)
        except Exception as error:
            if translate(error) is None:
                logger.exception("a reply could not be looked up")
            return False

    # -- the model -----------------------------------------------------------------------------------------------

    async def _write(self, run: Run, draft: Draft, account: _Account, written: Written | None) -> None:
        account.prompt = prompt = self._prompts.render(f"chat/{run.options.get('assistant', 'general')}")
        messages = [ModelMessage("system", (TextPart(prompt.text),)), *await self._history(run)]
        prefill = self._take_up(run, messages) if run.options.get("continues") else None
        tools = self._tools.specs(run.scope, run.options.get("tools"))
        calls: list[ToolCallChunk] = []
        said: tuple[TextPart, ...] = ()
        for number in range(self._settings.max_steps):
            request = ModelRequest(messages=tuple(messages), tools=tools, prefill=prefill)
            prefill = None
            if written is not None and not number:
                calls, said = await self._go_on(run, draft, account, messages, request)
            else:
                calls, said = await self._step(run, draft, account, request)
            if not calls:
                return
            # Where the provider's stream could be read on from is past: what follows is another call.
            run.cursor = ""
            messages.append(ModelMessage("assistant", (*said, *(_call_part(call) for call in calls))))
            # All calls are in the log before the first is made: none is forgotten if the process is lost meanwhile.
            begun = [(draft.tool_call(call.name[:100], call.arguments)[0], call) for call in calls]
            for index, call in begun:
                messages.append(ModelMessage("tool", (await self._call(run, draft, index, call),)))
        raise _Stopped(failure("bad_output", "The model kept calling tools and gave no answer.", retryable=True))

    def _take_up(self, run: Run, messages: list[ModelMessage]) -> str | None:
        """Prepare to go on from the answer that the history ends with; returns what the model is given of it to begin.

        A model that cannot be given a beginning is asked in words.
        """
        last = messages[-1]
        if last.role == "assistant" and self._usage.can_prefill(run.options["model"]):
            text = "".join(part.text for part in last.parts if isinstance(part, TextPart))
            if text and all(isinstance(part, TextPart) for part in last.parts):
                messages.pop()
                return text
        if last.role == "assistant":
            messages.append(ModelMessage("user", (TextPart(self._prompts.render("chat/continue").text),)))
        return None

    async def _go_on(
        self, run: Run, draft: Draft, account: _Account, messages: list[ModelMessage], request: ModelRequest
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        """Go on with a reply whose process was lost: the first step of this process's, which another one began."""
        model: str = run.options["model"]
        step = Step.last_of(draft.written)
        place = Place.from_text(run.provider_cursor)
        before = [*model_messages("assistant", step.before)]
        if place is not None:
            asked = replace(request, messages=(*request.messages, *before))
            try:
                return await self._reattach(run, draft, account, asked, step=step, place=place)
            except ReattachRefused:
                logger.info("the provider no longer has the rest of a reply", extra={"model": place.model})
        if step.said and not self._usage.can_prefill(model):
            raise _Stopped(failure("worker_lost"))
        draft.resumed(model=model, strategy="prefill" if step.said else "restart")
        prefill = request.prefill
        if step.said:
            # A reply that itself went on from another one began with that one's text.
            prefill = (prefill or "") + step.said
        else:
            # Nothing that a reader would see is lost or said twice.
            draft.close()
            for index, part in draft.unsettled():
                await self._settle(run, draft, index, part)
        if step.before:
            before = [*model_messages("assistant", draft.written[: len(step.before)])]
            messages.extend(before)
            prefill = step.said or None
        asked = replace(request, messages=tuple(messages), prefill=prefill)
        calls, said = await self._step(run, draft, account, asked)
        return calls, _joined(step.said, said)

    async def _reattach(
        self, run: Run, draft: Draft, account: _Account, request: ModelRequest, *, step: Step, place: Place
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        known = step.said[: place.said]
        call = self._usage.reattach(request, place.model, place.cursor, said=known)
        resume = partial(draft.resumed, model=place.model, strategy="reattach")
        calls, said = await self._read(
            run, draft, account, call, first=resume, step=step,
            again=(len(step.said) - len(known), step.reasoned - place.reasoned),
        )  # fmt: skip
        return calls, _joined(step.said, said)

    async def _settle(self, run: Run, draft: Draft, index: int, part: dict[str, Any]) -> None:
        """See to a tool call that the lost process left: one that may have been made is repeated only if that is safe.

        One whose `running` was never committed was not made.
        """
        if part["state"] == "running" and not self._tools.is_idempotent(part["name"]):
            draft.tool_ended(index, state="unknown", output={"error": "The outcome of this call is unknown."})
            return
        await self._call(run, draft, index, ToolCallChunk(part["call"], part["name"], part["input"], ""))

    async def _step(
        self, run: Run, draft: Draft, account: _Account, request: ModelRequest
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        return await self._read(run, draft, account, self._usage.stream(request, run.options.get("model")))

    async def _read(
        self, run: Run, draft: Draft, account: _Account, call: ModelCall, *, first: Callable[[], None] | None = None,
        step: Step | None = None, again: tuple[int, int] = (0, 0),
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:  # fmt: skip
        """Read a model's answer. `again`: how much text and reasoning at its start the log has already."""
        calls: list[ToolCallChunk] = []
        said: list[str] = []
        shown, thought = (len(step.said), step.reasoned) if step else (0, 0)
        skip_text, skip_reasoning = again
        account.call = call
        try:
            async with call:
                async for item in call:
                    if first is not None and isinstance(item, Chunk):
                        first()
                        first = None
                    match item:
                        case TextChunk(text=text):
                            text, skip_text = text[skip_text:], max(skip_text - len(text), 0)
                            if not text:
                                continue
                            draft.text(text)
                            said.append(text)
                            shown += len(text)
                            if run.buffered > _UNWRITTEN_CHARACTERS:
                                await self._writer.room(run)
                        case ReasoningChunk(text=text):
                            text, skip_reasoning = text[skip_reasoning:], max(skip_reasoning - len(text), 0)
                            if text:
                                draft.reasoning(text)
                                thought += len(text)
                        case CursorChunk(cursor=cursor):
                            run.cursor = Place(call.entry.id, shown, thought, cursor).to_text()
                        case ToolCallChunk():
                            calls.append(item)
                        case Finish(reason=FinishReason.CONTENT_FILTER):
                            raise _Stopped(failure("content_filtered", "The provider filtered the answer."))
        finally:
            account.call = None
            account.add(call.tally)
        return calls, (TextPart("".join(said)),) if said else ()

    async def _call(self, run: Run, draft: Draft, index: int, call: ToolCallChunk) -> ToolResultPart:
        await draft.tool_running(index)
        state, output = await self._tools.run(run.scope, call)
        draft.tool_ended(index, state=state, output=output)
        return ToolResultPart(call.call_id, call.name, orjson.dumps(output).decode(), failed=state == "failed")

    async def _history(self, run: Run) -> list[ModelMessage]:
        path, run.history = run.history, None
        if path is None:
            async with self._database.unit_of_work(run.scope) as unit:
                path = await MessageRepository(unit, run.scope).path_to(run.question_id)
        return [message for role, parts in path for message in model_messages(role, parts)]


def _call_part(call: ToolCallChunk) -> ToolCallPart:
    return ToolCallPart(call.call_id, call.name, call.arguments or {})


def _joined(before: str, said: tuple[TextPart, ...]) -> tuple[TextPart, ...]:
    text = before + "".join(part.text for part in said)
    return (TextPart(text),) if text else ()
