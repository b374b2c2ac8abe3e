"""The caller's own account over HTTP."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.idempotency import OwnUnitOnce
from parley.core.scope import CurrentScope
from parley.identity.dependencies import ErasuresDep, ExportsDep, IdentityDep, PasswordsDep
from parley.identity.exports import KIND as EXPORT_KIND
from parley.identity.schemas import AccountDelete, ErasureRead, ExportStarted, MeRead, StartedJob, UserUpdate
from parley.tenancy.permissions import Permission, needs

_INVALID = {"model": ErrorEnvelope, "description": "The body does not hold; `details.field` says where"}
_BUSY = {"model": ErrorEnvelope, "description": "The database is away or too many sign-ins wait; see Retry-After"}

router = APIRouter(prefix="/me", tags=["me"])


@router.get(
    "",
    summary="Read the caller",
    response_model=Envelope[MeRead],
    responses={401: {"model": ErrorEnvelope}, 503: _BUSY},
    openapi_extra=needs(Permission.PROFILE_READ),
)
async def get_me(scope: CurrentScope, identity: IdentityDep) -> Response:
    """Return the caller and the workspace that the token is for."""
    return respond(await identity.me(scope))


@router.patch(
    "",
    summary="Change the caller",
    response_model=Envelope[MeRead],
    responses={401: {"model": ErrorEnvelope}, 422: _INVALID, 503: _BUSY},
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def update_me(body: UserUpdate, scope: CurrentScope, identity: IdentityDep, passwords: PasswordsDep) -> Response:
    """Change the caller's name, or their address: that stays as it is until the new one is confirmed by mail."""
    if body.email is not None and body.current_password is not None:
        await passwords.change_email(scope, email=body.email, current_password=body.current_password)
    if "name" in body.model_fields_set:
        return respond(await identity.rename(scope, body.name))
    return respond(await identity.me(scope))


@router.delete(
    "",
    status_code=202,
    summary="Delete the caller",
    response_model=Envelope[ErasureRead],
    responses={
        401: {"model": ErrorEnvelope},
        403: {"model": ErrorEnvelope, "description": "`invalid_credentials`: the current password is not right"},
        409: {"model": ErrorEnvelope, "description": "`last_owner`; `details.workspace_ids` need another owner first"},
        422: _INVALID,
        503: _BUSY,
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def delete_me(body: AccountDelete, scope: CurrentScope, erasures: ErasuresDep) -> Response:
    """Close the account at once and erase it when the days to come back are over.

    Every session and key ends. Workspaces that nobody else is in are erased with it.
    """
    erase_after = await erasures.request(scope, current_password=body.current_password, confirm=body.confirm)
    return respond(ErasureRead(erase_after=erase_after), status=202)


@router.post(
    "/export",
    status_code=202,
    summary="Export the caller's data",
    response_model=Envelope[ExportStarted],
    responses={
        401: {"model": ErrorEnvelope},
        409: {"model": ErrorEnvelope, "description": "`export_running`: one is being made already"},
        429: {"model": ErrorEnvelope, "description": "The third within 24 hours; see Retry-After"},
        503: _BUSY,
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def request_export(scope: CurrentScope, exports: ExportsDep, once: OwnUnitOnce) -> Response:
    """Pack all data of the caller, of every workspace, into a ZIP of JSON: a job, and a mail when it is done."""
    once.answering(lambda job_id: respond(ExportStarted(job=StartedJob(id=job_id, kind=EXPORT_KIND)), status=202))
    await exports.request(scope, once=once)
    return once.response


@router.get(
    "/exports/{export_id}",
    summary="Fetch an export",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
            "description": "The archive; the second request for it is a 404",
        },
        401: {"model": ErrorEnvelope},
        403: {"model": ErrorEnvelope, "description": "`sign_in_again`: no token, and the session is not fresh"},
        404: {"model": ErrorEnvelope, "description": "There is none, it has expired, or it was fetched already"},
        503: _BUSY,
    },
    openapi_extra=needs(Permission.ACCOUNT_MANAGE),
)
async def fetch_export(
    export_id: UUID,
    scope: CurrentScope,
    exports: ExportsDep,
    token: Annotated[str | None, Query(max_length=100, description="From the link in the mail")] = None,
) -> Response:
    """Send an export, once: with the token of the mail, or within ten minutes of signing in."""
    file = await exports.open(scope, export_id, token=token)
    headers = {
        "Content-Disposition": f'attachment; filename="parley-export-{export_id}.zip"',
        "Content-Length": str(file.size),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(file.pieces, media_type="application/zip", headers=headers)
