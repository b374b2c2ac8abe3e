"""Invitations over HTTP."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response

from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.idempotency import ONCE_RESPONSES, OwnUnitOnce
from parley.core.pagination import Page
from parley.core.scope import CurrentScope
from parley.identity.invitation_schemas import InvitationAccept, InvitationAccepted, InvitationCreate, InvitationRead
from parley.identity.invitations import Invitations
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["workspaces"])

_ABSENT: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorEnvelope, "description": "Absent, or not of the workspace that the credential is for"}
}
_MANAGE = needs(Permission.MEMBERS_MANAGE)


async def _service(request: Request) -> Invitations:
    service: Invitations = request.app.state.invitations
    return service


InvitationsDep = Annotated[Invitations, Depends(_service)]


@router.get(
    "/workspaces/{workspace_id}/invitations",
    summary="List open invitations",
    response_model=PageEnvelope[InvitationRead],
    responses=_ABSENT,
    openapi_extra=_MANAGE,
)
async def list_invitations(
    workspace_id: UUID, scope: CurrentScope, invitations: InvitationsDep, page: Page
) -> Response:
    """List the invitations that nobody has accepted yet, newest first."""
    rows, total = await invitations.list(scope, workspace_id, page)
    return respond_page(rows, page=page, total=total)


@router.post(
    "/workspaces/{workspace_id}/invitations",
    status_code=201,
    summary="Invite someone",
    response_model=Envelope[InvitationRead],
    responses={
        **ONCE_RESPONSES,
        **_ABSENT,
        403: {"model": ErrorEnvelope, "description": "The caller's role does not reach that far"},
        409: {"model": ErrorEnvelope, "description": "`already_member`; or a request with this key is in flight"},
    },
    openapi_extra=_MANAGE,
)
async def create_invitation(
    workspace_id: UUID, body: InvitationCreate, scope: CurrentScope, invitations: InvitationsDep, once: OwnUnitOnce
) -> Response:
    """Invite an address by mail. An open invitation of the same address is replaced."""

    def answer(made: InvitationRead) -> Response:
        location = f"/api/v1/workspaces/{workspace_id}/invitations/{made.id}"
        return respond(made, status=201, headers={"Location": location})

    await invitations.create(scope, workspace_id, body, once.answering(answer))
    return once.response


@router.delete(
    "/workspaces/{workspace_id}/invitations/{invitation_id}",
    status_code=204,
    response_class=Response,
    summary="Take an invitation back",
    responses=_ABSENT,
    openapi_extra=_MANAGE,
)
async def revoke_invitation(
    workspace_id: UUID, invitation_id: UUID, scope: CurrentScope, invitations: InvitationsDep
) -> Response:
    """Take an open invitation back: its link is good no more."""
    await invitations.revoke(scope, workspace_id, invitation_id)
    return Response(status_code=204)


@router.post(
    "/invitations/accept",
    summary="Accept an invitation",
    response_model=Envelope[InvitationAccepted],
    responses={
        403: {"model": ErrorEnvelope, "description": "`invitation_for_another`: sent to another address"},
        422: {"model": ErrorEnvelope, "description": "`link_invalid`: the token is not good any more; or the body"},
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def accept_invitation(body: InvitationAccept, scope: CurrentScope, invitations: InvitationsDep) -> Response:
    """Join the workspace of an invitation that was sent to the caller's address. `POST auth/switch` goes there."""
    return respond(InvitationAccepted(workspace=await invitations.accept(scope, body.token)))
