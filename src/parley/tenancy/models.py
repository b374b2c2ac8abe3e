"""Tables of the tenant itself."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, CheckConstraint, Column, ForeignKeyConstraint, Index
from sqlmodel import Field, SQLModel

from parley.core.models import GlobalTable, TenantTable, filled_in


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


class AuditEvent(TenantTable, table=True):
    """Something that touched access. Rows are only added; those without a workspace have the nil one."""

    __tablename__ = "audit_events"
    __table_args__ = (
        CheckConstraint("actor IN ('user', 'key', 'issuer', 'operator', 'system', 'anonymous')", name="actor"),
        CheckConstraint("outcome IN ('success', 'failure')", name="outcome"),
        Index("ix_audit_events_user_id", "workspace_id", "user_id", "id"),
    )

    at: datetime = filled_in()
    actor: str = Field(max_length=16)
    user_id: UUID | None = None
    credential_id: UUID | None = None
    """The session or the API key."""
    action: str = Field(max_length=64)
    outcome: str = Field(max_length=16)
    target: str | None = Field(default=None, max_length=200)
    address: str | None = Field(default=None, max_length=45)
    user_agent: str | None = Field(default=None, max_length=400)
    request_id: str | None = Field(default=None, max_length=64)
    details: Any = Field(sa_column=Column(JSON, nullable=False))
