"""Idempotency-Key: the first answer again for a repeated request, stored in the transaction of its effect."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, Column, ForeignKeyConstraint
from sqlmodel import Field, SQLModel

from parley.core.models import filled_in


class IdempotencyKey(SQLModel, table=True):
    """A creating request that was answered, by the hash of the key that its sender gave it."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),)

    workspace_id: UUID = Field(primary_key=True)
    user_id: UUID = Field(primary_key=True)
    hash: bytes = Field(primary_key=True)
    fingerprint: bytes
    status: int
    headers: Any = Field(sa_column=Column(JSON, nullable=False))
    body: bytes
    created_at: datetime = filled_in()
    expires_at: datetime
