"""Workspaces, members and the audit log over HTTP."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AwareDatetime, BeforeValidator
from pydantic_core import PydanticCustomError

from parley.core.dependencies import RequestUnit
from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.idempotency import ONCE_RESPONSES, OwnUnitOnce
from parley.core.pagination import Page
from parley.core.scope import CurrentScope
from parley.tenancy.audit_log import AuditLog
from parley.tenancy.permissions import Permission, needs
from parley.tenancy.schemas import (
    AuditEventRead,
    MemberRead,
    MemberUpdate,
    WorkspaceCreate,
    WorkspaceRead,
    WorkspaceUpdate,
)
from parley.tenancy.workspaces import WorkspaceService

router = APIRouter(prefix="/workspaces", tags=["workspaces"])
audit_router = APIRouter(prefix="/audit", tags=["audit"])

_ABSENT: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorEnvelope, "description": "Absent, or not the workspace that the credential is for"}
}
_RULES: dict[int | str, dict[str, Any]] = {
    **_ABSENT,
    403: {"model": ErrorEnvelope, "description": "The caller's role does not reach that far"},
    409: {"model": ErrorEnvelope, "description": "`last_owner`, or `last_workspace` of the caller"},
}


def _dated(value: object) -> object:
    """Refuse a bare number, which Pydantic would take for seconds since 1970."""
    if isinstance(value, str) and "-" not in value[1:]:
        raise PydanticCustomError("datetime_parsing", "must be a date and a time with a time zone")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_dated)]


async def _service(request: Request) -> WorkspaceService:
    service: WorkspaceService = request.app.state.workspaces
    return service


WorkspacesDep = Annotated[WorkspaceService, Depends(_service)]


@router.get(
    "",
    summary="List the caller's workspaces",
    response_model=PageEnvelope[WorkspaceRead],
    openapi_extra=needs(Permission.WORKSPACES_READ),
)
async def list_workspaces(scope: CurrentScope, workspaces: WorkspacesDep, page: Page) -> Response:
    """List every workspace that the caller belongs to, with their role in it."""
    rows, total = await workspaces.list(scope, page)
    return respond_page(rows, page=page, total=total)


@router.post(
    "",
    status_code=201,
    summary="Make a workspace",
    response_model=Envelope[WorkspaceRead],
    responses=ONCE_RESPONSES,
    openapi_extra=needs(Permission.WORKSPACES_CREATE),
)
async def create_workspace(
    body: WorkspaceCreate, scope: CurrentScope, workspaces: WorkspacesDep, once: OwnUnitOnce
) -> Response:
    """Make a workspace with the caller as its owner. `POST auth/switch` goes there."""

    def answer(made: WorkspaceRead) -> Response:
        return respond(made, status=201, headers={"Location": f"/api/v1/workspaces/{made.id}"})

    await workspaces.create(scope, body.name, once.answering(answer))
    return once.response


@router.get(
    "/{workspace_id}",
    summary="Read a workspace",
    response_model=Envelope[WorkspaceRead],
    responses=_ABSENT,
    openapi_extra=needs(Permission.WORKSPACES_READ),
)
async def get_workspace(workspace_id: UUID, scope: CurrentScope, workspaces: WorkspacesDep) -> Response:
    """Read one of the caller's workspaces."""
    return respond(await workspaces.get(scope, workspace_id))


@router.patch(
    "/{workspace_id}",
    summary="Change the workspace",
    response_model=Envelope[WorkspaceRead],
    responses=_ABSENT,
    openapi_extra=needs(Permission.WORKSPACE_UPDATE),
)
async def update_workspace(
    workspace_id: UUID, body: WorkspaceUpdate, scope: CurrentScope, workspaces: WorkspacesDep
) -> Response:
    """Change the name of the workspace that the credential is for."""
    return respond(await workspaces.rename(scope, workspace_id, body.name))


@router.delete(
    "/{workspace_id}",
    status_code=204,
    response_class=Response,
    summary="Delete the workspace",
    responses=_RULES,
    openapi_extra=needs(Permission.WORKSPACE_DELETE),
)
async def delete_workspace(workspace_id: UUID, scope: CurrentScope, workspaces: WorkspacesDep) -> Response:
    """Delete the workspace that the credential is for, with everything in it. Sessions go on in another one."""
    await workspaces.delete(scope, workspace_id)
    return Response(status_code=204)


@router.get(
    "/{workspace_id}/members",
    summary="List members",
    response_model=PageEnvelope[MemberRead],
    responses=_ABSENT,
    openapi_extra=needs(Permission.MEMBERS_READ),
)
async def list_members(workspace_id: UUID, scope: CurrentScope, workspaces: WorkspacesDep, page: Page) -> Response:
    """List who belongs to the workspace, who joined first first."""
    rows, total = await workspaces.members(scope, workspace_id, page)
    return respond_page(rows, page=page, total=total)


@router.patch(
    "/{workspace_id}/members/{user_id}",
    summary="Change a member's role",
    response_model=Envelope[MemberRead],
    responses=_RULES,
    openapi_extra=needs(Permission.MEMBERS_MANAGE),
)
async def update_member(
    workspace_id: UUID, user_id: UUID, body: MemberUpdate, scope: CurrentScope, workspaces: WorkspacesDep
) -> Response:
    """Change what a member may. In force everywhere within two seconds, on open sockets too."""
    return respond(await workspaces.set_role(scope, workspace_id, user_id, body.role))


@router.delete(
    "/{workspace_id}/members/{user_id}",
    status_code=204,
    response_class=Response,
    summary="Remove a member, or leave",
    responses=_RULES,
    # Everyone may leave; who may remove whom is a rule of its own.
    openapi_extra=needs(Permission.MEMBERS_READ),
)
async def remove_member(workspace_id: UUID, user_id: UUID, scope: CurrentScope, workspaces: WorkspacesDep) -> Response:
    """Take a member out of the workspace; one's own id leaves it. What they made stays."""
    await workspaces.remove(scope, workspace_id, user_id)
    return Response(status_code=204)


@audit_router.get(
    "",
    summary="Read the audit log",
    response_model=PageEnvelope[AuditEventRead],
    openapi_extra=needs(Permission.AUDIT_READ),
)
async def list_audit_events(
    scope: CurrentScope,
    unit: RequestUnit,
    page: Page,
    action: Annotated[str | None, Query(max_length=64, pattern="^[a-z_.]+$", description="Only these")] = None,
    user_id: Annotated[UUID | None, Query(description="Only what this user did")] = None,
    since: Annotated[Moment | None, Query(description="From this moment on")] = None,
    until: Annotated[Moment | None, Query(description="Before this moment")] = None,
) -> Response:
    """Read what touched access in the workspace, newest first."""
    moments: dict[str, datetime | None] = {"since": since, "until": until}
    rows, total = await AuditLog(unit, scope).page(page, action=action, user_id=user_id, **moments)
    return respond_page(rows, page=page, total=total)
