"""Exports and imports over HTTP."""

from typing import Annotated, Any, Final
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from parley.chat.attachments.dependencies import AttachmentsDep
from parley.chat.transfer.dependencies import ExporterDep, ImporterDep
from parley.chat.transfer.exporting import file_name
from parley.chat.transfer.importing import KIND
from parley.chat.transfer.schemas import ConversationExport, ExportFormat, ImportJob, ImportStarted
from parley.core.envelope import Envelope, ErrorEnvelope, respond
from parley.core.errors import BadRequest
from parley.core.idempotency import StreamedOnce
from parley.core.scope import CurrentScope
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["transfer"])

_BINARY: Final[dict[str, Any]] = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "The file itself: ChatGPT's or Claude's conversations.json, a ZIP of it, or an export of ours",
        "content": {"application/octet-stream": _BINARY},
    }
}


@router.get(
    "/conversations/{conversation_id}/export",
    response_model=ConversationExport,
    responses={
        401: {"model": ErrorEnvelope},
        404: {"model": ErrorEnvelope},
        200: {"content": {"text/markdown": {"schema": {"type": "string"}}}, "description": "The file"},
    },
    openapi_extra=needs(Permission.CHAT_READ),
)
async def export_conversation(
    conversation_id: UUID,
    scope: CurrentScope,
    exporter: ExporterDep,
    format: Annotated[ExportFormat, Query(description="`json` has every branch, `markdown` the one shown")] = "json",
    inline: Annotated[bool, Query(description="Put files into it, 20 MiB at most; the others are named only")] = False,
) -> Response:
    """Export a conversation that the caller may read."""
    about = await exporter.conversation(scope, conversation_id)
    if format == "json":
        pieces, media_type, ending = exporter.as_json(scope, about, inline=inline), "application/json", "json"
    else:
        pieces = exporter.as_markdown(scope, about, inline=inline)
        media_type, ending = "text/markdown; charset=utf-8", "md"
    plain, name = f"conversation-{conversation_id}.{ending}", quote(file_name(about, ending), safe="")
    headers = {"Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{name}"}
    return StreamingResponse(pieces, media_type=media_type, headers=headers)


@router.post(
    "/conversations/import",
    status_code=202,
    response_model=Envelope[ImportStarted],
    responses={
        401: {"model": ErrorEnvelope},
        409: {"model": ErrorEnvelope, "description": "`quota_exceeded`, or `request_in_flight`"},
        413: {"model": ErrorEnvelope},
    },
    openapi_extra={**needs(Permission.CHAT_WRITE), **_UPLOAD},
)
async def import_conversations(
    request: Request, scope: CurrentScope, attachments: AttachmentsDep, importer: ImporterDep, once: StreamedOnce
) -> Response:
    """Import conversations: a job, whose progress and result the caller's inbox tells.

    What is there from an earlier import stays as it is and is not doubled.
    """

    def settled(sha256: bytes) -> Any:
        return once(sha256).answering(
            lambda job_id: respond(ImportStarted(job=ImportJob(id=job_id, kind=KIND)), status=202)
        )

    try:
        done = await attachments.upload_import(scope, request.stream(), once=settled, then=importer.begin)
    except ClientDisconnect:
        raise BadRequest("The upload broke off.") from None
    return done.response
