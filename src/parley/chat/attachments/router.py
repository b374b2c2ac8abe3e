"""Attachments over HTTP: a file is the body itself, not a form."""

from typing import Annotated, Any, Final
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from parley.chat.attachments.dependencies import AttachmentsDep
from parley.chat.attachments.schemas import NAME_LENGTH, AttachmentRead
from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.errors import BadRequest, TooLarge
from parley.core.idempotency import ONCE_RESPONSES, StreamedOnce
from parley.core.schemas import Text
from parley.core.scope import CurrentScope
from parley.core.settings import AttachmentSettings
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["attachments"])

_BINARY: Final[dict[str, Any]] = {"schema": {"type": "string", "format": "binary"}}
_SHOWN: Final = ("image/png", "image/jpeg", "image/gif", "image/webp", "text/plain")
_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "The file itself",
        "content": {"application/octet-stream": _BINARY},
    }
}
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {401: {"model": ErrorEnvelope}, 404: {"model": ErrorEnvelope}}
# Whatever a file holds: nothing in it is run, nothing is loaded for it, and no page of ours frames it.
_POLICY: Final = "default-src 'none'; sandbox; frame-ancestors 'none'"


def body_limits(settings: AttachmentSettings, prefix: str) -> dict[str, int]:
    """Return the paths that take larger bodies than others, and how large."""
    return {
        f"{prefix}/attachments": max(settings.image_bytes, settings.text_bytes),
        f"{prefix}/conversations/import": settings.import_bytes,
    }


@router.post(
    "/attachments",
    status_code=201,
    response_model=Envelope[AttachmentRead],
    responses={
        401: {"model": ErrorEnvelope},
        413: {"model": ErrorEnvelope, "description": "Too many bytes or pixels"},
        422: {"model": ErrorEnvelope, "description": "`unsupported_type`, `type_mismatch` or `image_damaged`"},
        **ONCE_RESPONSES,
    },
    openapi_extra={**needs(Permission.CHAT_WRITE), **_UPLOAD},
)
async def upload_attachment(
    request: Request,
    scope: CurrentScope,
    attachments: AttachmentsDep,
    once: StreamedOnce,
    name: Annotated[Text, Query(max_length=NAME_LENGTH, description="The file's name")] = "",
) -> Response:
    """Upload an image or a text file, to be sent with a message. What it is, is read from its bytes."""

    def settled(sha256: bytes) -> Any:
        return once(sha256).answering(
            lambda made: respond(made, status=201, headers={"Location": f"/api/v1/attachments/{made.id}"})
        )

    limit = max(attachments.settings.image_bytes, attachments.settings.text_bytes)
    if int(request.headers.get("content-length") or 0) > limit:
        raise TooLarge(f"The file is larger than {limit} bytes.")
    declared = request.headers.get("content-type", "")
    try:
        done = await attachments.upload(scope, request.stream(), name=name, declared=declared, once=settled)
    except ClientDisconnect:
        raise BadRequest("The upload broke off.") from None
    return done.response


@router.get(
    "/attachments/{attachment_id}",
    response_class=StreamingResponse,
    responses={
        **_ERRORS,
        200: {"content": dict.fromkeys(_SHOWN, _BINARY), "description": "The file: an image as it is, or text"},
    },
    openapi_extra=needs(Permission.CHAT_READ),
)
async def download_attachment(attachment_id: UUID, scope: CurrentScope, attachments: AttachmentsDep) -> Response:
    """Download an attachment: one's own, or one of a conversation that the caller may read."""
    about, pieces = await attachments.open(scope, attachment_id)
    image = about.kind == "image"
    headers = {
        "Content-Disposition": f"{'inline' if image else 'attachment'}; filename*=UTF-8''{quote(about.name, safe='')}",
        "Content-Length": str(about.size),
        "Content-Security-Policy": _POLICY,
        "Cache-Control": "private, no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    media_type = about.media_type if image else "text/plain; charset=utf-8"
    return StreamingResponse(pieces, media_type=media_type, headers=headers)


@router.delete(
    "/attachments/{attachment_id}",
    status_code=204,
    responses={**_ERRORS, 409: {"model": ErrorEnvelope, "description": "`attachment_in_use`: a message has it"}},
    openapi_extra=needs(Permission.CHAT_WRITE),
)
async def delete_attachment(attachment_id: UUID, scope: CurrentScope, attachments: AttachmentsDep) -> Response:
    """Remove an attachment that no message has. One that has been sent goes with its conversation."""
    await attachments.delete(scope, attachment_id)
    return Response(status_code=204)
