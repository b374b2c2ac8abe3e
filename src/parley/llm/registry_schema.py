"""The form of a registry file, and what is checked of it before any of it is used."""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args
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

from parley.llm.flavours import FLAVOURS
from parley.llm.registry_file import Location, SettingsFile

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
# What a request is made of: a parameter of this name would replace it.
_OURS = frozenset(
    {"model", "messages", "input", "instructions", "system", "stream", "tools", "tool_choice", "response_format"}
)
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OUR_HEADERS = frozenset(
    {"host", "content-length", "content-type", "transfer-encoding", "connection", "accept", "accept-encoding"}
)
_KEY_HEADERS = frozenset({"authorization", "x-api-key", "api-key"})


class Capability(StrEnum):
    """What a model can do beyond answering with text."""

    TOOLS = "tools"
    JSON_SCHEMA = "json_schema"
    IMAGES = "images"
    REASONING = "reasoning"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Price(_Strict):
    """Dollars per million tokens, and per image where a provider charges those apart from their tokens.

    Input that is read from a provider's cache, or written to it, costs as much as other input unless that is given.
    """

    input: Decimal = Field(default=Decimal(0), ge=0)
    cached_input: Decimal = Field(default=Decimal(0), ge=0)
    cache_write: Decimal = Field(default=Decimal(0), ge=0)
    output: Decimal = Field(default=Decimal(0), ge=0)
    image: Decimal = Field(default=Decimal(0), ge=0)

    @model_validator(mode="before")
    @classmethod
    def _cached_as_input(cls, data: Any) -> Any:
        if isinstance(data, dict) and "input" in data:
            return {"cached_input": data["input"], "cache_write": data["input"], **data}
        return data


class Timeouts(_Strict):
    """Seconds: to connect, to the first piece of an answer, between two reads, and for the whole call."""

    connect: float = Field(default=5, gt=0)
    first_token: float = Field(default=30, gt=0)
    idle: float = Field(default=30, gt=0)
    total: float = Field(default=300, gt=0)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


class ProviderForm(_Strict):
    """A provider, as the file has it."""

    kind: ProviderKind
    base_url: str = ""
    api_key: SecretStr | None = None
    flavour: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    workspace_keys: bool = True
    workspace_urls: bool = False


class ModelForm(_Strict):
    """A model, as the file has it."""

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
    background: bool = True


class RegistryForm(_Strict):
    """The whole file."""

    providers: dict[_Id, ProviderForm]
    models: dict[_Id, ModelForm] = Field(min_length=1)
    aliases: dict[_Id, Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]]


def read_form(file: SettingsFile) -> RegistryForm:
    """Read and check a file. Raises `RegistryInvalid`, which names the line of the first mistake."""
    try:
        parsed = RegistryForm.model_validate(file.data)
    except ValidationError as error:
        # A misspelt key is also a missing one: tell of the one that stands in the file.
        items = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        raise file.invalid(_location(items[0]["loc"]), _explain(items[0], file)) from None
    for name, provider in parsed.providers.items():
        _check_provider(file, name, provider)
    for model_id, model in parsed.models.items():
        _check_model(file, parsed, model_id, model)
    _check_circles(file, parsed.models)
    _check_aliases(file, parsed)
    return parsed


def _check_provider(file: SettingsFile, name: str, provider: ProviderForm) -> None:
    at: Location = ("providers", name)
    url = urlsplit(provider.base_url)
    if provider.base_url and (url.scheme not in {"http", "https"} or not url.hostname):
        raise file.invalid((*at, "base_url"), "base_url must start with http:// or https:// and name a host")
    if provider.flavour is not None:
        if provider.kind != "openai":
            message = f'providers of the kind "{provider.kind}" have no flavour; remove it'
            raise file.invalid((*at, "flavour"), message)
        if provider.flavour not in FLAVOURS:
            message = f'unknown flavour "{provider.flavour}"; use one of: {", ".join(FLAVOURS)}'
            raise file.invalid((*at, "flavour"), message)
    for header, value in provider.headers.items():
        where = (*at, "headers", header)
        if not _HEADER.fullmatch(header):
            raise file.invalid(where, f'"{header}" is not the name of a header')
        if header.lower() in _KEY_HEADERS:
            raise file.invalid(where, f'the header "{header}" holds a key; give the key as api_key')
        if header.lower() in _OUR_HEADERS:
            raise file.invalid(where, f'the header "{header}" is set by the adapter; remove it')
        if not value.isprintable() or not value.isascii():
            raise file.invalid(where, f'the value of the header "{header}" must be one line of ASCII text')


def _check_model(file: SettingsFile, parsed: RegistryForm, model_id: str, model: ModelForm) -> None:
    at: Location = ("models", model_id)
    _check_target(file, (*at, "provider"), model.provider, parsed.providers, "provider")
    kind = parsed.providers[model.provider].kind
    if model.prefill and model.prefill not in (styles := _PREFILL_STYLES[kind]):
        remedy = f"use one of: {', '.join(styles)}" if styles else "remove it"
        message = f'providers of the kind "{kind}" know no prefill "{model.prefill}"; {remedy}'
        raise file.invalid((*at, "prefill"), message)
    if not model.background and kind != "openai_responses":
        raise file.invalid((*at, "background"), f'providers of the kind "{kind}" have no background; remove it')
    for name in model.parameters:
        if name in _OURS:
            raise file.invalid((*at, "parameters", name), f'the parameter "{name}" is set by the adapter; remove it')
    _check_once(file, (*at, "capabilities"), model.capabilities)
    for index, target in enumerate(model.fallbacks):
        where: Location = (*at, "fallbacks", index)
        _check_target(file, where, target, parsed.models, "model")
        if target == model_id:
            raise file.invalid(where, f'the model "{model_id}" cannot be its own fallback; remove it')
    _check_once(file, (*at, "fallbacks"), model.fallbacks)


def _check_circles(file: SettingsFile, models: Mapping[str, ModelForm]) -> None:
    """Refuse fallbacks that lead back: two models that stand in for each other stand in for nothing."""
    done: set[str] = set()
    for model_id in models:
        _walk(file, models, [model_id], done)


def _walk(file: SettingsFile, models: Mapping[str, ModelForm], path: list[str], done: set[str]) -> None:
    here = path[-1]
    for index, target in enumerate(models[here].fallbacks):
        if target in path:
            circle = " → ".join([*path[path.index(target) :], target])
            message = f"the fallbacks go round in a circle ({circle}); remove one of them"
            raise file.invalid(("models", here, "fallbacks", index), message)
        if target not in done:
            _walk(file, models, [*path, target], done)
    done.add(here)


def _check_aliases(file: SettingsFile, parsed: RegistryForm) -> None:
    for alias, targets in parsed.aliases.items():
        if alias in parsed.models:
            raise file.invalid(("aliases", alias), f'"{alias}" is already the id of a model; rename the alias')
        for index, target in enumerate(targets):
            _check_target(file, ("aliases", alias, index), target, parsed.models, "model")
        _check_once(file, ("aliases", alias), targets)
    if DEFAULT_ALIAS not in parsed.aliases:
        raise file.invalid(("aliases",), 'the alias "default" is missing; add it with the models that should answer')


def _check_once(file: SettingsFile, at: Location, values: Sequence[str]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise file.invalid((*at, index), f'"{value}" stands here a second time; remove one')


def _check_target(file: SettingsFile, at: Location, target: str, known: Iterable[str], what: str) -> None:
    known = list(known)
    if target not in known:
        raise file.invalid(at, f'unknown {what} "{target}"; use one of: {", ".join(known) or "(none is defined)"}')


def _location(loc: tuple[int | str, ...]) -> Location:
    # Pydantic marks a fault in a mapping's key by this word behind it.
    return tuple(part for part in loc if part != "[key]")


_FIELDS: Mapping[str, type[BaseModel]] = {"providers": ProviderForm, "models": ModelForm}
_INNER: Mapping[str, type[BaseModel]] = {"price": Price, "timeouts": Timeouts}


def _explain(item: Any, file: SettingsFile) -> str:
    """Say what is wrong with one value and what to do, without the value: it may be a key."""
    loc = item["loc"]
    key = ".".join(str(part) for part in loc if part != "[key]")
    if item["type"] == "extra_forbidden":
        model: type[BaseModel] = RegistryForm
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
