"""Groups of settings: each a class whose fields are settings with the group's name before theirs.

`parley.core.settings` puts them together and reads them.
"""

from decimal import Decimal
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from parley.core.outgoing import parse_ports, parse_rules
from parley.core.paths import project_path

_MOST_DOLLARS = Decimal(999_999_999)


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
    workspaces_per_month: int = Field(default=30, ge=1, description="Workspaces that a user may make in 30 days")
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
    workspace_cost_per_day: Decimal = Field(
        default=Decimal(0),
        ge=0,
        le=_MOST_DOLLARS,
        decimal_places=8,
        description="Dollars of the installation's own keys that a workspace may spend in a day of UTC; 0: no bound",
    )
    workspace_cost_per_month: Decimal = Field(default=Decimal(0), ge=0, le=_MOST_DOLLARS, decimal_places=8)


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
