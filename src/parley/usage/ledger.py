"""What the ledger keeps of a call: one record per attempt at a provider."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID


class Purpose(StrEnum):
    """What a model was asked for."""

    REPLY = "reply"
    TITLE = "title"
    STRUCTURED = "structured"
    MARKING = "marking"
    TRADING = "trading"
    DIALECT = "dialect"
    TOOL = "tool"


class CallStatus(StrEnum):
    """How an attempt ended. `lost`: with its process, so that the counts are a guess."""

    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One attempt at a provider. `id` is the row's key: storing a record twice has one effect.

    `error` is the code of a failed attempt. `estimated`: a count is ours and not the provider's. `own_key`: paid by
    the workspace's own provider key. `cost` is in dollars, to 8 decimals. `input_tokens` has the cached ones too.
    """

    id: UUID
    model: str
    provider: str
    attempt: int
    status: CallStatus
    error: str | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    images: int
    estimated: bool
    own_key: bool
    cost: Decimal
    started_at: datetime
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Totals:
    """A sum over records."""

    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost: Decimal

    @classmethod
    def of(cls, records: Sequence[CallRecord]) -> "Totals":
        """Add records up."""
        return cls(
            sum(record.input_tokens for record in records),
            sum(record.cached_tokens for record in records),
            sum(record.output_tokens for record in records),
            sum((record.cost for record in records), Decimal(0)),
        )

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.cost + other.cost,
        )
