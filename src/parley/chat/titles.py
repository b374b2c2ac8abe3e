"""Titles that a model finds: one try per conversation, after its first whole reply, and never in place of a person's.

Until then, and wherever there is no model for it or no budget, the title is the first words of the first message.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

import orjson

from parley.chat.inbox import tell_owner
from parley.chat.messages import first_words
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.core.db import Database, UnitOfWork
from parley.core.errors import AppError
from parley.core.scope import Role, Scope
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobRun
from parley.llm.ports import ModelMessage, ModelRequest, TextChunk, TextPart
from parley.llm.prompts import PromptLibrary
from parley.realtime.bus import Bus
from parley.realtime.runs import Run
from parley.usage.ledger import Purpose
from parley.usage.service import UsageService

logger = logging.getLogger(__name__)

TITLE = "title"

_MODEL = "fast"
# A model that thinks needs room for that before it says anything.
_OUTPUT_TOKENS = 1024
_SHOWN_CHARACTERS = 2000
_AROUND = " \t\"'`*_#.:;,-–—“”„«»‘’"


class Titles:
    """Asks for titles and makes them."""

    def __init__(
        self, *, database: Database, bus: Bus, usage: UsageService, prompts: PromptLibrary, enabled: bool
    ) -> None:
        self._database = database
        self._bus = bus
        self._usage = usage
        self._prompts = prompts
        self._enabled = enabled

    async def want(self, unit: UnitOfWork, run: Run, reply: Mapping[str, Any]) -> None:
        """Have a title found if this reply, which is whole, is a conversation's first. In the transaction of its end.

        `reply` is its row, with the conversation's `title_by`.
        """
        if not self._enabled or reply["title_by"] is not None or not self._can_name(run.scope):
            return
        key = run.scope.key_id
        await enqueue(
            unit,
            TITLE,
            {
                "conversation": str(reply["conversation_id"]),
                "reply": str(run.reply_id),
                "key": None if key is None else str(key),
            },
            workspace_id=run.scope.workspace_id,
            user_id=run.scope.user_id,
            dedupe_key=f"{TITLE}:{reply['conversation_id']}",
            max_attempts=3,
        )

    def _can_name(self, scope: Scope) -> bool:
        try:
            # The demo model would only repeat what was said: the first words do that as well.
            return self._usage.models(scope).resolve(_MODEL).kind != "demo"
        except AppError:
            return False

    async def make(self, job: JobRun) -> dict[str, Any] | None:
        """Find a conversation's title and give it that one. Doing it twice costs a call and changes nothing."""
        if job.user_id is None:
            return None
        conversation_id, key = UUID(job.payload["conversation"]), job.payload["key"]
        # The one who asked pays for it, out of the same budgets.
        scope = Scope(
            job.workspace_id, job.user_id, Role.VIEWER, subject=str(job.user_id), key_id=UUID(key) if key else None
        )
        async with self._database.unit_of_work(scope) as unit:
            conversation = await ConversationRepository(unit, scope).find(conversation_id)
            if conversation is None or conversation["title_by"] is not None:
                return None
            shown = await MessageRepository(unit, scope).opening(conversation_id, UUID(job.payload["reply"]))
        if shown is None:
            return None
        first, question, answer = (_text(parts) for parts in shown)
        before: str | None = conversation["title"]
        title = None
        # A process of a version that does not say who set a title may have made this one: then it is a person's.
        if before in {None, first_words(first)}:
            title = await self._find(scope, conversation_id, question, answer)
        async with self._database.unit_of_work(scope) as unit:
            row = await ConversationRepository(unit, scope).name(conversation_id, title, before=before)
            if row is not None and title is not None:
                await tell_owner(unit, self._bus, row, readers=True)
        return None

    async def _find(self, scope: Scope, conversation_id: UUID, question: str, answer: str) -> str | None:
        shown = {"user": question[:_SHOWN_CHARACTERS], "assistant": answer[:_SHOWN_CHARACTERS]}
        request = ModelRequest(
            messages=(
                ModelMessage("system", (TextPart(self._prompts.render("chat/title").text),)),
                ModelMessage("user", (TextPart(orjson.dumps(shown).decode()),)),
            ),
            max_output_tokens=_OUTPUT_TOKENS,
        )
        try:
            call = self._usage.metered(scope, request, _MODEL, purpose=Purpose.TITLE, conversation_id=conversation_id)
            async with call as items:
                said = [item.text async for item in items if isinstance(item, TextChunk)]
        except AppError as error:
            # No model, no budget, or a provider that fails although it was asked again: nobody waits for a title.
            logger.info("no title was found", extra={"cause": error.code})
            return None
        return tidy("".join(said))


def tidy(said: str) -> str | None:
    """Return what a model said as a title: one line of at most 60 characters, or None where nothing is left."""
    line = next((line for line in said.splitlines() if line.strip(_AROUND)), "")
    line = "".join(character for character in " ".join(line.split()) if character.isprintable()).strip(_AROUND)
    return first_words(re.sub(r"^(title|titel|titre|título)\s*:", "", line, flags=re.IGNORECASE).strip(_AROUND))


def _text(parts: Iterable[Mapping[str, Any]]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")
