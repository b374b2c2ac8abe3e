"""Tables of assistants."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, CheckConstraint, Column, ForeignKeyConstraint, UniqueConstraint
from sqlmodel import Field

from parley.core.models import TenantTable, filled_in

NAME_LENGTH = 64
TITLE_LENGTH = 100
DESCRIPTION_LENGTH = 1_000
INSTRUCTIONS_LENGTH = 16_000


class Assistant(TenantTable, table=True):
    """An assistant that a workspace has made. `version` counts its changes."""

    __tablename__ = "assistants"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        UniqueConstraint("workspace_id", "name"),
        CheckConstraint("approval IN ('always', 'writes', 'never')", name="approval"),
    )

    name: str = Field(max_length=NAME_LENGTH)
    title: str = Field(max_length=TITLE_LENGTH)
    description: str = Field(max_length=DESCRIPTION_LENGTH)
    instructions: str = Field(max_length=INSTRUCTIONS_LENGTH)
    model: str | None = Field(default=None, max_length=100)
    tools: Any = Field(default=None, sa_column=Column(JSON(none_as_null=True), nullable=True))
    approval: str = Field(max_length=8)
    approval_tools: Any = Field(sa_column=Column(JSON, nullable=False))
    parameters: Any = Field(sa_column=Column(JSON, nullable=False))
    created_by: UUID | None = None
    version: int
    created_at: datetime = filled_in()
    updated_at: datetime = filled_in()
