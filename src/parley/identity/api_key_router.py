"""API keys over HTTP."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response

from parley.core.dependencies import RequestUnit
from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.idempotency import ONCE_RESPONSES, RequestOnce
from parley.core.pagination import Page
from parley.identity.api_key_schemas import ApiKeyCreate, ApiKeyCreated, ApiKeyRead
from parley.identity.api_keys import ApiKeyService
from parley.tenancy.permissions import Permission, needs

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorEnvelope},
    403: {"model": ErrorEnvelope, "description": "The role has no right to keys, or the credential is a key itself"},
    422: {"model": ErrorEnvelope},
}
_NO_STORE = {"Cache-Control": "no-store"}
_KEYS = needs(Permission.KEYS_MANAGE)

router = APIRouter(prefix="/api-keys", tags=["api keys"], responses=_ERRORS)


async def _service(request: Request, unit: RequestUnit) -> ApiKeyService:
    state = request.app.state
    return ApiKeyService(unit, unit.scope, state.api_keys.format, state.revocations)


ApiKeysDep = Annotated[ApiKeyService, Depends(_service)]


@router.get("", summary="List API keys", response_model=PageEnvelope[ApiKeyRead], openapi_extra=_KEYS)
async def list_api_keys(keys: ApiKeysDep, page: Page) -> Response:
    """List the keys that the caller has made in this workspace, newest first. The keys themselves are shown never."""
    rows, total = await keys.list(page)
    return respond_page(rows, page=page, total=total)


@router.post(
    "",
    status_code=201,
    summary="Make an API key",
    response_model=Envelope[ApiKeyCreated],
    responses=ONCE_RESPONSES,
    openapi_extra=_KEYS,
)
async def create_api_key(keys: ApiKeysDep, once: RequestOnce, body: ApiKeyCreate) -> Response:
    """Make a key with some of the caller's rights. `key` is shown this once; a repeated request is answered without."""
    made = await keys.create(body)
    headers = {"Location": f"/api/v1/api-keys/{made.id}", **_NO_STORE}
    without = respond(ApiKeyRead.model_construct(**made.model_dump(exclude={"key"})), status=201, headers=headers)
    return await once.keep(respond(made, status=201, headers=headers), replayed=without)


@router.delete(
    "/{key_id}",
    status_code=204,
    response_class=Response,
    summary="Revoke an API key",
    responses={404: {"model": ErrorEnvelope, "description": "No such key, or not the caller's"}},
    openapi_extra=_KEYS,
)
async def revoke_api_key(keys: ApiKeysDep, key_id: UUID) -> Response:
    """End a key: requests with it are refused from now on, and its sockets are closed."""
    await keys.revoke(key_id)
    return Response(status_code=204)
