"""Other issuers whose tokens are taken, as `PARLEY_ISSUERS` lists them. Checked before anything starts."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Self
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, SecretBytes, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from parley.core.settings import Settings, SettingsInvalid

_MIN_SECRET_BYTES = 32
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Algorithm(StrEnum):
    """How tokens are signed: one for each issuer, and never taken from a token."""

    RS256 = "RS256"
    ES256 = "ES256"
    EDDSA = "EdDSA"
    HS256 = "HS256"


class Issuer(BaseModel):
    """One entry. `issuer` None is for tokens without `iss`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
    issuer: Annotated[str, Field(min_length=1, max_length=500)] | None
    algorithm: Algorithm
    jwks_url: str | None = None
    secret_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = None
    audience: str | None = None
    azp: tuple[str, ...] | None = None
    create_users: bool
    workspace: Annotated[str, Field(max_length=200)]
    secret: SecretBytes | None = Field(default=None, exclude=True)
    """What `secret_env` names; never in the entry itself."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        symmetric = self.algorithm is Algorithm.HS256
        if (self.secret_env is not None) != symmetric or (self.jwks_url is not None) == symmetric:
            raise PydanticCustomError("key_source", "HS256 needs secret_env and no jwks_url; the others the reverse")
        if self.jwks_url is not None:
            parts = urlsplit(self.jwks_url)
            if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
                raise PydanticCustomError("jwks_url", "jwks_url must be https, or http on this machine")
        kind, _, value = self.workspace.partition(":")
        if self.workspace != "personal" and not (kind in {"fixed", "claim"} and value):
            raise PydanticCustomError("workspace", "workspace must be personal, fixed:ID or claim:NAME")
        if kind == "fixed":
            try:
                UUID(value)
            except ValueError:
                raise PydanticCustomError("workspace", "fixed: needs the id of a workspace") from None
        if self.azp is not None and not self.azp:
            raise PydanticCustomError("azp", "azp lists at least one party")
        return self


_entries = TypeAdapter(list[Issuer])


def load_issuers(settings: Settings, *, own_issuer: str) -> tuple[Issuer, ...]:
    """Return the entries, with their secrets. Raises `SettingsInvalid`, which never holds a value of a secret."""
    if not settings.issuers:
        return ()
    try:
        entries = _entries.validate_json(settings.issuers)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'it'}: {problem['msg']}"
            for problem in error.errors(include_input=False, include_url=False)
        ]
        raise SettingsInvalid("PARLEY_ISSUERS cannot be used:\n  " + "\n  ".join(lines)) from None
    names, issuers = [entry.name for entry in entries], [entry.issuer for entry in entries]
    if len(set(names)) < len(names):
        raise SettingsInvalid("PARLEY_ISSUERS: two entries have one name")
    if len(set(issuers)) < len(issuers):
        raise SettingsInvalid("PARLEY_ISSUERS: two entries have one issuer; at most one may have none")
    if own_issuer in issuers:
        raise SettingsInvalid("PARLEY_ISSUERS: an entry has our own issuer")
    return tuple(_with_secret(entry, settings.environ) for entry in entries)


def _with_secret(entry: Issuer, environ: Mapping[str, str]) -> Issuer:
    if entry.secret_env is None:
        return entry
    value = environ.get(entry.secret_env, "").encode()
    if len(value) < _MIN_SECRET_BYTES:
        raise SettingsInvalid(
            f"PARLEY_ISSUERS: {entry.name} needs at least {_MIN_SECRET_BYTES} bytes in {entry.secret_env}"
        )
    return entry.model_copy(update={"secret": SecretBytes(value)})
