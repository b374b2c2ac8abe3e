"""How the providers are doing, for whoever looks after them."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field

from parley.llm.breaker import BreakerState, HealthBoard, ProviderHealth
from parley.llm.registry import ModelRegistry, ProviderKind


class LastError(BaseModel):
    """The newest failure, as its code: nothing that a provider said is kept."""

    code: str
    at: datetime


class ProviderRead(BaseModel):
    """A provider, as the process that answers has seen it since it began."""

    id: str
    kind: ProviderKind
    usable: bool
    reason: str | None = Field(description="Why it cannot be called now")
    own_key: bool = Field(description="Whether this is of the calls with the workspace's own key")
    state: BreakerState = Field(
        description="closed: asked; open: left alone after failures; half_open: one call decides"
    )
    retry_in_s: float | None = Field(description="For how long it is left alone")
    calls: int = Field(description="Attempts")
    failures: dict[str, int] = Field(description="Failed attempts by code")
    last_error: LastError | None
    first_token_p50_ms: float | None = Field(description="The median of the newest: from asking to the first piece")


def provider_reads(registry: ModelRegistry, board: HealthBoard, workspace_id: UUID) -> list[ProviderRead]:
    """Describe every provider of the registry; twice one that the workspace has called with a key of its own."""
    reasons = {entry.provider: entry.unusable for entry in registry.entries()}
    found = []
    for name, kind in registry.providers.items():
        found.append(_read(name, kind, reasons.get(name), board.find(name), own_key=False))
        if (own := board.find(name, workspace_id)) is not None:
            found.append(_read(name, kind, None, own, own_key=True))
    return found


def _read(
    id: str, kind: ProviderKind, reason: str | None, health: ProviderHealth | None, *, own_key: bool
) -> ProviderRead:
    health = health or ProviderHealth(id)
    pause_s = health.pause_s()
    if reason is None and pause_s is not None:
        reason = "it has failed repeatedly"
    p50_s = health.first_token_p50_s
    return ProviderRead(
        id=id,
        kind=kind,
        usable=reason is None,
        reason=reason,
        own_key=own_key,
        state=health.state,
        retry_in_s=None if pause_s is None else round(pause_s, 1),
        calls=health.calls,
        failures=dict(health.errors),
        last_error=_last_error(health.last_error, health.last_error_at),
        first_token_p50_ms=None if p50_s is None else round(p50_s * 1000, 1),
    )


def _last_error(code: str | None, at: datetime | None) -> LastError | None:
    return None if code is None or at is None else LastError(code=code, at=at)
