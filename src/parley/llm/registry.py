"""The model registry: which models there are, what they cost, and which of them can be called now."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from parley.llm.errors import ModelNotUsable, UnknownModel
from parley.llm.registry_file import Location, SettingsFile, read_settings

ProviderKind = Literal["openai", "openai_responses", "anthropic", "demo"]
PrefillStyle = Literal["plain", "prefix", "continue_final_message"]
"""How a model is given the beginning of its answer: as a last message of the assistant as it is (Anthropic up to
Claude 4.5, the demo model), one with `prefix: true` (Mistral, DeepSeek's beta), or with vLLM's parameters."""
DEFAULT_ALIAS = "default"

_PREFILL_STYLES: Mapping[ProviderKind, tuple[PrefillStyle, ...]] = {
    "openai": get_args(PrefillStyle),
    "openai_responses": (),
    "anthropic": ("plain",),
    "demo": ("plain",),
}


class Capability(StrEnum):
    """What a model can do beyond answering with text."""

    TOOLS = "tools"
    JSON_SCHEMA = "json_schema"
    IMAGES = "images"
    REASONING = "reasoning"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Price(_Strict):
    """Dollars per million tokens. Cached input costs as much as other input unless it is given."""

    input: Decimal = Field(default=Decimal(0), ge=0)
    cached_input: Decimal = Field(default=Decimal(0), ge=0)
    output: Decimal = Field(default=Decimal(0), ge=0)

    @model_validator(mode="before")
    @classmethod
    def _cached_as_input(cls, data: Any) -> Any:
        if isinstance(data, dict) and "input" in data:
            return {"cached_input": data["input"], **data}
        return data


class Timeouts(_Strict):
    """Seconds: to connect, to the first piece of an answer, between two reads, and for the whole call."""

    connect: float = Field(default=5, gt=0)
    first_token: float = Field(default=30, gt=0)
    idle: float = Field(default=30, gt=0)
    total: float = Field(default=300, gt=0)


_Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


class _Provider(_Strict):
    kind: ProviderKind
    base_url: str = ""
    api_key: SecretStr | None = None


class _Model(_Strict):
    provider: str
    name: str = Field(min_length=1)
    context: int = Field(default=32_768, gt=0)
    max_output_tokens: int = Field(default=4_096, gt=0)
    price: Price = Price()
    capabilities: tuple[Capability, ...] = ()
    parameters: dict[str, Any] = Field(default_factory=dict)
    timeouts: Timeouts = Timeouts()
    retries: int = Field(default=2, ge=0, le=10)
    fallbacks: tuple[str, ...] = ()
    prefill: PrefillStyle | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Registry(_Strict):
    providers: dict[_Id, _Provider]
    models: dict[_Id, _Model] = Field(min_length=1)
    aliases: dict[_Id, Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]]


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


class ModelRegistry:
    """The models and aliases of one registry file."""

    def __init__(self, entries: tuple[ModelEntry, ...], aliases: Mapping[str, tuple[str, ...]]) -> None:
        self._entries = {entry.id: entry for entry in entries}
        self.aliases = dict(aliases)

    @classmethod
    def load(cls, path: Path, environ: Mapping[str, str]) -> Self:
        """Read and check a registry file. Raises `RegistryInvalid`, which names the line of the first mistake."""
        file = read_settings(path, environ)
        try:
            parsed = _Registry.model_validate(file.data)
        except ValidationError as error:
            # A misspelt key is also a missing one: tell of the one that stands in the file.
            items = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
            raise file.invalid(_location(items[0]["loc"]), _explain(items[0], file)) from None
        _check_references(file, parsed)
        unusable = {name: _why_unusable(file, name, provider) for name, provider in parsed.providers.items()}
        entries = tuple(
            _entry(model_id, model, parsed.providers[model.provider], unusable[model.provider])
            for model_id, model in parsed.models.items()
        )
        return cls(entries, parsed.aliases)

    def entries(self) -> tuple[ModelEntry, ...]:
        """Return every model, usable or not, in the order of the file."""
        return tuple(self._entries.values())

    def resolve(self, name: str | None = None) -> ModelEntry:
        """Return the model of that id, or the first usable one of that alias; None means the alias `default`.

        Raises `UnknownModel` and `ModelNotUsable`.
        """
        name = name or DEFAULT_ALIAS
        if (entry := self._entries.get(name)) is not None:
            if entry.unusable is not None:
                raise ModelNotUsable(f"The model {entry.id} cannot be used: {entry.unusable}.")
            return entry
        if name not in self.aliases:
            raise UnknownModel
        candidates = [self._entries[target] for target in self.aliases[name]]
        for entry in candidates:
            if entry.usable:
                return entry
        reasons = "; ".join(f"{entry.id}: {entry.unusable}" for entry in candidates)
        raise ModelNotUsable(f"No model of {name} can be used ({reasons}).")

    def fallbacks(self, entry: ModelEntry) -> tuple[ModelEntry, ...]:
        """Return the usable fallbacks of a model, in order."""
        return tuple(other for name in entry.fallbacks if (other := self._entries[name]).usable)

    def describe(self) -> list[ModelInfo]:
        """Return what callers may know of every model."""
        return [
            ModelInfo(
                id=entry.id,
                provider=entry.provider,
                usable=entry.usable,
                reason=entry.unusable,
                capabilities=list(entry.capabilities),
            )
            for entry in self.entries()
        ]


def _entry(id: str, model: _Model, provider: _Provider, unusable: str | None) -> ModelEntry:
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
    )


def _why_unusable(file: SettingsFile, name: str, provider: _Provider) -> str | None:
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


def _check_references(file: SettingsFile, parsed: _Registry) -> None:
    for name, provider in parsed.providers.items():
        url = urlsplit(provider.base_url)
        if provider.base_url and (url.scheme not in {"http", "https"} or not url.hostname):
            at: Location = ("providers", name, "base_url")
            raise file.invalid(at, "base_url must start with http:// or https:// and name a host")
    for model_id, model in parsed.models.items():
        _check_target(file, ("models", model_id, "provider"), model.provider, parsed.providers, "provider")
        kind = parsed.providers[model.provider].kind
        if model.prefill and model.prefill not in (styles := _PREFILL_STYLES[kind]):
            remedy = f"use one of: {', '.join(styles)}" if styles else "remove it"
            message = f'providers of the kind "{kind}" know no prefill "{model.prefill}"; {remedy}'
            raise file.invalid(("models", model_id, "prefill"), message)
        for index, target in enumerate(model.fallbacks):
            where: Location = ("models", model_id, "fallbacks", index)
            _check_target(file, where, target, parsed.models, "model")
            if target == model_id:
                raise file.invalid(where, f'the model "{model_id}" cannot be its own fallback; remove it')
    for alias, targets in parsed.aliases.items():
        if alias in parsed.models:
            raise file.invalid(("aliases", alias), f'"{alias}" is already the id of a model; rename the alias')
        for index, target in enumerate(targets):
            _check_target(file, ("aliases", alias, index), target, parsed.models, "model")
    if DEFAULT_ALIAS not in parsed.aliases:
        raise file.invalid(("aliases",), 'the alias "default" is missing; add it with the models that should answer')


def _check_target(file: SettingsFile, at: Location, target: str, known: Mapping[str, Any], what: str) -> None:
    if target not in known:
        raise file.invalid(at, f'unknown {what} "{target}"; use one of: {", ".join(known) or "(none is defined)"}')


def _location(loc: tuple[int | str, ...]) -> Location:
    # Pydantic marks a fault in a mapping's key by this word behind it.
    return tuple(part for part in loc if part != "[key]")


_FIELDS: Mapping[str, type[BaseModel]] = {"providers": _Provider, "models": _Model}
_INNER: Mapping[str, type[BaseModel]] = {"price": Price, "timeouts": Timeouts}


def _explain(item: Any, file: SettingsFile) -> str:
    """Say what is wrong with one value and what to do, without the value: it may be a key."""
    loc = item["loc"]
    key = ".".join(str(part) for part in loc if part != "[key]")
    if item["type"] == "extra_forbidden":
        model: type[BaseModel] = _Registry
        if len(loc) > 1:
            model = _INNER.get(str(loc[-2])) or _FIELDS[str(loc[0])]
        return f'unknown key "{loc[-1]}"; remove it or use one of: {", ".join(model.model_fields)}'
    if item["type"] == "missing":
        return f'"{key}" is missing; add it'
    if "[key]" in loc:
        return f'"{loc[-2]}" is not a valid name; use letters, digits and . _ : / -'
    made_from = file.variables.get(_location(loc))
    source = f" (the value comes from {', '.join(made_from)})" if made_from else ""
    return f'"{key}" is not valid{source}: {item["msg"][:1].lower()}{item["msg"][1:]}'
