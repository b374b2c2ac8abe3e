"""What the dialect needs of the models: which there are, and calls of them."""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from parley.core import clock
from parley.core.scope import Scope
from parley.dialect import requests
from parley.dialect.errors import ModelAbsent
from parley.dialect.images import Images
from parley.dialect.running import RunningCalls
from parley.dialect.schemas import ChatCompletionCreate
from parley.llm.errors import ModelNotUsable, UnknownModel
from parley.llm.registry import ModelRegistry
from parley.usage.ledger import Purpose
from parley.usage.metering import MeteredCall
from parley.usage.service import UsageService

_OURS = "parley"
# Above this, decoding and checking a body holds up everyone else's deltas.
_LARGE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that holds, and the call that answers it. Nothing has been sent yet."""

    wanted: ChatCompletionCreate
    call: MeteredCall
    model: str


class Dialect:
    """The models as OpenAI's clients see them."""

    def __init__(self, usage: UsageService, running: RunningCalls, images: Images) -> None:
        self._usage = usage
        self._images = images
        self.running = running
        self._created = int(clock.timestamp())

    def models(self, scope: Scope) -> list[dict[str, Any]]:
        """Return the models and aliases that the caller's workspace can call now, aliases first."""
        registry = self._usage.models(scope)
        found = [self._model(alias, _OURS) for alias in registry.aliases if _usable(registry, alias)]
        return found + [self._model(entry.id, entry.provider) for entry in registry.entries() if entry.usable]

    def model(self, scope: Scope, id: str) -> dict[str, Any]:
        """Return one of them. Raises `ModelAbsent`."""
        found = next((model for model in self.models(scope) if model["id"] == id), None)
        if found is None:
            raise ModelAbsent
        return found

    async def ask(self, scope: Scope, body: bytes) -> Asked:
        """Read a request and prepare its call.

        Raises `BadRequest`, `RequestInvalid`, `UnknownModel` and `ModelNotUsable`.
        """
        registry = self._usage.models(scope)
        large = len(body) > _LARGE_BYTES
        wanted = await asyncio.to_thread(requests.read, body) if large else requests.read(body)
        entry = registry.resolve(wanted.model)
        images = await self._images.fetch(requests.addresses_of_images(wanted, entry))
        to_model = partial(requests.to_model, wanted, entry, registry.fallbacks(entry), images)
        request = await asyncio.to_thread(to_model) if large else to_model()
        call = self._usage.metered(scope, request, entry.id, purpose=Purpose.DIALECT)
        return Asked(wanted, call, entry.id)

    def _model(self, id: str, owner: str) -> dict[str, Any]:
        return {"id": id, "object": "model", "created": self._created, "owned_by": owner}


def _usable(registry: ModelRegistry, name: str) -> bool:
    try:
        registry.resolve(name)
    except (UnknownModel, ModelNotUsable):
        return False
    return True
