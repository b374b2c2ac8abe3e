"""The table of the outbox."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, CheckConstraint, Column, Index, text
from sqlmodel import Field

from parley.core.models import NOW, TenantTable, filled_in


class Job(TenantTable, table=True):
    """A piece of work. That of the installation itself has the nil workspace."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'completed', 'failed', 'cancelled')", name="status"),
        Index(
            "uq_jobs_dedupe_key",
            "workspace_id",
            "kind",
            "dedupe_key",
            unique=True,
            postgresql_where=text("dedupe_key IS NOT NULL"),
        ),
        Index("ix_jobs_due", "workspace_id", "run_at", postgresql_where=text("status = 'queued'")),
        Index("ix_jobs_running", "workspace_id", "lease_until", postgresql_where=text("status = 'running'")),
        Index("ix_jobs_user_id", "workspace_id", "user_id", "id"),
    )

    user_id: UUID | None = None
    kind: str = Field(max_length=64)
    status: str = Field(max_length=16, default="queued", sa_column_kwargs={"server_default": text("'queued'")})
    payload: Any = Field(sa_column=Column(JSON, nullable=False))
    dedupe_key: str | None = Field(default=None, max_length=128)
    progress: Any = Field(default=None, sa_column=Column(JSON))
    result: Any = Field(default=None, sa_column=Column(JSON))
    error: str | None = Field(default=None, max_length=500)
    attempts: int = Field(default=0, sa_column_kwargs={"server_default": text("0")})
    max_attempts: int
    run_at: datetime = Field(default=None, sa_column_kwargs={"server_default": NOW, "nullable": False})
    owner: UUID | None = None
    lease_until: datetime | None = None
    created_at: datetime = filled_in()
    started_at: datetime | None = None
    finished_at: datetime | None = None
