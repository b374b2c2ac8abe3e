"""Tables of the tenant itself."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index
from sqlmodel import Field, SQLModel

from parley.core.models import GlobalTable, filled_in


class Workspace(GlobalTable, table=True):
    """A tenant. Its own `id` is the workspace that row-level security compares."""

    __tablename__ = "workspaces"

    name: str = Field(max_length=100)
    personal: bool = False
    created_at: datetime = filled_in()


class Membership(SQLModel, table=True):
    """A user's place in a workspace."""

    __tablename__ = "memberships"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        CheckConstraint("role IN ('viewer', 'member', 'admin', 'owner')", name="role"),
        # Sign-in asks by user, before there is a workspace.
        Index("ix_memberships_user_id", "user_id", "workspace_id"),
    )

    workspace_id: UUID = Field(primary_key=True)
    user_id: UUID = Field(primary_key=True)
    role: str = Field(max_length=16)
    created_at: datetime = filled_in()
