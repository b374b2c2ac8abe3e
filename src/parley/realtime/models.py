"""Tables of the log. They are read and written in SQL (`log.py`, `runs.py`); the models are for migrations."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, BigInteger, CheckConstraint, Column, ForeignKeyConstraint, Index, text
from sqlmodel import Field, SQLModel

from parley.core.models import TenantTable, filled_in


class ChannelHead(SQLModel, table=True):
    """The last `seq` of a channel. Whoever allocates holds its lock until commit: commit order is `seq` order."""

    __tablename__ = "channel_heads"
    __table_args__ = (ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),)

    workspace_id: UUID = Field(primary_key=True)
    channel: str = Field(primary_key=True, max_length=200)
    owner_id: UUID | None = None
    seq: int = Field(sa_type=BigInteger)
    floor: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")})
    epoch: str = Field(
        max_length=16, sa_column_kwargs={"server_default": text("substr(md5(gen_random_uuid()::text), 1, 8)")}
    )


class ChannelEvent(SQLModel, table=True):
    """One event. `owner_id` is set on channels that are one user's own."""

    __tablename__ = "channel_events"
    # What retention looks for: see the migration. None of them holds a delta, but for one in a thousand.
    __table_args__ = (
        Index(
            "ix_channel_events_ended", "at",
            postgresql_where=text("e IN ('reply.completed', 'reply.failed', 'reply.cancelled')"),
        ),
        Index("ix_channel_events_at", "at", postgresql_where=text("e <> 'reply.delta'")),
        Index(
            "ix_channel_events_thousands", "workspace_id", "channel", postgresql_where=text("seq % 1000 = 0")
        ),
    )  # fmt: skip

    workspace_id: UUID = Field(primary_key=True)
    channel: str = Field(primary_key=True, max_length=200)
    seq: int = Field(primary_key=True, sa_type=BigInteger)
    owner_id: UUID | None = None
    e: str = Field(max_length=40)
    # json and not jsonb: kept as sent, and cheaper to write.
    d: Any = Field(sa_column=Column(JSON, nullable=False))
    at: datetime


class Reply(TenantTable, table=True):
    """The run record of a reply; `id` is the assistant message's id.

    `fence` rises with every claim: a process whose fence is old appends nothing. `appended` counts the reply's events,
    so that a tick whose outcome was lost is not repeated.
    """

    __tablename__ = "replies"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        CheckConstraint(
            "status IN ('queued', 'streaming', 'completed', 'failed', 'cancelled')", name="status"
        ),
        # One reply of a channel runs at a time, whatever the processes believe.
        Index(
            "uq_replies_streaming", "workspace_id", "channel", unique=True,
            postgresql_where=text("status = 'streaming'"),
        ),
        Index(
            "ix_replies_open", "workspace_id", "channel", "id",
            postgresql_where=text("status IN ('queued', 'streaming')"),
        ),
    )  # fmt: skip

    channel: str = Field(max_length=200)
    user_id: UUID
    question_id: UUID
    status: str = Field(max_length=16)
    options: Any = Field(sa_column=Column(JSON, nullable=False))
    owner: int | None = Field(default=None, sa_type=BigInteger)
    fence: int = Field(default=0)
    attempt: int = Field(default=0)
    appended: int = Field(default=0, sa_type=BigInteger)
    start_seq: int = Field(default=0, sa_type=BigInteger)
    lease_until: datetime | None = None
    cancel_requested: bool = False
    cancelled_by: UUID | None = None
    provider_cursor: str | None = Field(default=None, max_length=400)
    created_at: datetime = filled_in()
    ended_at: datetime | None = None


class RealtimeTicket(SQLModel, table=True):
    """A one-time ticket for a socket; only its hash is kept."""

    __tablename__ = "realtime_tickets"
    __table_args__ = (ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),)

    workspace_id: UUID = Field(primary_key=True)
    hash: bytes = Field(primary_key=True, max_length=32)
    user_id: UUID
    session_id: UUID | None = None
    expires_at: datetime
    key_id: UUID | None = None
    issuer: str | None = Field(default=None, max_length=64)
    subject: str | None = Field(default=None, max_length=255)
