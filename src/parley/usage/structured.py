"""Asks a model for an object of a Pydantic type, and again when what it says is none."""

import logging
import re
from dataclasses import replace
from uuid import UUID

import orjson
from pydantic import BaseModel

from parley.core.scope import Scope
from parley.llm.errors import BadOutput, ContentFiltered
from parley.llm.ports import (
    AttemptStarted,
    Finish,
    FinishReason,
    JsonSchema,
    ModelMessage,
    ModelRequest,
    TextChunk,
    TextPart,
)
from parley.llm.prompts import PromptLibrary
from parley.llm.schemas import takes_schema
from parley.usage.ledger import Purpose
from parley.usage.metering import MeteredCall
from parley.usage.service import UsageService
from parley.usage.structured_text import Problems, read_instance

logger = logging.getLogger(__name__)

MAX_REPAIRS = 2
MAX_CHARS = 1_000_000


class StructuredOutputInvalid(BadOutput):
    """The model did not give an object of the wanted form, however often it was told what was wrong.

    `details` has `problems`, those of its last answer, `attempts`, and `truncated`: whether that answer was cut off.
    """

    message = "The model did not answer in the form that was asked for."
    retryable = False


async def structured[T: BaseModel](
    usage: UsageService,
    scope: Scope,
    request: ModelRequest,
    schema: type[T],
    model: str | None = None,
    *,
    prompts: PromptLibrary,
    purpose: Purpose = Purpose.STRUCTURED,
    conversation_id: UUID | None = None,
) -> T:
    """Ask a model and return its answer as an instance of `schema`.

    A model that can be given a JSON schema is given it; one that cannot is told of it in words (the prompt
    `structured`). An answer that is no instance is sent back with what is wrong with it, at most `MAX_REPAIRS` times,
    each a call of its own within the budgets and in the ledger. The request's tools, stop texts and prefill are left
    out: they have no place in such an answer.

    Raises `StructuredOutputInvalid` after the last of them, and at once for an answer that was cut off at its bound:
    it would be cut off again. Raises `ContentFiltered` when the model refuses, which nothing repairs, and otherwise
    what `UsageService.metered` and its calls raise, `OverBudget` among it.
    """
    wanted = JsonSchema(re.sub(r"[^A-Za-z0-9_-]", "_", schema.__name__)[:64], schema.model_json_schema())
    asked = replace(
        request, response_schema=wanted, tools=(), tool_choice=None, parallel_tools=None, stop=(), prefill=None
    )
    # Whoever may answer has to know: a fallback may be less able than the model that was named.
    registry = usage.models(scope)
    entry = registry.resolve(model)
    if not all(takes_schema(one, wanted) for one in (entry, *registry.fallbacks(entry))):
        told = prompts.render("structured", schema=orjson.dumps(wanted.schema).decode())
        asked = replace(asked, messages=_with_system(asked.messages, told.text))
    attempt = 0
    while True:
        attempt += 1
        call = usage.metered(scope, asked, model, purpose=purpose, conversation_id=conversation_id, resets=True)
        text, reason = await _answer(call)
        if reason is FinishReason.CONTENT_FILTER:
            raise ContentFiltered
        found = read_instance(text, schema)
        if not isinstance(found, Problems):
            return found
        truncated = reason is FinishReason.LENGTH
        logger.warning("An answer is no %s (attempt %d, truncated: %s)", wanted.name, attempt, truncated)
        if truncated or attempt > MAX_REPAIRS:
            raise _invalid(found, attempts=attempt, truncated=truncated)
        repair = prompts.render("structured_repair", problems=found.lines)
        asked = replace(
            asked,
            messages=(
                *asked.messages,
                # A model that said nothing cannot be told that it did: the API takes no empty message.
                *((ModelMessage("assistant", (TextPart(text),)),) if text.strip() else ()),
                ModelMessage("user", (TextPart(repair.text),)),
            ),
        )


async def _answer(call: MeteredCall) -> tuple[str, FinishReason]:
    said: list[str] = []
    chars = 0
    reason = FinishReason.STOP
    async with call as items:
        async for item in items:
            match item:
                case TextChunk(text=text):
                    chars += len(text)
                    if chars > MAX_CHARS:
                        raise BadOutput
                    said.append(text)
                case AttemptStarted(continues=False):
                    said.clear()
                    chars = 0
                case Finish():
                    reason = item.reason
    return "".join(said), reason


def _with_system(messages: tuple[ModelMessage, ...], text: str) -> tuple[ModelMessage, ...]:
    """Put a text into the first system message: not every model takes two."""
    part = TextPart(text)
    if messages and messages[0].role == "system":
        return (replace(messages[0], parts=(*messages[0].parts, part)), *messages[1:])
    return (ModelMessage("system", (part,)), *messages)


def _invalid(problems: Problems, *, attempts: int, truncated: bool) -> StructuredOutputInvalid:
    message = "The model's answer was cut off before it was whole." if truncated else None
    details = {"problems": list(problems.lines), "attempts": attempts, "truncated": truncated}
    return StructuredOutputInvalid(message, details=details)
