"""Tables of identity. Those of people are global: a user exists before and beside any workspace.

The app role has no right to any of these but users; users are visible to it through a membership of its workspace.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, BigInteger, CheckConstraint, Column, ForeignKeyConstraint, Index, text
from sqlmodel import Field, SQLModel

from parley.core.models import GlobalTable, TenantTable, filled_in


class User(GlobalTable, table=True):
    """A person. `email_norm` is what look-ups compare, since `lower()` cannot use an index under row-level security."""

    __tablename__ = "users"

    # `email_norm` is what the account signs in with. Users of another issuer have none: two may have one address.
    email: str | None = Field(default=None, max_length=320)
    email_norm: str | None = Field(default=None, max_length=320, unique=True)
    name: str | None = Field(default=None, max_length=200)
    email_verified: bool = False
    disabled_at: datetime | None = None
    # Tokens of other issuers are refused that were made before: they have no session that could be ended.
    tokens_valid_after: datetime | None = None
    created_at: datetime = filled_in()


class PasswordCredential(SQLModel, table=True):
    """A user's password, hashed."""

    __tablename__ = "credentials"
    __table_args__ = (ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),)

    user_id: UUID = Field(primary_key=True)
    password_hash: str = Field(max_length=255)
    failures: int = Field(default=0, sa_column_kwargs={"server_default": text("0")})
    """How many wrong passwords in a row."""
    failed_at: datetime | None = None
    updated_at: datetime = filled_in()


class Session(GlobalTable, table=True):
    """One sign-in on one device, in one workspace.

    Refresh tokens are not stored: a token is the session's id, the counter and a MAC over them, so that the only
    valid successor can be made again for a client that never received it.
    """

    __tablename__ = "sessions"
    __table_args__ = (
        ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        Index("ix_sessions_user_id", "user_id"),
    )

    user_id: UUID
    workspace_id: UUID
    counter: int = 0
    salt: bytes = Field(max_length=16)
    user_agent: str | None = Field(default=None, max_length=400)
    address: str | None = Field(default=None, max_length=45)
    cookie: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    """Whether the refresh token is in a cookie; fixed for the session's life."""
    # Before `created_at`, which hides the function of that name for the rest of the class.
    rotated_at: datetime = filled_in()
    last_used_at: datetime = filled_in()
    created_at: datetime = filled_in()
    idle_expires_at: datetime
    absolute_expires_at: datetime
    revoked_at: datetime | None = None
    revoke_reason: str | None = Field(default=None, max_length=32)


class OneTimeToken(GlobalTable, table=True):
    """A secret in a mail: good once, until it expires, and only the newest of its purpose. Only a hash is kept."""

    __tablename__ = "one_time_tokens"
    __table_args__ = (
        ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        Index("ix_one_time_tokens_user_id", "user_id", "purpose"),
    )

    user_id: UUID
    purpose: str = Field(max_length=32)
    hash: bytes
    email: str | None = Field(default=None, max_length=320)
    created_at: datetime = filled_in()
    expires_at: datetime
    used_at: datetime | None = None


class ExternalIdentity(SQLModel, table=True):
    """Whom another issuer's subject is here. With `deleted_at` a tombstone, which no late message revives."""

    __tablename__ = "identities"
    __table_args__ = (
        ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="SET NULL"),
        Index("ix_identities_user_id", "user_id"),
    )

    issuer: str = Field(primary_key=True, max_length=64)
    subject: str = Field(primary_key=True, max_length=255)
    user_id: UUID | None = None
    created_at: datetime = filled_in()
    updated_at: datetime | None = None
    """When the issuer says that it last changed the person."""
    deleted_at: datetime | None = None


class WebhookEvent(SQLModel, table=True):
    """A message that was taken from outside, so that it counts once."""

    __tablename__ = "webhook_events"

    source: str = Field(primary_key=True, max_length=64)
    event_id: str = Field(primary_key=True, max_length=255)
    received_at: datetime = filled_in()


class Erasure(SQLModel, table=True):
    """The ledger of people to erase and erased. It outlives them, and is applied again after a restore."""

    __tablename__ = "erasures"

    user_id: UUID = Field(primary_key=True)
    requested_at: datetime = filled_in()
    erase_after: datetime
    erased_at: datetime | None = None


class Export(GlobalTable, table=True):
    """A user's data, packed; fetched once by a link of which only the hash is kept."""

    __tablename__ = "exports"
    __table_args__ = (
        ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        Index("ix_exports_user_id", "user_id"),
    )

    user_id: UUID
    hash: bytes | None = None
    size: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")})
    """Bytes."""
    created_at: datetime = filled_in()
    expires_at: datetime
    downloaded_at: datetime | None = None


class ExportChunk(SQLModel, table=True):
    """A piece of an export, at most 256 KiB."""

    __tablename__ = "export_chunks"
    __table_args__ = (ForeignKeyConstraint(["export_id"], ["exports.id"], ondelete="CASCADE"),)

    export_id: UUID = Field(primary_key=True)
    number: int = Field(primary_key=True)
    data: bytes


class ApiKey(TenantTable, table=True):
    """A credential of a machine, with some of its maker's rights. Only a hash of it is kept."""

    __tablename__ = "api_keys"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(
            ["workspace_id", "user_id"],
            ["memberships.workspace_id", "memberships.user_id"],
            name="fk_api_keys_user_id",
            ondelete="CASCADE",
        ),
        Index("ix_api_keys_user_id", "workspace_id", "user_id", "id"),
    )

    user_id: UUID
    name: str = Field(max_length=100)
    prefix: str = Field(max_length=32)
    last_four: str = Field(max_length=4)
    hash: bytes
    scopes: Any = Field(sa_column=Column(JSON, nullable=False))
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None
    created_at: datetime = filled_in()


class Invitation(TenantTable, table=True):
    """A place in a workspace for whoever proves to have an e-mail address."""

    __tablename__ = "invitations"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        CheckConstraint("role IN ('viewer', 'member', 'admin', 'owner')", name="role"),
        Index(
            "uq_invitations_open",
            "workspace_id",
            "email_norm",
            unique=True,
            postgresql_where=text("accepted_at IS NULL AND revoked_at IS NULL"),
        ),
    )

    email: str = Field(max_length=320)
    email_norm: str = Field(max_length=320)
    role: str = Field(max_length=16)
    invited_by: UUID
    hash: bytes | None = None
    created_at: datetime = filled_in()
    expires_at: datetime
    accepted_at: datetime | None = None
    revoked_at: datetime | None = None
