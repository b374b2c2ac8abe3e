"""Calls models and counts what the calls use."""

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from uuid import UUID

import httpx

from parley.core.scope import Scope
from parley.llm.breaker import BreakerLimits, HealthBoard
from parley.llm.candidates import Candidates
from parley.llm.errors import ModelNotUsable, ReattachRefused, UnknownModel
from parley.llm.factory import build_model
from parley.llm.ports import ChatModel, ModelRequest, Reattachable
from parley.llm.provider_keys import ProviderKeys
from parley.llm.registry import ModelEntry, ModelRegistry
from parley.llm.retry import Candidate, stream_with_retries
from parley.usage.accounts import Accounts
from parley.usage.calls import ModelCall, StreamItem, Tally
from parley.usage.ledger import Purpose
from parley.usage.metering import MeteredCall
from parley.usage.pricing import cost_of

__all__ = ["ModelCall", "StreamItem", "Tally", "UsageService", "cost_of"]


class UsageService:
    """The way to the models. Built once per process from the registry and the shared HTTP client.

    `accounts` is where calls are reserved and settled; without one, `metered` cannot be used. `keys` are workspaces'
    own, `guarded` the client that asks the URLs which come with them.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        http: httpx.AsyncClient,
        accounts: Accounts | None = None,
        *,
        breaker: BreakerLimits | None = None,
        keys: ProviderKeys | None = None,
        guarded: httpx.AsyncClient | None = None,
    ) -> None:
        self.registry = registry
        self.accounts = accounts
        self._http, self._guarded, self._keys = http, guarded, keys
        self.health = HealthBoard(breaker)
        """How the providers are doing, as this process sees it."""
        registry.paused = lambda entry: self.health.pause_s(entry.provider, entry.owner)
        self._candidates = Candidates(registry, self._build, self.health)

    def stream(
        self, request: ModelRequest, model: str | None = None, *, scope: Scope | None = None, resets: bool = False
    ) -> ModelCall:
        """Start a call of a model or alias; None means the alias `default`. Nothing is sent before it is iterated.

        Whoever calls this stores the call's `records`; `metered` does all of it. `scope` is whose workspace's keys are
        used, `resets` whether the reader can take back what it has shown. A request with a prefill goes to that model,
        and to those of its fallbacks that can go on from one. Raises `UnknownModel` and `ModelNotUsable` here, the
        latter also for a prefill that the model cannot go on from, and a `ModelError` while the items are read.
        """
        chosen = self._candidates.choose(request, model, self.models(scope))
        candidates = [self._candidates.of(entry) for entry in chosen]
        return ModelCall.streaming(candidates, request, partial(_ask, resets=resets))

    def metered(
        self,
        scope: Scope,
        request: ModelRequest,
        model: str | None = None,
        *,
        purpose: Purpose,
        conversation_id: UUID | None = None,
        message_id: UUID | None = None,
        resets: bool = False,
    ) -> MeteredCall:
        """Call a model within the budgets: `async with usage.metered(...) as call`, then as with `stream`.

        Entering reserves what the call costs at most, in a transaction of its own, before anything is sent; leaving
        stores the call's records and settles, however it is left. Raises what `stream` raises here, `OverBudget` on
        entering. Not for replies of the chat, which are reserved with the question.
        """
        if self.accounts is None:
            raise RuntimeError("this process keeps no ledger")
        call = self.stream(request, model, scope=scope, resets=resets)
        return MeteredCall(
            self.accounts, scope, call, request, purpose=purpose, conversation_id=conversation_id, message_id=message_id
        )

    def reattach(
        self, request: ModelRequest, model_id: str, cursor: str, *, said: str, scope: Scope | None = None
    ) -> ModelCall:
        """Read on where an earlier call of a model was left, from a `CursorChunk` of that call.

        `request` is what that call asked; `said` is the visible text of its answer that has been kept, which may reach
        beyond the cursor. The items are what follows `said`, without an `AttemptStarted`: what came before still
        holds. It is one attempt, of this model alone. The tally counts the answer from its beginning.

        Raises `ReattachRefused` here when there is no such model any more or it cannot do this, and when the items are
        read, before the first of them, when the provider no longer has the answer; other `ModelError`s as `stream`.
        """
        try:
            entry = self.models(scope).resolve(model_id)
        except (UnknownModel, ModelNotUsable):
            raise ReattachRefused from None
        candidate = self._candidates.of(entry)
        model = candidate.model
        if entry.id != model_id or not isinstance(model, Reattachable):
            raise ReattachRefused
        return ModelCall.reading_on(
            candidate.entry, request, lambda own: model.reattach(own, cursor, said=said), said=said
        )

    def can_prefill(self, model_id: str, *, scope: Scope | None = None) -> bool:
        """Return whether this very model, not an alias, can be called now and given the beginning of its answer."""
        try:
            entry = self.models(scope).resolve(model_id)
        except (UnknownModel, ModelNotUsable):
            return False
        return entry.id == model_id and entry.prefill is not None

    def models(self, scope: Scope | None) -> ModelRegistry:
        """Return the models as the scope's workspace may call them: some by keys of its own. Reads no database."""
        if scope is None or self._keys is None:
            return self.registry
        return self._keys.registry_for(scope.workspace_id, self.registry)

    def _build(self, entry: ModelEntry) -> ChatModel:
        if not entry.guarded:
            return build_model(entry, self._http)
        if self._guarded is None:
            raise RuntimeError("a workspace's own URL, and no guarded client to ask it with")
        return build_model(entry, self._guarded)


def _ask(candidates: Sequence[Candidate], request: ModelRequest, *, resets: bool) -> AsyncGenerator[StreamItem]:
    return stream_with_retries(candidates, request, resets=resets)
