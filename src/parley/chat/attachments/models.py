"""Tables of attachments. The bytes are in pieces, or in a store outside the database."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKeyConstraint, Index, LargeBinary, text
from sqlmodel import Field, SQLModel

from parley.core.models import TenantTable, filled_in


class Attachment(TenantTable, table=True):
    """An uploaded file. Without a conversation it is its user's alone; with one, of all who may read that."""

    __tablename__ = "attachments"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(
            ["workspace_id", "conversation_id"], ["conversations.workspace_id", "conversations.id"], ondelete="CASCADE"
        ),
        CheckConstraint("kind IN ('image', 'file', 'import')", name="kind"),
        CheckConstraint("store IN ('postgres', 's3')", name="store"),
        Index("ix_attachments_conversation", "workspace_id", "conversation_id"),
        Index("ix_attachments_user_id", "workspace_id", "user_id", "id"),
        Index(
            "ix_attachments_unused", "workspace_id", "created_at", postgresql_where=text("conversation_id IS NULL")
        ),
    )  # fmt: skip

    user_id: UUID
    conversation_id: UUID | None = None
    kind: str = Field(max_length=16)
    media_type: str = Field(max_length=100)
    name: str = Field(max_length=200)
    size: int = Field(sa_type=BigInteger)
    sha256: bytes
    width: int | None = None
    height: int | None = None
    store: str = Field(max_length=16)
    complete: bool
    created_at: datetime = filled_in()


class AttachmentChunk(SQLModel, table=True):
    """A piece of a file."""

    __tablename__ = "attachment_chunks"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "attachment_id"], ["attachments.workspace_id", "attachments.id"], ondelete="CASCADE"
        ),
        CheckConstraint("octet_length(data) <= 262144", name="size"),
    )

    workspace_id: UUID = Field(primary_key=True)
    attachment_id: UUID = Field(primary_key=True)
    number: int = Field(primary_key=True)
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class StoredObject(TenantTable, table=True):
    """An object that may be in the store outside the database. It stays until the object is known to be gone."""

    __tablename__ = "stored_objects"

    created_at: datetime = filled_in()
