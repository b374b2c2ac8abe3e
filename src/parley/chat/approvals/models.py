"""Tables of approvals."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, Column, ForeignKeyConstraint, Index
from sqlmodel import Field

from parley.core.models import TenantTable, filled_in


class ToolApproval(TenantTable, table=True):
    """A tool call that waits, or waited, for a yes; `id` is the call's.

    `arguments` are the ones that were shown, and the only ones that the call is ever made with. Without `decided_by`
    nobody answered in time.
    """

    __tablename__ = "tool_approvals"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "reply_id"], ["messages.workspace_id", "messages.id"], ondelete="CASCADE"
        ),
        Index("ix_tool_approvals_reply", "workspace_id", "reply_id"),
    )  # fmt: skip

    reply_id: UUID
    user_id: UUID
    tool: str = Field(max_length=64)
    arguments: Any = Field(sa_column=Column(JSON, nullable=False))
    arguments_hash: bytes
    approved: bool | None = None
    decided_by: UUID | None = None
    decided_at: datetime | None = None
    created_at: datetime = filled_in()
    expires_at: datetime
