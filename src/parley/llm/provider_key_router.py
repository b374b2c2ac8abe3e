"""Workspaces' own keys of providers over HTTP."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from parley.core.dependencies import RequestUnit
from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.schemas import Text
from parley.llm.provider_key_schemas import ProviderKeyRead, ProviderKeySet
from parley.llm.provider_key_service import ProviderKeyService
from parley.tenancy.permissions import Permission, needs

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorEnvelope},
    403: {"model": ErrorEnvelope, "description": "The role has no right to keys, or the credential is an API key"},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorEnvelope, "description": "No such provider or key"}}
_KEYS = needs(Permission.PROVIDER_KEYS_MANAGE)
_NO_STORE = {"Cache-Control": "no-store"}

router = APIRouter(prefix="/provider-keys", tags=["models"], responses=_ERRORS)

ProviderPath = Annotated[Text, Path(min_length=1, max_length=100, description="A provider of the model registry")]


async def _service(request: Request, unit: RequestUnit) -> ProviderKeyService:
    state = request.app.state
    return ProviderKeyService(unit, unit.scope, state.provider_keys, state.registry, state.revocations)


ProviderKeysDep = Annotated[ProviderKeyService, Depends(_service)]


@router.get(
    "",
    summary="List the workspace's keys of providers",
    response_model=Envelope[list[ProviderKeyRead]],
    openapi_extra=_KEYS,
)
async def list_provider_keys(keys: ProviderKeysDep) -> Response:
    """List the providers that the workspace may have a key for, and what is known of those that are set."""
    return respond(await keys.list(), headers=_NO_STORE)


@router.put(
    "/{provider}",
    summary="Set the workspace's key of a provider",
    response_model=Envelope[ProviderKeyRead],
    responses={**_NOT_FOUND, 422: {"model": ErrorEnvelope}},
    openapi_extra=_KEYS,
)
async def set_provider_key(provider: ProviderPath, keys: ProviderKeysDep, body: ProviderKeySet) -> Response:
    """Use this key, and this URL if one is given, for the workspace's calls. It can be replaced, but not read."""
    return respond(await keys.set(provider, body), headers=_NO_STORE)


@router.delete(
    "/{provider}",
    status_code=204,
    response_class=Response,
    summary="Remove the workspace's key of a provider",
    responses=_NOT_FOUND,
    openapi_extra=_KEYS,
)
async def delete_provider_key(provider: ProviderPath, keys: ProviderKeysDep) -> Response:
    """Forget the key. Calls use the operator's again, where there is one."""
    await keys.delete(provider)
    return Response(status_code=204)
