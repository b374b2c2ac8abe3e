"""What the API takes and shows of workspaces and members."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import ConfigDict, StringConstraints

from parley.core.schemas import ReadModel, RequestModel, Text
from parley.core.scope import Role


class WorkspaceRead(ReadModel):
    """A workspace, with the caller's role in it."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={
            "examples": [{"id": "0193c0de-9f3a-7bd2-8000-2b1d4a5c6e7f", "name": "Ada's workspace", "role": "owner"}]
        },
    )

    id: UUID
    name: str
    role: Role


WorkspaceName = Annotated[Text, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]


class WorkspaceCreate(RequestModel):
    """A new workspace."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Research"}]})

    name: WorkspaceName


class WorkspaceUpdate(RequestModel):
    """What can be changed of a workspace."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "Research and more"}]})

    name: WorkspaceName


class MemberRead(ReadModel):
    """Someone who belongs to a workspace."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
                    "email": "ada@example.com",
                    "name": "Ada",
                    "role": "owner",
                    "joined_at": "2026-11-20T08:00:00Z",
                }
            ]
        }
    )

    user_id: UUID
    email: str | None
    name: str | None
    role: Role
    joined_at: datetime


class MemberUpdate(RequestModel):
    """A member's new role."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"role": "admin"}]})

    role: Role


class AuditEventRead(ReadModel):
    """Something that touched access. `target` is what it was done to."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "0193c0de-9f3a-7bd2-8000-5e4d3c2b1a09",
                    "at": "2026-11-21T09:30:00Z",
                    "actor": "user",
                    "user_id": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
                    "credential_id": "0193c0de-9f3a-7bd2-8000-4d3c2b1a0f9e",
                    "action": "member.role_changed",
                    "outcome": "success",
                    "target": "0193c0de-9f3a-7bd2-8000-1a0f9e4d3c2b",
                    "address": "203.0.113.7",
                    "user_agent": "curl/8.5",
                    "request_id": "req_0193c0de9f3a7bd2",
                    "details": {"before": "member", "after": "admin"},
                }
            ]
        }
    )

    id: UUID
    at: datetime
    actor: str
    user_id: UUID | None
    credential_id: UUID | None
    action: str
    outcome: str
    target: str | None
    address: str | None
    user_agent: str | None
    request_id: str | None
    details: dict[str, Any]
