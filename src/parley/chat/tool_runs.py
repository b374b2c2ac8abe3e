"""The tool calls of a reply: what a model asked for in one step is made together, within bounds.

Every call is in the log before the first is made, `running` is committed before each, and each has a transaction of
its own. Calls that change something are made one after the other; the others at the same time.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson

from parley.chat.approvals.errors import ToolCallNotFound
from parley.chat.approvals.repository import Asked
from parley.chat.approvals.service import Approvals
from parley.chat.assistants.types import Profile
from parley.chat.draft import Draft
from parley.chat.endings import Stopped, failure
from parley.chat.rights import Rights
from parley.chat.tools import UNKNOWN, Output, Prepared, Refused, ToolBox, allow
from parley.core.error_handlers import translate
from parley.core.errors import Unauthenticated
from parley.core.scope import Scope
from parley.core.settings import LlmSettings
from parley.llm.ports import ModelMessage, TextPart, ToolCallChunk, ToolCallPart, ToolResultPart, ToolSpec
from parley.llm.tool_values import fingerprint, refusal_of
from parley.realtime.runs import Run

logger = logging.getLogger(__name__)

# A model that asks for so many times more than it may is not told so, call by call.
_BEYOND = 4


class ToolRuns:
    """What the replies of one process make their calls with."""

    def __init__(self, box: ToolBox, approvals: Approvals, rights: Rights, settings: LlmSettings) -> None:
        self.box = box
        self.approvals = approvals
        self.rights = rights
        self.settings = settings

    def of(self, run: Run, draft: Draft, profile: Profile) -> "ToolCalls":
        """Return the calls of a reply, of which the draft may have some already."""
        return ToolCalls(self, run, draft, profile)


@dataclass(slots=True)
class _Call:
    """A call on its way. `output` is there once it is settled."""

    index: int
    id: UUID
    name: str
    arguments: dict[str, Any] | None
    raw: str = ""
    was_shown: bool = False
    """Whether whoever asked has been shown that it waits."""
    asks: bool = False
    prepared: Prepared | None = None
    state: str = "failed"
    output: Output | None = None

    def refuse(self, refused: Refused) -> None:
        self.state, self.output = "failed", refused.output


class ToolCalls:
    """The calls of one reply."""

    def __init__(self, runs: ToolRuns, run: Run, draft: Draft, profile: Profile) -> None:
        self._runs = runs
        self._box = runs.box
        self._settings = runs.settings
        self._run = run
        self._draft = draft
        self._profile = profile
        wanted = run.options.get("tools")
        self._names = profile.tools if wanted is None else profile.only(wanted)
        self._made = sum(part["type"] == "tool" for part in draft.written)
        self._used_s = 0.0
        self._busy = 0
        self._slots = asyncio.Semaphore(runs.settings.tools_at_once)
        self._writes = asyncio.Lock()

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """What the model is told of the tools of this reply."""
        return self._box.specs(self._run.scope, self._names)

    async def make(
        self, said: tuple[TextPart, ...], calls: Sequence[ToolCallChunk], *, cost: Decimal
    ) -> list[ModelMessage]:
        """Make the calls of one step; return them and their results as the model takes them, in the model's order.

        What a cap on calls or on time leaves out is refused, and the model told. Raises `Stopped` when the reply has
        cost (`cost`, in dollars) what it may, or when the model asks for calls without measure.
        """
        settings = self._settings
        if settings.max_cost and cost >= settings.max_cost:
            raise Stopped(failure("over_budget", f"This reply has cost what one may cost: ${settings.max_cost}."))
        if len(calls) > _BEYOND * settings.calls_per_step:
            raise Stopped(failure("bad_output", f"The model made {len(calls)} tool calls at once."))
        begun: list[_Call] = []
        asked: list[ToolCallPart] = []
        for number, call in enumerate(calls):
            # What is too large or cannot be stored is in no event either.
            kept = None if refusal_of(call.arguments, call.raw) else call.arguments
            index, id_ = self._draft.tool_call(call.name[:100], kept)
            one = _Call(index, id_, call.name, call.arguments, call.raw)
            if number >= settings.calls_per_step:
                one.refuse(Refused(f"Not made: at most {settings.calls_per_step} calls are made at once."))
            elif self._made >= settings.calls_per_reply:
                one.refuse(Refused(f"Not made: a reply makes at most {settings.calls_per_reply} calls."))
            self._made += 1
            begun.append(one)
            asked.append(ToolCallPart(call.call_id, call.name, kept or {}, call.state))
        await self._settle(begun)
        results = [
            ToolResultPart(call.call_id, call.name, orjson.dumps(one.output).decode(), failed=one.state != "done")
            for call, one in zip(calls, begun, strict=True)
        ]
        return [
            ModelMessage("assistant", (*said, *asked)),
            *(ModelMessage("tool", (result,)) for result in results),
        ]

    async def settle(self) -> None:
        """See to the calls that a lost process left: one that may have been made is repeated only if that is safe.

        One whose `running` was never committed was not made. One that waited for a yes waits on; a yes that was given
        meanwhile counts.
        """
        left: list[_Call] = []
        for index, part in self._draft.unsettled():
            if part["state"] == "running" and not self._box.is_idempotent(part["name"]):
                self._draft.tool_ended(index, state="unknown", output=UNKNOWN)
                continue
            shown = part["state"] == "approval"
            left.append(_Call(index, UUID(part["call"]), part["name"], part["input"], was_shown=shown))
        await self._settle(left)

    async def _settle(self, calls: Sequence[_Call]) -> None:
        for call in calls:
            if call.output is None:
                self._prepare(call)
        await self._ask([call for call in calls if call.asks])
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(self._see_to(call))

    def _prepare(self, call: _Call) -> None:
        try:
            call.prepared = self._box.prepare(
                self._run.scope, call.name, call.arguments, names=self._names, raw=call.raw
            )
        except Refused as refused:
            call.refuse(refused)
        else:
            call.asks = call.was_shown or self._profile.asks(call.prepared.tool)

    async def _ask(self, calls: Sequence[_Call]) -> None:
        """Have calls wait: all of them are shown together, however long each takes."""
        if not calls:
            return
        await self._runs.approvals.ask(self._run, [Asked(call.id, call.name, call.arguments or {}) for call in calls])
        for call in calls:
            if not call.was_shown:
                self._draft.tool_waiting(call.index)

    async def _see_to(self, call: _Call) -> None:
        if call.output is None:
            try:
                call.state, call.output = await self._made_of(call)
            except Refused as refused:
                call.refuse(refused)
        assert call.output is not None
        self._draft.tool_ended(call.index, state=call.state, output=call.output)

    async def _made_of(self, call: _Call) -> tuple[str, Output]:
        assert call.prepared is not None
        prepared = await self._approved(call) if call.asks else call.prepared
        self._busy += 1
        try:
            if not prepared.tool.side_effects:
                return await self._in_time(call, prepared)
            async with self._writes:
                return await self._in_time(call, prepared)
        finally:
            self._busy -= 1

    async def _approved(self, call: _Call) -> Prepared:
        """Return a call as it was approved: with the arguments that were shown, or not at all."""
        try:
            answer = await self._runs.approvals.answer(self._run, call.id, busy=lambda: self._busy > 0)
        except ToolCallNotFound:
            raise Refused("Nobody can approve this call any more. It was not made.") from None
        if not answer.approved or answer.arguments is None:
            raise Refused(answer.reason)
        if fingerprint(answer.arguments) != fingerprint(call.arguments or {}):
            raise Refused("The arguments are not the ones that were approved. The call was not made.")
        return self._box.prepare(self._run.scope, call.name, answer.arguments, names=self._names)

    async def _in_time(self, call: _Call, prepared: Prepared) -> tuple[str, Output]:
        async with self._slots:
            left_s = self._settings.tools_timeout_s - self._used_s
            if left_s <= 0:
                raise Refused(
                    f"Not made: the tools of this reply have used their {self._settings.tools_timeout_s:g} s."
                )
            scope = await self._scope_for(prepared)
            await self._draft.tool_running(call.index)
            if self._run.lost or self._run.cancelled:
                # It may be that nothing of it was committed: the reply is another process's, or nobody's.
                raise asyncio.CancelledError
            began = time.monotonic()
            try:
                return await self._box.call(scope, prepared, timeout_s=left_s)
            finally:
                self._used_s += time.monotonic() - began

    async def _scope_for(self, prepared: Prepared) -> Scope:
        """Return whoever asked, with the rights that they have at this moment."""
        try:
            scope = await self._runs.rights.now(self._run.scope)
        except Unauthenticated:
            raise Refused("Whoever asked may not do this any more.") from None
        except Exception as error:
            if (known := translate(error)) is None:
                raise
            raise Refused(known.detail) from None
        allow(scope, prepared.tool)
        return scope
