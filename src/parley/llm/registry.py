"""The model registry: which models there are, what they cost, and which of them can be called now."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from pydantic import BaseModel, SecretStr

from parley.llm.errors import ModelNotUsable, UnknownModel
from parley.llm.registry_file import SettingsFile, read_settings
from parley.llm.registry_schema import (
    DEFAULT_ALIAS,
    Capability,
    ModelForm,
    PrefillStyle,
    Price,
    ProviderForm,
    ProviderKind,
    Timeouts,
    read_form,
)

__all__ = [
    "DEFAULT_ALIAS", "Capability", "ModelEntry", "ModelInfo", "ModelRegistry", "PrefillStyle", "Price", "ProviderKind",
    "Timeouts",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A configured model with all that is needed to call it."""

    id: str
    provider: str
    kind: ProviderKind
    name: str
    base_url: str = ""
    api_key: SecretStr | None = None
    context: int = 32_768
    max_output_tokens: int = 4_096
    price: Price = field(default_factory=Price)
    capabilities: tuple[Capability, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: int = 2
    fallbacks: tuple[str, ...] = ()
    prefill: PrefillStyle | None = None
    """How it goes on from a given beginning; None when it cannot."""
    unusable: str | None = None
    """Why it cannot be called; None when it can."""
    flavour: str | None = None
    """Which compatible server it is (`parley.llm.flavours`); None when its host tells."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What its provider is sent beside what the adapter sends."""
    background: bool = True
    """Whether OpenAI's Responses API is asked so that an answer goes on without a reader."""
    workspace_keys: bool = True
    """Whether a workspace may have a key of its own for the provider."""
    workspace_urls: bool = False
    """Whether it may have a URL of its own with the key."""
    owner: UUID | None = None
    """The workspace whose key this is; None for the operator's."""
    own_key: bool = False
    """Whether the workspace pays for the calls: by its key, at a server that asks for one or that is its own."""
    guarded: bool = False
    """Whether the URL is a workspace's own: only the guarded client may ask it."""

    @property
    def usable(self) -> bool:
        """Whether its provider has all that the registry says it needs."""
        return self.unusable is None


class ModelInfo(BaseModel):
    """A model as `GET /models` shows it."""

    id: str
    provider: str
    usable: bool
    reason: str | None
    capabilities: list[Capability]


@dataclass(frozen=True, slots=True)
class _Catalogue:
    entries: Mapping[str, ModelEntry]
    aliases: Mapping[str, tuple[str, ...]]
    providers: Mapping[str, ProviderKind]


class ModelRegistry:
    """The models and aliases of a registry file. Hold the registry and not its entries: they can be replaced."""

    def __init__(
        self,
        entries: tuple[ModelEntry, ...],
        aliases: Mapping[str, tuple[str, ...]],
        providers: Mapping[str, ProviderKind] | None = None,
    ) -> None:
        kinds = providers if providers is not None else {entry.provider: entry.kind for entry in entries}
        self._now = _Catalogue({entry.id: entry for entry in entries}, dict(aliases), dict(kinds))
        self.paused: Callable[[ModelEntry], float | None] = lambda _: None
        """For how many seconds a model's provider is left alone because it failed; None when it can be asked."""

    @classmethod
    def load(cls, path: Path, environ: Mapping[str, str]) -> Self:
        """Read and check a registry file. Raises `RegistryInvalid`, which names the line of the first mistake."""
        file = read_settings(path, environ)
        parsed = read_form(file)
        unusable = {name: _why_unusable(file, name, provider) for name, provider in parsed.providers.items()}
        entries = tuple(
            _entry(model_id, model, parsed.providers[model.provider], unusable[model.provider])
            for model_id, model in parsed.models.items()
        )
        return cls(entries, parsed.aliases, {name: provider.kind for name, provider in parsed.providers.items()})

    def replace(self, other: "ModelRegistry") -> None:
        """Have another registry's models and aliases from now on, all at once. Calls that run keep what they have."""
        self._now = other._now

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """The models of each alias."""
        return self._now.aliases

    @property
    def providers(self) -> Mapping[str, ProviderKind]:
        """The kind of each provider, in the order of the file."""
        return self._now.providers

    def entries(self) -> tuple[ModelEntry, ...]:
        """Return every model, usable or not, in the order of the file."""
        return tuple(self._now.entries.values())

    def resolve(self, name: str | None = None) -> ModelEntry:
        """Return the model of that id, or the first usable one of that alias; None means the alias `default`.

        Of an alias, models whose provider is left alone come last. Raises `UnknownModel` and `ModelNotUsable`.
        """
        now = self._now
        name = name or DEFAULT_ALIAS
        if (entry := now.entries.get(name)) is not None:
            if entry.unusable is not None:
                raise ModelNotUsable(f"The model {entry.id} cannot be used: {entry.unusable}.")
            return entry
        if name not in now.aliases:
            raise UnknownModel
        candidates = [now.entries[target] for target in now.aliases[name]]
        usable = [entry for entry in candidates if entry.usable]
        for entry in usable:
            if self.paused(entry) is None:
                return entry
        if usable:
            return usable[0]
        reasons = "; ".join(f"{entry.id}: {entry.unusable}" for entry in candidates)
        raise ModelNotUsable(f"No model of {name} can be used ({reasons}).")

    def fallbacks(self, entry: ModelEntry) -> tuple[ModelEntry, ...]:
        """Return the usable fallbacks of a model, in order."""
        known = self._now.entries
        # The entry may be of the registry before this one.
        return tuple(other for name in entry.fallbacks if (other := known.get(name)) is not None and other.usable)

    def describe(self) -> list[ModelInfo]:
        """Return what callers may know of every model: whether it can be used now, and why not."""
        return [
            ModelInfo(
                id=entry.id,
                provider=entry.provider,
                usable=reason is None,
                reason=reason,
                capabilities=list(entry.capabilities),
            )
            for entry in self.entries()
            for reason in [self._why_not(entry)]
        ]

    def _why_not(self, entry: ModelEntry) -> str | None:
        if entry.unusable is not None:
            return entry.unusable
        pause_s = self.paused(entry)
        if pause_s is None:
            return None
        return f"its provider has failed repeatedly and is asked again in {math.ceil(pause_s)} s"


def _entry(id: str, model: ModelForm, provider: ProviderForm, unusable: str | None) -> ModelEntry:
    return ModelEntry(
        id=id,
        provider=model.provider,
        kind=provider.kind,
        name=model.name,
        base_url=provider.base_url.rstrip("/"),
        api_key=provider.api_key if provider.api_key and provider.api_key.get_secret_value() else None,
        context=model.context,
        max_output_tokens=model.max_output_tokens,
        price=model.price,
        capabilities=model.capabilities,
        parameters=model.parameters,
        timeouts=model.timeouts,
        retries=model.retries,
        fallbacks=model.fallbacks,
        prefill=model.prefill,
        unusable=unusable,
        flavour=provider.flavour,
        headers={name: value for name, value in provider.headers.items() if value},
        background=model.background,
        workspace_keys=provider.workspace_keys and provider.kind != "demo",
        workspace_urls=provider.workspace_urls,
    )


def _why_unusable(file: SettingsFile, name: str, provider: ProviderForm) -> str | None:
    if provider.kind == "demo":
        return None
    values = {"base_url": provider.base_url}
    if provider.api_key is not None:
        values["api_key"] = provider.api_key.get_secret_value()
    for key, value in values.items():
        if not value.strip():
            variables = file.variables.get(("providers", name, key))
            return f"{variables[0]} is not set" if variables else f"{key} is empty"
    return None
