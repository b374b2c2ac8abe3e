"""Puts the chat together. The shell calls it once per process."""

from collections.abc import Iterable
from dataclasses import dataclass

from parley.chat.background import ReplySweep
from parley.chat.generation import Generator
from parley.chat.socket import ChatFrames
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
from parley.tenancy.permissions import Permission
from parley.usage.service import UsageService


@dataclass
class Chat:
    """The chat of one process."""

    turns: Turns
    generator: Generator
    sweep: ReplySweep
    registry: ModelRegistry
    tools: ToolBox
    writer: TickWriter

    @property
    def frame_handlers(self) -> dict[str, FrameHandler]:
        """What the socket calls for the chat's frames."""
        handlers = ChatFrames(self.turns, self.tools)
        return {
            "chat.send": FrameHandler(Permission.CHAT_WRITE, handlers.send),
            "reply.cancel": FrameHandler(Permission.CHAT_WRITE, handlers.cancel),
        }

    async def start(self) -> None:
        """Take the process's lock, end what a former process left open, then begin."""
        await self.writer.start()
        await self.sweep.sweep()
        self.sweep.start()

    async def close(self, *, drain_s: float) -> None:
        """Let running replies end, then stop."""
        await self.sweep.close()
        await self.generator.close(drain_s=drain_s)
        await self.writer.close()


def build_chat(
    *,
    database: Database,
    bus: Bus,
    usage: UsageService,
    prompts: PromptLibrary,
    tools: Iterable[Tool],
    settings: Settings,
    limits: ApiLimits,
) -> Chat:
    """Build the chat."""
    writer = TickWriter(database, bus, settings.realtime)
    turns = Turns(database, bus, writer, usage.registry, settings.realtime, limits)
    box = ToolBox(tools, database=database, publisher=bus, timeout_s=settings.llm.tool_timeout_s)
    generator = Generator(
        database=database, turns=turns, writer=writer, usage=usage, prompts=prompts, tools=box, settings=settings.llm
    )
    turns.on_started = generator.start
    return Chat(
        turns=turns,
        generator=generator,
        sweep=ReplySweep(database, turns, writer),
        registry=usage.registry,
        tools=box,
        writer=writer,
    )
