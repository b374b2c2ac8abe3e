"""What the API takes and shows of invitations. The token stands in the mail and nowhere else."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from parley.core.schemas import ReadModel, RequestModel, Text
from parley.core.scope import Role
from parley.identity.schemas import Email
from parley.tenancy.schemas import WorkspaceRead

_INVITATION: JsonDict = {
    "id": "0193c0de-9f3a-7bd2-8000-6f5e4d3c2b1a",
    "email": "grace@example.com",
    "role": "member",
    "invited_by": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
    "created_at": "2026-11-21T09:30:00Z",
    "expires_at": "2026-11-28T09:30:00Z",
}


class InvitationCreate(RequestModel):
    """Whom to invite, and as what."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"email": "grace@example.com", "role": "member"}]})

    email: Email
    role: Role = Role.MEMBER


class InvitationRead(ReadModel):
    """An open invitation."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [_INVITATION]})

    id: UUID
    email: str
    role: Role
    invited_by: UUID
    created_at: datetime
    expires_at: datetime


class InvitationAccept(RequestModel):
    """The token from the mail."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token": "parley_in_AZ8xQ0Ib…"}]})

    token: Annotated[Text, Field(max_length=512, repr=False)]


class InvitationAccepted(ReadModel):
    """Where the caller is a member now. The session stays where it was until it is switched."""

    workspace: WorkspaceRead
