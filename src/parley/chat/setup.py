"""Puts the chat together. The shell calls it once per process."""

from collections.abc import Iterable
from dataclasses import dataclass

from parley.chat.ends import Ends
from parley.chat.generation import Generator
from parley.chat.socket import ChatFrames
from parley.chat.take_over import TakeOver
from parley.chat.tools import ToolBox
from parley.chat.turns import Turns
from parley.core.api_limits import ApiLimits
from parley.core.db import Database
from parley.core.settings import Settings
from parley.llm.prompts import PromptLibrary
from parley.llm.registry import ModelRegistry
from parley.llm.tools import Tool
from parley.realtime.bus import Bus
from parley.realtime.service import FrameHandler
from parley.realtime.tick import TickWriter
from parley.realtime.wire import Wire
from parley.tenancy.permissions import Permission
from parley.usage.service import UsageService


@dataclass
class Chat:
    """The chat of one process. One that only serves sockets has no `take_over`: others generate for it."""

    turns: Turns
    ends: Ends
    generator: Generator
    take_over: TakeOver | None
    registry: ModelRegistry
    tools: ToolBox
    writer: TickWriter
    wire: Wire

    @property
    def frame_handlers(self) -> dict[str, FrameHandler]:
        """What the socket calls for the chat's frames."""
        handlers = ChatFrames(self.turns, self.ends, self.tools)
        return {
            "chat.send": FrameHandler(Permission.CHAT_WRITE, handlers.send),
            "reply.cancel": FrameHandler(Permission.CHAT_WRITE, handlers.cancel),
            "reply.continue": FrameHandler(Permission.CHAT_WRITE, handlers.continue_),
            "reply.regenerate": FrameHandler(Permission.CHAT_WRITE, handlers.regenerate),
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
) -> Chat:
    """Build the chat."""
    writer = TickWriter(database, bus, settings.realtime)
    generates = settings.role != "web"
    ends = Ends(database, bus, writer)
    turns = Turns(database, bus, writer, usage.registry, settings.realtime, limits, ends, generates=generates)
    box = ToolBox(tools, database=database, publisher=bus, timeout_s=settings.llm.tool_timeout_s)
    generator = Generator(
        database=database,
        turns=turns,
        ends=ends,
        writer=writer,
        usage=usage,
        prompts=prompts,
        tools=box,
        settings=settings.llm,
    )
    turns.on_started = generator.start
    bus.on_call["cancel"] = ends.cancel_here

    def counted(processes: int) -> None:
        # Whoever only serves sockets is counted too: every process holds a lock.
        wire.alone = processes <= 1

    return Chat(
        turns=turns,
        ends=ends,
        generator=generator,
        take_over=TakeOver(database, turns, writer, bus, counted=counted) if generates else None,
        registry=usage.registry,
        tools=box,
        writer=writer,
        wire=wire,
    )
