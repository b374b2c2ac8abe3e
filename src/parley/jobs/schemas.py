"""Jobs as the API and the inbox show them."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import orjson
from pydantic import BaseModel, ConfigDict
from sqlalchemy.engine import RowMapping

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]


class JobProgress(BaseModel):
    """How far a job is. `total` is null while nobody knows it."""

    done: int
    total: int | None
    note: str | None


class JobRead(BaseModel):
    """A piece of work that was begun for the caller. Its payload is not shown."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "0193c0de-9f3a-7bd2-8000-000000000001",
                    "kind": "export",
                    "status": "running",
                    "progress": {"done": 3, "total": 10, "note": "conversations"},
                    "result": None,
                    "error": None,
                    "attempts": 1,
                    "created_at": "2026-11-21T09:00:00Z",
                    "started_at": "2026-11-21T09:00:01Z",
                    "finished_at": None,
                }
            ]
        }
    )

    id: UUID
    kind: str
    status: JobStatus
    progress: JobProgress | None
    result: dict[str, Any] | None
    error: str | None
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of_row(cls, row: Mapping[str, Any] | RowMapping | asyncpg.Record) -> "JobRead":
        """Return the job of a row; asyncpg gives JSON columns as text."""
        values = {name: row[name] for name in cls.model_fields}
        for name in ("progress", "result"):
            if isinstance(values[name], str):
                values[name] = orjson.loads(values[name])
        return cls.model_validate(values)
