"""The state of the providers over HTTP."""

from typing import Any

from fastapi import APIRouter, Request, Response

from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.scope import CurrentScope
from parley.llm.health import ProviderRead, provider_reads
from parley.tenancy.permissions import Permission, needs

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorEnvelope},
    403: {"model": ErrorEnvelope, "description": "The role has no right to this, or the credential is an API key"},
}

router = APIRouter(prefix="/providers", tags=["models"], responses=_ERRORS)


@router.get(
    "",
    summary="List the providers and how they are doing",
    response_model=Envelope[list[ProviderRead]],
    openapi_extra=needs(Permission.PROVIDERS_READ),
)
async def list_providers(request: Request, scope: CurrentScope) -> Response:
    """List the providers of the registry, as the process that answers this has seen them since it began.

    With several processes each has figures of its own; the calls of all workspaces are in them. No text of a
    provider's is kept anywhere: errors are codes.
    """
    state = request.app.state
    found = provider_reads(state.registry, state.usage.health, scope.workspace_id)
    return respond(found, headers={"Cache-Control": "no-store"})
