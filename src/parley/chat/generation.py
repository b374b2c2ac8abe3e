"""Writing replies. A reply belongs to the process and not to a socket: nobody has to watch it to be finished."""

import asyncio
import logging
from dataclasses import dataclass, field, replace
from functools import partial

from parley.chat.assistants.service import Assistants
from parley.chat.attachments.service import AttachmentService
from parley.chat.draft import Draft
from parley.chat.endings import Ending, failure
from parley.chat.endings import Stopped as _Stopped
from parley.chat.ends import Ends
from parley.chat.history import History, model_history, model_messages
from parley.chat.payments import Payments, is_between_calls
from parley.chat.reading import Reading
from parley.chat.repository import MessageRepository
from parley.chat.resuming import Place, Step
from parley.chat.tool_runs import ToolCalls, ToolRuns
from parley.chat.turns import Turns
from parley.chat.written import Written
from parley.core.db import Database
from parley.core.error_handlers import translate
from parley.core.errors import AppError
from parley.core.logging import log_context
from parley.core.settings import LlmSettings
from parley.llm.errors import ModelError, ReattachRefused
from parley.llm.ports import (
    ModelMessage,
    ModelRequest,
    TextPart,
    ToolCallChunk,
    ToolSpec,
)
from parley.llm.prompts import PromptLibrary, RenderedPrompt
from parley.realtime.runs import Run
from parley.realtime.tick import TickWriter
from parley.usage.calls import ModelCall
from parley.usage.ledger import CallRecord
from parley.usage.service import UsageService

logger = logging.getLogger(__name__)

_FAULTS = 3
_HAND_OVER_S = 5.0


@dataclass
class _Account:
    """What a reply used, over all its model calls."""

    model: str | None = None
    call: ModelCall | None = None
    """The call that is being read."""
    prompt: RenderedPrompt | None = None
    records: list[CallRecord] = field(default_factory=list)


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
        tool_runs: ToolRuns,
        assistants: Assistants,
        attachments: AttachmentService,
        payments: Payments,
        settings: LlmSettings,
    ) -> None:
        self._payments = payments
        self._database = database
        self._turns = turns
        self._ends = ends
        self._writer = writer
        self._usage = usage
        self._prompts = prompts
        self._tool_runs = tool_runs
        self._assistants = assistants
        self._attachments = attachments
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
                await self._ends.left(run, account.records)
                return
            if run.handed_over and work.cancelled() and not run.cancelled and await self._hand_over(run, account):
                return
            end = self._ending(run, draft, account, work)
            await self._end(run, end)
            logger.info("reply ended", extra={"status": end.status, "model": end.model, "calls": len(end.records)})

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
            status=status, parts=draft.parts, model=account.model, records=tuple(account.records), error=error,
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

    async def _hand_over(self, run: Run, account: _Account) -> bool:
        """Write what there is and give the run up; False when that could not be done, and the run is to be ended."""
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                await self._writer.flush(run)
                await self._writer.settle(run)
                await self._payments.store_ended(run, account.records)
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
        profile = await self._assistants.profile_of(run)
        account.prompt = profile.prompt
        tools = self._tool_runs.of(run, draft, profile)
        # What waited was admitted at another time: another day may have begun, or the keys be others.
        waited = run.history is None
        history = await self._history(run, profile.prompt, tools.specs)
        messages = history.messages
        prefill = self._take_up(run, messages) if run.options.get("continues") else None
        calls: list[ToolCallChunk] = []
        said: tuple[TextPart, ...] = ()
        for number in range(self._settings.max_steps):
            history.fit()
            request = ModelRequest(messages=tuple(messages), tools=tools.specs, prefill=prefill, **profile.parameters)
            prefill = None
            if written is not None and not number:
                calls, said = await self._go_on(run, draft, account, messages, request, tools)
            else:
                if number or waited:
                    await self._payments.reserve_step(run, run.options.get("model"), request, account.records)
                calls, said = await self._step(run, draft, account, request)
            if not calls:
                return
            await self._payments.store_step(run, account.records)
            # Where the provider's stream could be read on from is past: what follows is another call.
            run.cursor = ""
            cost = await self._payments.cost_so_far(run, account.records)
            messages += await tools.make(said, calls, cost=cost)
        raise _Stopped(failure("bad_output", "The model kept calling tools and gave no answer.", retryable=True))

    def _take_up(self, run: Run, messages: list[ModelMessage]) -> str | None:
        """Prepare to go on from the answer that the history ends with; returns what the model is given of it to begin.

        A model that cannot be given a beginning is asked in words.
        """
        last = messages[-1]
        if last.role == "assistant" and self._usage.can_prefill(run.options["model"], scope=run.scope):
            text = "".join(part.text for part in last.parts if isinstance(part, TextPart))
            if text and all(isinstance(part, TextPart) for part in last.parts):
                messages.pop()
                return text
        if last.role == "assistant":
            messages.append(ModelMessage("user", (TextPart(self._prompts.render("chat/continue").text),)))
        return None

    async def _go_on(
        self, run: Run, draft: Draft, account: _Account, messages: list[ModelMessage], request: ModelRequest,
        tools: ToolCalls,
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:  # fmt: skip
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
        if not is_between_calls(draft.written):
            account.records.append(self._payments.lost(run, draft.model or model, request, step))
        if step.said:
            # After a fallback the text is another model's than the one that was named: either may go on with it.
            able = [one for one in (draft.model, model) if one and self._usage.can_prefill(one, scope=run.scope)]
            if not able:
                raise _Stopped(failure("worker_lost"))
            model = able[0]
        draft.resumed(model=model, strategy="prefill" if step.said else "restart")
        prefill = request.prefill
        if step.said:
            # A reply that itself went on from another one began with that one's text.
            prefill = (prefill or "") + step.said
        else:
            # Nothing that a reader would see is lost or said twice.
            draft.close()
            await tools.settle()
        if step.before:
            before = [*model_messages("assistant", draft.written[: len(step.before)])]
            messages.extend(before)
            prefill = step.said or None
        asked = replace(request, messages=tuple(messages), prefill=prefill)
        await self._payments.reserve_step(run, model, asked, account.records)
        calls, said = await self._step(run, draft, account, asked, model)
        return calls, _joined(step.said, said)

    async def _reattach(
        self, run: Run, draft: Draft, account: _Account, request: ModelRequest, *, step: Step, place: Place
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        known = step.said[: place.said]
        call = self._usage.reattach(request, place.model, place.cursor, said=known, scope=run.scope)
        resume = partial(draft.resumed, model=place.model, strategy="reattach")
        again = (len(step.said) - len(known), step.reasoned - place.reasoned)
        reading = Reading(run, draft, self._writer, first=resume, step=step, again=again)
        calls, said = await self._read(account, call, reading)
        return calls, _joined(step.said, said)

    async def _step(
        self, run: Run, draft: Draft, account: _Account, request: ModelRequest, model: str | None = None
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        call = self._usage.stream(request, model or run.options.get("model"), scope=run.scope, resets=True)
        return await self._read(account, call, Reading(run, draft, self._writer))

    async def _read(
        self, account: _Account, call: ModelCall, reading: Reading
    ) -> tuple[list[ToolCallChunk], tuple[TextPart, ...]]:
        """Read a model's answer, and count what it used."""
        account.call = call
        try:
            async with call:
                await reading.read(call)
        finally:
            account.call = None
            account.records += call.records
            account.model = reading.model or call.entry.id
        return reading.calls, reading.said

    async def _history(self, run: Run, prompt: RenderedPrompt, tools: tuple[ToolSpec, ...]) -> History:
        path, run.history = run.history, None
        if path is None:
            async with self._database.unit_of_work(run.scope) as unit:
                path = await MessageRepository(unit, run.scope).path_to(run.question_id)
        entry = self._usage.models(run.scope).resolve(run.options.get("model"))
        load = partial(self._attachments.contents, run.scope, run.question_id)
        return await model_history(path, system=prompt.text, entry=entry, tools=tools, load=load)


def _joined(before: str, said: tuple[TextPart, ...]) -> tuple[TextPart, ...]:
    text = before + "".join(part.text for part in said)
    return (TextPart(text),) if text else ()
