"""API shapes of approvals."""

from uuid import UUID

from pydantic import ConfigDict, StrictBool

from parley.core.schemas import ReadModel, RequestModel


class Approval(RequestModel):
    """Yes or no to a tool call."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"approved": True}]})

    approved: StrictBool


class ApprovalRead(ReadModel):
    """How a tool call was decided."""

    call: UUID
    reply: UUID
    approved: bool
