"""Assistants over HTTP."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Response

from parley.chat.assistants.dependencies import AssistantServiceDep
from parley.chat.assistants.schemas import AssistantCreate, AssistantRead, AssistantUpdate
from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.idempotency import ONCE_RESPONSES, RequestOnce
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["assistants"])

_READ, _WRITE = needs(Permission.CHAT_READ), needs(Permission.ASSISTANTS_WRITE)
_ERRORS: dict[int | str, dict[str, Any]] = {404: {"model": ErrorEnvelope}, 422: {"model": ErrorEnvelope}}
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorEnvelope, "description": "The name is taken, or the version is not the current one"}
}


@router.get("/assistants", response_model=Envelope[list[AssistantRead]], openapi_extra=_READ)
async def list_assistants(service: AssistantServiceDep) -> Response:
    """List the built-in assistants and the workspace's own."""
    return respond(await service.list())


@router.post(
    "/assistants",
    status_code=201,
    response_model=Envelope[AssistantRead],
    responses={422: {"model": ErrorEnvelope}, **ONCE_RESPONSES, **_CONFLICT},
    openapi_extra=_WRITE,
)
async def create_assistant(body: AssistantCreate, service: AssistantServiceDep, once: RequestOnce) -> Response:
    """Make an assistant. Every member of the workspace can talk with it."""
    made = await service.create(body)
    return await once.keep(respond(made, status=201, headers={"Location": f"/api/v1/assistants/{made.id}"}))


@router.get(
    "/assistants/{assistant_id}", response_model=Envelope[AssistantRead], responses=_ERRORS, openapi_extra=_READ
)
async def get_assistant(assistant_id: UUID, service: AssistantServiceDep) -> Response:
    """Get one of the workspace's own assistants."""
    return respond(await service.get(assistant_id))


@router.patch(
    "/assistants/{assistant_id}",
    response_model=Envelope[AssistantRead],
    responses={**_ERRORS, **_CONFLICT},
    openapi_extra=_WRITE,
)
async def update_assistant(assistant_id: UUID, body: AssistantUpdate, service: AssistantServiceDep) -> Response:
    """Change an assistant; what is left out stays. Its maker and admins may."""
    return respond(await service.change(assistant_id, body))


@router.delete("/assistants/{assistant_id}", status_code=204, responses=_ERRORS, openapi_extra=_WRITE)
async def delete_assistant(assistant_id: UUID, service: AssistantServiceDep) -> Response:
    """Delete an assistant. Conversations that it answered in go on with the general one, without tools."""
    await service.delete(assistant_id)
    return Response(status_code=204)
