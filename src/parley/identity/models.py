"""Tables of identity. They are global: a user exists before and beside any workspace.

The app role has no right to credentials and sessions; users are visible to it through a membership of its workspace.
"""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, Index
from sqlmodel import Field, SQLModel

from parley.core.models import GlobalTable, filled_in


class User(GlobalTable, table=True):
    """A person. `email_norm` is what look-ups compare, since `lower()` cannot use an index under row-level security."""

    __tablename__ = "users"

    email: str = Field(max_length=320)
    email_norm: str = Field(max_length=320, unique=True)
    name: str | None = Field(default=None, max_length=200)
    email_verified: bool = False
    created_at: datetime = filled_in()


class PasswordCredential(SQLModel, table=True):
    """A user's password, hashed."""

    __tablename__ = "credentials"
    __table_args__ = (ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),)

    user_id: UUID = Field(primary_key=True)
    password_hash: str = Field(max_length=255)
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
    # Before `created_at`, which hides the function of that name for the rest of the class.
    rotated_at: datetime = filled_in()
    created_at: datetime = filled_in()
    idle_expires_at: datetime
    absolute_expires_at: datetime
    revoked_at: datetime | None = None
    revoke_reason: str | None = Field(default=None, max_length=32)
