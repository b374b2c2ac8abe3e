"""Who pays for what: the terms in which calls are reserved and settled."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Self
from uuid import UUID

from parley.core import clock
from parley.core.scope import Scope
from parley.llm.estimates import byte_tokens, request_tokens
from parley.llm.ports import ModelRequest, UsageChunk
from parley.llm.registry import ModelEntry
from parley.usage.ledger import CallRecord, CallStatus, Purpose
from parley.usage.pricing import cost_of, images_of, worst_case

# What is said to a model besides the conversation: instructions, and descriptions of tools.
_UNSEEN_TOKENS = 8_000
_OUTPUT_TOKENS = ModelRequest(messages=()).max_output_tokens


@dataclass(frozen=True, slots=True)
class Bill:
    """What some calls are paid as. `id` is that of the reservation: the reply's id, or the call's own."""

    id: UUID
    workspace_id: UUID
    user_id: UUID | None
    key_id: UUID | None
    purpose: Purpose
    conversation_id: UUID | None = None
    message_id: UUID | None = None

    @classmethod
    def of(
        cls,
        id: UUID,
        scope: Scope,
        purpose: Purpose,
        *,
        conversation_id: UUID | None = None,
        message_id: UUID | None = None,
    ) -> Self:
        """Return the bill of a scope's user and API key."""
        return cls(id, scope.workspace_id, scope.user_id, scope.key_id, purpose, conversation_id, message_id)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call may cost: `amount` at most, `input_cost` if it is lost after it was sent.

    `own_key`: the first of the models is paid by the workspace, `by_operator`: one that may answer is by the operator.
    """

    model: str
    provider: str
    amount: Decimal
    input_tokens: int
    input_cost: Decimal
    own_key: bool = False
    by_operator: bool = True

    @classmethod
    def of_tokens(
        cls, entries: Sequence[ModelEntry], *, input_tokens: int, output_tokens: int, images: int = 0
    ) -> Self:
        """Estimate a call of the first of these models, which another of them may answer."""
        first = entries[0]
        return cls(
            model=first.id,
            provider=first.provider,
            amount=worst_case(entries, input_tokens=input_tokens, output_tokens=output_tokens, images=images),
            input_tokens=input_tokens,
            input_cost=cost_of(first, UsageChunk(input_tokens=input_tokens), images=images),
            own_key=first.own_key,
            by_operator=not all(entry.own_key for entry in entries),
        )

    @classmethod
    def of_request(cls, entries: Sequence[ModelEntry], request: ModelRequest) -> Self:
        """Estimate a call whose request is known."""
        return cls.of_tokens(
            entries,
            input_tokens=request_tokens(request),
            output_tokens=request.max_output_tokens,
            images=images_of(request),
        )

    @classmethod
    def of_bytes(cls, entries: Sequence[ModelEntry], size: int) -> Self:
        """Estimate a call of which only the size of the conversation is known, in bytes."""
        # What does not fit into a context is left out.
        tokens = min(byte_tokens(size) + _UNSEEN_TOKENS, _longest(entries))
        return cls.of_tokens(entries, input_tokens=tokens, output_tokens=_OUTPUT_TOKENS)

    @classmethod
    def of_full_context(cls, entries: Sequence[ModelEntry], *, images: int) -> Self:
        """Estimate a call of which nothing is known but how many images it has at most."""
        return cls.of_tokens(entries, input_tokens=_longest(entries), output_tokens=_OUTPUT_TOKENS, images=images)


def _longest(entries: Sequence[ModelEntry]) -> int:
    return max(entry.context for entry in entries)


def lost_record(
    id: UUID,
    *,
    model: str,
    provider: str,
    input_tokens: int,
    cost: Decimal,
    own_key: bool,
    output_tokens: int = 0,
    attempt: int = 1,
    started_at: datetime | None = None,
) -> CallRecord:
    """Return the record of an attempt whose process is gone: nobody knows what it used, so it is a guess."""
    return CallRecord(
        id=id,
        model=model,
        provider=provider,
        attempt=attempt,
        status=CallStatus.LOST,
        error="worker_lost",
        input_tokens=input_tokens,
        cached_tokens=0,
        output_tokens=output_tokens,
        images=0,
        estimated=True,
        own_key=own_key,
        cost=cost,
        started_at=started_at or clock.now(),
        ended_at=clock.now(),
    )
