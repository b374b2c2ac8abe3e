"""Tables of the chat: one row per message, never a blob."""

from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, CheckConstraint, Column, ForeignKeyConstraint, Index, Numeric, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import TSVECTOR
from sqlmodel import Field, SQLModel

from parley.core.models import TenantTable, filled_in


class Conversation(TenantTable, table=True):
    """A conversation of one user; private by the repository's rule, since others may come to read it."""

    __tablename__ = "conversations"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        CheckConstraint("shared_access IN ('read', 'write')", name="shared_access"),
        CheckConstraint("shared = (shared_access IS NOT NULL)", name="shared"),
        CheckConstraint("title_by IN ('person', 'model', 'words')", name="title_by"),
        Index("ix_conversations_owner", "workspace_id", "owner_id", text("updated_at DESC"), text("id DESC")),
        Index(
            "ix_conversations_listed", "workspace_id", "owner_id", "archived", text("pinned DESC"),
            text("updated_at DESC"), text("id DESC"),
        ),
        Index(
            "ix_conversations_shared", "workspace_id", text("updated_at DESC"), text("id DESC"),
            postgresql_where=text("shared"),
        ),
    )  # fmt: skip

    owner_id: UUID
    title: str | None = Field(default=None, max_length=200)
    model: str | None = Field(default=None, max_length=100)
    assistant: str = Field(default="general", max_length=64)
    current_id: UUID | None = None
    shared: bool = False
    shared_access: str | None = Field(default=None, max_length=8)
    archived: bool = False
    pinned: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    title_by: str | None = Field(default=None, max_length=8)
    created_at: datetime = filled_in()
    updated_at: datetime = filled_in()


class ConversationPin(SQLModel, table=True):
    """That a user keeps a conversation of somebody else's at the top. An owner's own is in the conversation."""

    __tablename__ = "conversation_pins"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "conversation_id"], ["conversations.workspace_id", "conversations.id"], ondelete="CASCADE"
        ),
        Index("ix_conversation_pins_conversation", "workspace_id", "conversation_id"),
    )

    workspace_id: UUID = Field(primary_key=True)
    user_id: UUID = Field(primary_key=True)
    conversation_id: UUID = Field(primary_key=True)


class SearchEntry(SQLModel, table=True):
    """The words of a message, or of a title (`id` is the conversation's then). Written by triggers only."""

    __tablename__ = "search_entries"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "conversation_id"], ["conversations.workspace_id", "conversations.id"], ondelete="CASCADE"
        ),
    )

    workspace_id: UUID = Field(primary_key=True)
    conversation_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    tsv: Any = Field(sa_column=Column(TSVECTOR, nullable=False))


class Message(TenantTable, table=True):
    """A message. While it is being written its row holds no parts: the log does, until the terminal event."""

    __tablename__ = "messages"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "conversation_id"], ["conversations.workspace_id", "conversations.id"], ondelete="CASCADE"
        ),
        ForeignKeyConstraint(["workspace_id", "parent_id"], ["messages.workspace_id", "messages.id"]),
        UniqueConstraint("workspace_id", "author_id", "cid"),
        CheckConstraint("role IN ('user', 'assistant', 'system')", name="role"),
        CheckConstraint(
            "status IN ('queued', 'streaming', 'completed', 'failed', 'cancelled')", name="status"
        ),
        Index("ix_messages_conversation", "workspace_id", "conversation_id", "id"),
        Index("ix_messages_children", "workspace_id", "parent_id", "id"),
    )  # fmt: skip

    conversation_id: UUID
    parent_id: UUID | None = None
    role: str = Field(max_length=16)
    parts: Any = Field(sa_column=Column(JSON, nullable=False))
    status: str = Field(max_length=16)
    model: str | None = Field(default=None, max_length=100)
    usage: Any = Field(default=None, sa_column=Column(JSON(none_as_null=True), nullable=True))
    cost: Decimal | None = Field(default=None, sa_type=Numeric(18, 8))
    error: Any = Field(default=None, sa_column=Column(JSON(none_as_null=True), nullable=True))
    author_id: UUID
    cid: UUID | None = None
    body_hash: bytes | None = Field(default=None, max_length=32)
    prompt_path: str | None = Field(default=None, max_length=200)
    prompt_hash: str | None = Field(default=None, max_length=64)
    created_at: datetime = filled_in()
    completed_at: datetime | None = None
