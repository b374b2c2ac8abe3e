"""The table of tasks."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, Index
from sqlmodel import Field

from parley.core.models import TenantTable, filled_in

TITLE_LENGTH = 200
DESCRIPTION_LENGTH = 5000


class Task(TenantTable, table=True):
    """Something to do, of one user, for ever: row-level security checks the user too."""

    __tablename__ = "tasks"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        Index("ix_tasks_user_id", "workspace_id", "user_id", "id"),
    )

    user_id: UUID
    title: str = Field(max_length=TITLE_LENGTH)
    description: str | None = Field(default=None, max_length=DESCRIPTION_LENGTH)
    completed: bool = False
    due_at: datetime | None = None
    created_at: datetime = filled_in()
    updated_at: datetime = filled_in()
