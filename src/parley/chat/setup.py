"""Puts the chat together. The shell calls it once per process."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from parley.chat.approvals.service import WORD, Approvals
from parley.chat.assistants.service import Assistants
from parley.chat.attachments.service import AttachmentService
from parley.chat.branches import Branches
from parley.chat.ends import Ends
from parley.chat.generation import Generator
from parley.chat.payments import Payments
from parley.chat.rights import Rights
from parley.chat.socket import ChatFrames
from parley.chat.take_over import TakeOver
from parley.chat.titles import Titles
from parley.chat.tool_runs import ToolRuns
from parley.chat.tools import ToolBox
from parley.chat.turns import Turns
from parley.core.api_limits import ApiLimits
from parley.core.db import Database
from parley.core.scope import Authenticator, Scope
from parley.core.settings import Settings
from parley.llm.prompts import PromptLibrary
from parley.llm.registry import ModelRegistry
from parley.llm.tools import Tool
from parley.realtime.bus import Bus
from parley.realtime.service import FrameHandler
from parley.realtime.tick import TickWriter
from parley.realtime.wire import Wire
from parley.tenancy.permissions import Permission
from parley.usage.accounts import Accounts
from parley.usage.service import UsageService


@dataclass
class Chat:
    """The chat of one process. One that only serves sockets has no `take_over`: others generate for it."""

    turns: Turns
    branches: Branches
    titles: Titles
    ends: Ends
    generator: Generator
    take_over: TakeOver | None
    models: Callable[[Scope], ModelRegistry]
    """The models as a scope's workspace may call them."""
    tools: ToolBox
    approvals: Approvals
    assistants: Assistants
    writer: TickWriter
    wire: Wire

    @property
    def frame_handlers(self) -> dict[str, FrameHandler]:
        """What the socket calls for the chat's frames."""
        handlers = ChatFrames(self.turns, self.ends, self.tools, self.approvals)
        return {
            "chat.send": FrameHandler(Permission.CHAT_WRITE, handlers.send),
            "reply.cancel": FrameHandler(Permission.CHAT_WRITE, handlers.cancel),
            "reply.continue": FrameHandler(Permission.CHAT_WRITE, handlers.continue_),
            "reply.regenerate": FrameHandler(Permission.CHAT_WRITE, handlers.regenerate),
            "tool.approve": FrameHandler(Permission.CHAT_WRITE, handlers.approve),
        }

    async def start(self) -> None:
        """Take the process's lock, see to what a former process left open, then begin."""
        await self.writer.start()
        if self.take_over is not None:
            await self.take_over.sweep()
            self.take_over.start()

    @property
    def running(self) -> int:
        """How many replies this process writes."""
        return self.generator.running

    async def drain(self, drain_s: float) -> None:
        """Begin no more replies, let running ones end for so long, and hand over the rest where another can go on."""
        others = not self.wire.alone
        if self.take_over is not None:
            await self.take_over.close()
        if others:
            self.turns.leave_to_others()
        # Also where nobody is there to take them: whoever starts next does.
        self.approvals.drain()
        await self.generator.close(drain_s=drain_s, hand_over=others)

    async def close(self, *, drain_s: float) -> None:
        """Let running replies end or hand them over, then stop."""
        await self.drain(drain_s)
        await self.writer.close()


def build_chat(
    *,
    database: Database,
    bus: Bus,
    wire: Wire,
    usage: UsageService,
    prompts: PromptLibrary,
    tools: Iterable[Tool],
    settings: Settings,
    limits: ApiLimits,
    authenticator: Authenticator,
    attachments: AttachmentService,
) -> Chat:
    """Build the chat."""
    writer = TickWriter(database, bus, settings.realtime)
    generates = settings.role != "web"
    payments = Payments(database, usage.accounts or Accounts(database), usage.models)
    ends = Ends(database, bus, writer, payments)
    titles = Titles(database=database, bus=bus, usage=usage, prompts=prompts, enabled=settings.llm.titles)
    ends.on_completed = titles.want
    turns = Turns(database, bus, writer, usage.models, settings.realtime, limits, ends, payments, generates=generates)
    box = ToolBox(tools, database=database, publisher=bus, timeout_s=settings.llm.tool_timeout_s)
    approvals = Approvals(database, bus, box, life_s=settings.llm.approval_s)
    assistants = Assistants(database, prompts, usage.models, box.names)
    generator = Generator(
        database=database,
        turns=turns,
        ends=ends,
        writer=writer,
        usage=usage,
        prompts=prompts,
        tool_runs=ToolRuns(box, approvals, Rights(database, authenticator), settings.llm),
        assistants=assistants,
        attachments=attachments,
        payments=payments,
        settings=settings.llm,
    )
    turns.on_started = generator.start
    bus.on_call["cancel"] = ends.cancel_here
    bus.on_call[WORD] = approvals.decided

    def counted(processes: int) -> None:
        # Whoever only serves sockets is counted too: every process holds a lock.
        wire.alone = processes <= 1

    return Chat(
        turns=turns,
        branches=Branches(database, turns),
        titles=titles,
        ends=ends,
        generator=generator,
        take_over=TakeOver(database, turns, writer, bus, counted=counted) if generates else None,
        models=usage.models,
        tools=box,
        approvals=approvals,
        assistants=assistants,
        writer=writer,
        wire=wire,
    )
