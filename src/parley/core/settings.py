"""Settings: read from `.env` files and the environment, checked before anything starts.

`.env`, `.env.local`, `.env.{environment}` and the environment are read in that order, a later one wins. Nothing
reads the environment but this file; `load_settings` builds one object and the shell hands it down.
"""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from parley.core.setting_groups import (
    AttachmentSettings,
    AuthSettings,
    DatabaseSettings,
    JobSettings,
    LimitSettings,
    LlmSettings,
    LogSettings,
    MailSettings,
    OutgoingSettings,
    RealtimeSettings,
)

__all__ = [
    "EMBEDDED",
    "AttachmentSettings",
    "AuthSettings",
    "DatabaseSettings",
    "DevelopmentSettings",
    "Environment",
    "JobSettings",
    "LimitSettings",
    "LlmSettings",
    "LogSettings",
    "MailSettings",
    "OutgoingSettings",
    "ProductionSettings",
    "RealtimeSettings",
    "Settings",
    "SettingsInvalid",
    "TestingSettings",
    "load_settings",
]

EMBEDDED = "embedded"


class Environment(StrEnum):
    """Which rules hold."""

    DEVELOPMENT = "development"
    TESTING = "testing"
    PRODUCTION = "production"


class SettingsInvalid(Exception):
    """The settings cannot be used; the message says which and what to do."""


def _split(value: object) -> object:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class Settings(BaseSettings):
    """Everything that can be set. The class per environment holds the defaults and the refusals."""

    model_config = SettingsConfigDict(
        env_prefix="PARLEY_", env_nested_delimiter="_", env_nested_max_split=1, extra="ignore", env_ignore_empty=True
    )

    env: Environment = Environment.DEVELOPMENT
    host: str = "127.0.0.1"
    port: int = Field(default=3000, ge=0, le=65535)
    public_url: str = ""
    data_dir: Path = Path(".parley")
    secret_key: Annotated[list[SecretStr], NoDecode] = Field(default_factory=list)
    cors_origins: Annotated[list[str], NoDecode] = Field(default_factory=list)
    redis_url: str | None = Field(default=None, repr=False)
    role: Literal["all", "web", "gen"] = "all"
    workers: int = Field(default=1, ge=1, le=64)
    issuers: str | None = Field(default=None, repr=False)
    jobs: Literal["inprocess", "celery"] = "inprocess"
    rate_limits: Literal["on", "off"] = "on"
    trusted_proxies: Annotated[list[str], NoDecode] = Field(default_factory=list)
    body_bytes: int = Field(default=1024 * 1024, ge=1024)
    dialect_fetch_images: bool = Field(default=False, description="Whether images that calls name by URL are fetched")
    dialect_body_bytes: int = Field(
        default=20 * 1024 * 1024, ge=1024, description="The same for /v1/chat/completions, whose images are in the body"
    )

    database: DatabaseSettings = Field(default_factory=DatabaseSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    mail: MailSettings = Field(default_factory=MailSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    job: JobSettings = Field(default_factory=JobSettings)
    llm: LlmSettings = Field(default_factory=LlmSettings)
    outgoing: OutgoingSettings = Field(default_factory=OutgoingSettings)
    realtime: RealtimeSettings = Field(default_factory=RealtimeSettings)
    attachments: AttachmentSettings = Field(default_factory=AttachmentSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    _environ: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("cors_origins", "secret_key", "trusted_proxies", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return _split(value)

    @field_validator("cors_origins")
    @classmethod
    def _exact_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            parts = urlsplit(origin)
            plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc or "*" in origin)
            if parts.scheme not in {"http", "https"} or not parts.netloc or not plain:
                raise ValueError("each origin is exact, like https://app.example.com: no path, no wildcard")
        return value

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment that the settings were read from, with the `.env` files under it: provider keys are there."""
        return self._environ

    @property
    def is_production(self) -> bool:
        """Whether the strict rules hold."""
        return self.env is Environment.PRODUCTION

    @property
    def base_url(self) -> str:
        """The address that people reach the server at."""
        host = "localhost" if self.host in {"127.0.0.1", "0.0.0.0", "::"} else self.host  # noqa: S104 - compared, not bound
        return self.public_url.rstrip("/") or f"http://{host}:{self.port}"

    @property
    def uses_embedded_postgres(self) -> bool:
        """Whether we start PostgreSQL ourselves."""
        return self.database.url in {None, EMBEDDED}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the base class's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment beats the files; an argument beats both."""
        return (init_settings, env_settings, dotenv_settings)

    def refusals(self) -> list[str]:
        """Return why these settings must not serve; empty when they may."""
        problems = []
        if self.jobs != "inprocess":
            problems.append("PARLEY_JOBS: this version has no Celery yet; leave it out")
        return problems


class DevelopmentSettings(Settings):
    """A person at a machine: everything works without being set."""


class TestingSettings(Settings):
    """The test suite: no files in the log, quick passwords stay real."""

    env: Environment = Environment.TESTING


class ProductionSettings(Settings):
    """Open to the world: refuses what is unset, weak or a sample."""

    env: Environment = Environment.PRODUCTION
    host: str = "0.0.0.0"  # noqa: S104 - a container's port is published on purpose

    def refusals(self) -> list[str]:
        """Return what production does not take."""
        problems = super().refusals()
        if not self.secret_key:
            problems.append("PARLEY_SECRET_KEY is not set: make one with `openssl rand -base64 48`")
        for key in self.secret_key:
            text = key.get_secret_value()
            if len(text) < 32 or len(set(text)) < 10 or "change" in text.lower() or "secret" in text.lower():
                problems.append("PARLEY_SECRET_KEY is too weak or a sample: at least 32 random characters")
        if self.public_url and urlsplit(self.public_url).scheme not in {"http", "https"}:
            problems.append("PARLEY_PUBLIC_URL must begin with https:// or http://")
        if not self.public_url:
            problems.append("PARLEY_PUBLIC_URL is not set: mail links, cookies and the Origin check need it")
        if self.database.url is None:
            problems.append("PARLEY_DATABASE_URL is not set: name a PostgreSQL, or say `embedded`")
        elif not self.uses_embedded_postgres and not (self.database.system_url and self.database.owner_url):
            problems.append("PARLEY_DATABASE_SYSTEM_URL and PARLEY_DATABASE_OWNER_URL are needed in production")
        if self.rate_limits == "off":
            problems.append("PARLEY_RATE_LIMITS=off is for load tests, not for production")
        return problems


_CLASSES: dict[Environment, type[Settings]] = {
    Environment.DEVELOPMENT: DevelopmentSettings,
    Environment.TESTING: TestingSettings,
    Environment.PRODUCTION: ProductionSettings,
}


def _files(directory: Path, environment: str) -> tuple[Path, ...]:
    return (directory / ".env", directory / ".env.local", directory / f".env.{environment}")


def _check_text(files: tuple[Path, ...]) -> None:
    for path in files:
        try:
            if path.is_file():
                path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise SettingsInvalid(f"{path} is not UTF-8 text") from None


def load_settings(directory: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings, or raise `SettingsInvalid` naming every setting that does not hold and never its value."""
    directory = directory or Path.cwd()
    named = str(overrides.get("env") or os.environ.get("PARLEY_ENV") or "")
    if not named:
        _check_text(_files(directory, "development")[:2])
        layers = [dotenv_values(path) for path in _files(directory, "development")[:2] if path.is_file()]
        named = next((str(layer["PARLEY_ENV"]) for layer in reversed(layers) if layer.get("PARLEY_ENV")), "development")
    try:
        environment = Environment(named)
    except ValueError:
        raise SettingsInvalid("PARLEY_ENV must be development, testing or production") from None
    files = _files(directory, environment)
    _check_text(files)
    overrides["env"] = environment
    try:
        settings = _CLASSES[environment](_env_file=files, **overrides)
    except ValidationError as error:
        lines = [f"PARLEY_{'_'.join(str(p) for p in e['loc']).upper()}: {e['msg']}" for e in error.errors()]
        raise SettingsInvalid("These settings are not valid:\n  " + "\n  ".join(lines)) from None
    except SettingsError as error:
        # A group's own name with a value: its text would repeat the value.
        group_named = re.search(r'field "(\w+)"', str(error))
        group = group_named.group(1).upper() if group_named else "?"
        raise SettingsInvalid(f"PARLEY_{group} is a group of settings and takes no value: see .env.example") from None
    environ: dict[str, str] = {}
    for path in files:
        if path.is_file():
            environ |= {key: value for key, value in dotenv_values(path).items() if value is not None}
    settings._environ = environ | dict(os.environ)
    if problems := settings.refusals():
        raise SettingsInvalid("These settings cannot be used:\n  " + "\n  ".join(problems))
    return settings
