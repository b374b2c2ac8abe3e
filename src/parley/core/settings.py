"""Settings: read from `.env` files and the environment, checked before anything starts.

`.env`, `.env.local`, `.env.{environment}` and the environment are read in that order, a later one wins. Nothing
reads the environment but this file; `load_settings` builds one object and the shell hands it down.
"""

import os
import re
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from parley.core.outgoing import parse_ports, parse_rules
from parley.core.paths import project_path

EMBEDDED = "embedded"


class Environment(StrEnum):
    """Which rules hold."""

    DEVELOPMENT = "development"
    TESTING = "testing"
    PRODUCTION = "production"


class SettingsInvalid(Exception):
    """The settings cannot be used; the message says which and what to do."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DatabaseSettings(_Group):
    """PostgreSQL. Without `url` the embedded server is used (production must say `embedded`)."""

    url: str | None = Field(
        default=None, repr=False, description="Requests, as the role parley_app; `embedded` for our own server"
    )
    system_url: str | None = Field(default=None, repr=False, description="The system role parley_system")
    owner_url: str | None = Field(default=None, repr=False, description="Migrations, as parley_owner")
    direct_url: str | None = Field(
        default=None,
        repr=False,
        description="Unpooled, as parley_system: tick writer and advisory locks. Set: `url` is a pooler",
    )
    pool_size: int = Field(default=10, ge=1, le=200)
    system_pool_size: int = Field(default=4, ge=1, le=50)
    connect_timeout_s: float = Field(default=3, gt=0)
    statement_timeout_s: float = Field(default=10, gt=0)


class AuthSettings(_Group):
    """Credentials and how long they live."""

    access_token_minutes: int = Field(default=15, ge=1, le=1440)
    refresh_idle_days: int = Field(default=7, ge=1, le=90)
    refresh_absolute_days: int = Field(default=30, ge=1, le=365)
    refresh_grace_s: int = Field(default=30, ge=0, le=300)
    session_cache_s: float = Field(default=30, ge=0, le=30)
    password_scheme: Literal["argon2", "bcrypt"] = "argon2"  # noqa: S105 - an algorithm
    password_min_length: int = Field(default=8, ge=8, le=64)
    password_workers: int = Field(default=2, ge=1, le=64)
    password_queue: int = Field(default=64, ge=1, le=10_000)
    verify_email: Literal["optional", "required"] = "optional"
    verify_hours: int = Field(default=24, ge=1, le=168)
    reset_minutes: int = Field(default=30, ge=5, le=1440)
    invitation_days: int = Field(default=7, ge=1, le=60)
    erasure_days: int = Field(default=7, ge=0, le=90, description="How long a deleted account can be brought back")
    clerk_webhook_secret: SecretStr | None = Field(default=None, description="Comma-separated while it rotates")


class MailSettings(_Group):
    """How mail leaves: to the console and the data directory, or by SMTP."""

    transport: Literal["console", "smtp"] = "console"
    sender: str = Field(default="Parley <parley@localhost>", description="The From address")
    host: str = "localhost"
    port: int = Field(default=587, ge=1, le=65535)
    username: str | None = None
    password: SecretStr | None = None
    tls: Literal["starttls", "implicit", "none"] = "starttls"
    timeout_s: float = Field(default=20, gt=0)


class JobSettings(_Group):
    """The dispatcher of jobs in this process."""

    concurrency: int = Field(default=8, ge=1, le=200, description="Jobs of this process running at once")
    per_workspace: int = Field(default=4, ge=1, le=200, description="Jobs of one workspace running at once")
    poll_s: float = Field(default=1, gt=0, description="How often to look for work of other processes")
    lease_s: float = Field(default=30, gt=0, description="When the job of a lost process is taken over")
    keep_days: int = Field(default=7, ge=1, le=365, description="How long finished jobs can be seen")
    drain_s: float = Field(default=5, ge=0, description="How long running jobs may go on after a SIGTERM")


class LimitSettings(_Group):
    """Rate limits: how many in how long. Unless `PARLEY_RATE_LIMITS` is off."""

    signup_per_hour: int = Field(default=60, ge=1, description="Sign-ups per address")
    signin_failures: int = Field(default=5, ge=1, description="Failed sign-ins in 15 minutes, account and address")
    signin_failures_per_address: int = Field(default=20, ge=1, description="Failed sign-ins in 15 minutes, address")
    refresh_per_minute: int = Field(default=60, ge=1, description="Refreshes per session")
    mail_per_hour: int = Field(default=5, ge=1, description="Mails asked for, per account and per address")
    unverified_per_minute: int = Field(
        default=600, ge=1, description="Requests with a credential that does not hold, per address"
    )
    api_per_minute: int = Field(default=1200, ge=1, description="API requests per user")
    key_per_minute: int = Field(default=1200, ge=1, description="API requests per API key")
    workspace_per_minute: int = Field(default=12_000, ge=1, description="API requests per workspace")
    handshakes_per_minute: int = Field(default=600, ge=1, description="Sockets opened per address")
    sends_per_minute: int = Field(default=120, ge=1, description="Messages sent per user")
    running_replies: int = Field(default=50, ge=1, description="Replies of one user running at once")
    running_calls: int = Field(
        default=50, ge=1, description="Calls of one user over OpenAI's API running at once, per process"
    )


class LlmSettings(_Group):
    """Models and prompts."""

    registry: Path = Field(default_factory=lambda: project_path("llm_registry.yaml"))
    prompts: Path = Field(default_factory=lambda: project_path("prompts"))
    registry_poll_s: float = Field(default=5, ge=0, description="How often the registry is looked at; 0: only at start")
    breaker_failures: int = Field(
        default=5, ge=0, description="Failures in a row after which a provider is left alone; 0: never"
    )
    breaker_window_s: float = Field(default=30, gt=0, description="How old the first of them may be")
    breaker_open_s: float = Field(default=30, gt=0, description="How long it is left alone")
    titles: bool = Field(default=True, description="Have the alias `fast` find titles of conversations")
    max_steps: int = Field(default=8, ge=1, le=50, description="Model calls that one reply may make")
    tool_timeout_s: float = Field(default=30, gt=0)
    tools_timeout_s: float = Field(default=120, gt=0, description="How long all tool calls of one reply may take")
    tools_at_once: int = Field(default=4, ge=1, le=64, description="Tool calls of one reply that run at once")
    calls_per_step: int = Field(default=16, ge=1, le=128, description="Tool calls that a model may make at once")
    calls_per_reply: int = Field(default=64, ge=1, le=1000)
    approval_s: float = Field(default=900, gt=0, description="How long a tool call waits to be approved")
    max_cost: Decimal = Field(default=Decimal(0), ge=0, description="Dollars that one reply may cost; 0: no bound")


class OutgoingSettings(_Group):
    """Requests to URLs that workspaces have set: to public addresses by https, and to what is allowed here."""

    allow: str = Field(default="", description="What of the inside may be asked, comma-separated")
    ports: str = Field(default="443", description="Ports that may be asked, comma-separated")
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, description="The largest answer")
    total_s: float = Field(default=900, gt=0, description="How long a whole answer may take")

    @field_validator("allow")
    @classmethod
    def _rules(cls, value: str) -> str:
        parse_rules(value)
        return value

    @field_validator("ports")
    @classmethod
    def _ports(cls, value: str) -> str:
        parse_ports(value)
        return value


class RealtimeSettings(_Group):
    """The socket and the log; the numbers are those of docs/protocol.md."""

    tick_ms: int = Field(default=40, ge=0, le=1000)
    ring_events: int = Field(default=512, ge=0, description="0 keeps no ring: every event is read from PostgreSQL")
    ring_bytes: int = Field(default=256 * 1024, ge=0)
    heartbeat_s: float = Field(default=30, gt=0)
    hello_timeout_s: float = Field(default=5, gt=0)
    silence_timeout_s: float = Field(default=75, gt=0)
    ack_window_bytes: int = Field(default=256 * 1024, ge=1024)
    ack_timeout_s: float = Field(default=30, gt=0)
    replay_events: int = Field(default=1000, ge=1)
    replay_bytes: int = Field(default=1024 * 1024, ge=1024)
    lag_events: int = Field(default=2000, ge=1)
    lag_bytes: int = Field(default=1024 * 1024, ge=1024)
    send_timeout_s: float = Field(default=15, gt=0, description="How long a client may leave what is sent untaken")
    frame_bytes: int = Field(default=64 * 1024, ge=1024)
    subscriptions: int = Field(default=200, ge=1)
    connections_per_user: int = Field(default=32, ge=1)
    connections: int = Field(default=12_000, ge=1)
    lookups: int = Field(default=4, ge=1, description="How many sockets the database is read for at once")
    hello_at_once: int = Field(default=4, ge=1)
    hello_waiting: int = Field(default=5000, ge=0, description="How many may wait to be let in")
    # Less than the ten seconds that clients wait for a welcome: one that has given up has come again.
    hello_wait_s: float = Field(default=8, gt=0)
    frames_per_s: int = Field(default=20, ge=1)
    frames_burst: int = Field(default=60, ge=1)
    poll_s: float = Field(default=1, gt=0)
    lease_s: float = Field(default=10, gt=0)
    delta_minutes: float = Field(default=15, gt=0, description="How long deltas are kept after the end of their reply")
    keep_hours: float = Field(default=24, gt=0, description="How long events are kept")
    keep_events: int = Field(default=10_000, ge=1000, description="How many events a channel keeps at most")
    ticket_s: int = Field(default=30, ge=1)
    drain_window_s: float = Field(default=20, ge=0, description="How long connections have to move after a SIGTERM")
    drain_s: float = Field(default=60, ge=0, description="How long running replies may go on after a SIGTERM")


class AttachmentSettings(_Group):
    """Files that messages carry, and uploads of imports: how large, and where they are kept."""

    store: Literal["postgres", "s3"] = Field(default="postgres", description="Where new files go; old ones stay")
    image_bytes: int = Field(default=10 * 1024 * 1024, ge=1024)
    text_bytes: int = Field(default=1024 * 1024, ge=1024)
    import_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, description="The upload of an import, ZIP or JSON")
    workspace_bytes: int = Field(default=5 * 1024**3, ge=1024, description="What a workspace keeps at most")
    s3_endpoint: str = Field(
        default="", description="Of an S3-compatible store, like https://s3.eu-west-1.amazonaws.com"
    )
    s3_bucket: str = ""
    s3_region: str = "us-east-1"
    s3_access_key: str = ""
    s3_secret_key: SecretStr | None = None
    s3_prefix: str = Field(default="", description="Before every key in the bucket")

    @model_validator(mode="after")
    def _whole_store(self) -> "AttachmentSettings":
        if self.store == "s3" and not self.has_s3:
            raise ValueError("the store s3 needs S3_ENDPOINT, S3_BUCKET, S3_ACCESS_KEY and S3_SECRET_KEY")
        if self.s3_endpoint:
            url = urlsplit(self.s3_endpoint)
            if url.scheme not in {"http", "https"} or not url.hostname or url.path.strip("/") or url.query:
                raise ValueError("S3_ENDPOINT is a scheme and a host, like https://s3.example.com")
        return self

    @property
    def has_s3(self) -> bool:
        """Whether a store outside the database is configured."""
        return bool(self.s3_endpoint and self.s3_bucket and self.s3_access_key and self.s3_secret_key)


class LogSettings(_Group):
    """Where logs go. Files are JSON lines below the data directory, the console is for people in development."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    console: Literal["auto", "text", "json"] = "auto"
    files: bool = True


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
