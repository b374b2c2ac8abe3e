"""Which models are asked for a call: the one that was named, then its fallbacks, each with its provider's health."""

from collections import OrderedDict
from collections.abc import Callable

from parley.llm.breaker import HealthBoard
from parley.llm.errors import ModelNotUsable
from parley.llm.estimates import can_take
from parley.llm.ports import ChatModel, ModelRequest
from parley.llm.registry import ModelEntry, ModelRegistry
from parley.llm.retry import Candidate

_MOST = 4096


class Candidates:
    """The models of a registry, made once each, also when the registry is read anew."""

    def __init__(self, registry: ModelRegistry, build: Callable[[ModelEntry], ChatModel], health: HealthBoard) -> None:
        self._registry = registry
        self._build = build
        self._health = health
        self._made: OrderedDict[tuple[str, object], Candidate] = OrderedDict()

    def choose(
        self, request: ModelRequest, model: str | None, registry: ModelRegistry | None = None
    ) -> list[ModelEntry]:
        """Return who is asked, in order. Raises `UnknownModel` and `ModelNotUsable`.

        `registry` holds the models as the caller's workspace may call them, None means the operator's.

        A request with a prefill goes to models that can go on from one: others would begin anew. A fallback that
        cannot be given the request's images, or whose context it does not fit into, is left out.
        """
        registry = registry or self._registry
        entry = registry.resolve(model)
        fallbacks = [other for other in registry.fallbacks(entry) if can_take(other, request)]
        if request.prefill:
            if entry.prefill is None:
                raise ModelNotUsable(f"The model {entry.id} cannot go on with an answer that another call began.")
            fallbacks = [other for other in fallbacks if other.prefill is not None]
        return [entry, *fallbacks]

    def of(self, entry: ModelEntry) -> Candidate:
        """Return the candidate for an entry.

        Calls that run keep the candidate that they have when the entry is another one from now on.
        """
        key = (entry.id, entry.owner)
        found = self._made.get(key)
        if found is None or found.entry is not entry:
            found = Candidate(entry, self._build(entry), self._health.of(entry.provider, entry.owner))
            self._made[key] = found
            while len(self._made) > _MOST:
                self._made.popitem(last=False)
        return found
