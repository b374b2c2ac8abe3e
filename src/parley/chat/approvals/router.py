"""Approvals over HTTP."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Response

from parley.chat.approvals.schemas import Approval, ApprovalRead
from parley.chat.dependencies import ChatDep
from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.scope import CurrentScope
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["chat"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorEnvelope},
    409: {"model": ErrorEnvelope, "description": "It was decided the other way, or no longer waits"},
    422: {"model": ErrorEnvelope},
}


@router.post(
    "/tool-calls/{call_id}/approve",
    response_model=Envelope[ApprovalRead],
    responses=_ERRORS,
    openapi_extra=needs(Permission.CHAT_WRITE),
)
async def approve_tool_call(call_id: UUID, body: Approval, scope: CurrentScope, chat: ChatDep) -> Response:
    """Say yes or no to a tool call that waits. The first answer holds; the same one again is harmless."""
    return respond(await chat.approvals.decide(scope, call_id, approved=body.approved))
