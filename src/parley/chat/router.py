"""Conversations and messages over HTTP."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response

from parley.chat.dependencies import ChatDep, ConversationServiceDep
from parley.chat.schemas import ConversationCreate, ConversationRead, ConversationUpdate, MessageRead, MessageSend, Turn
from parley.chat.turn_stream import TurnStream
from parley.chat.turns import Again, Send
from parley.core.envelope import CursorEnvelope, Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.errors import Invalid
from parley.core.idempotency import ONCE_RESPONSES, RequestOnce
from parley.core.ids import new_id
from parley.core.pagination import MAX_PER_PAGE, Page
from parley.core.scope import Credential, CurrentScope
from parley.llm.registry import ModelInfo
from parley.realtime.dependencies import RealtimeDep
from parley.realtime.router import EventStream, EventStreamResponse
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["chat"])

_READ, _WRITE = needs(Permission.CHAT_READ), needs(Permission.CHAT_WRITE)
_Cid = Annotated[str | None, Header(max_length=64, description="A UUID; the same one sends once")]
_MODELS = needs(Permission.MODELS_READ)

ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorEnvelope},
    404: {"model": ErrorEnvelope},
    422: {"model": ErrorEnvelope},
}


@router.get("/conversations", response_model=PageEnvelope[ConversationRead], openapi_extra=_READ)
async def list_conversations(
    service: ConversationServiceDep,
    page: Page,
    archived: Annotated[bool, Query(description="Show the archived ones instead")] = False,
) -> Response:
    """List the caller's conversations, the one that moved last first."""
    rows, total = await service.page(page, archived=archived)
    return respond_page(rows, page=page, total=total)


@router.post(
    "/conversations",
    status_code=201,
    response_model=Envelope[ConversationRead],
    responses={**ERRORS, **ONCE_RESPONSES},
    openapi_extra=_WRITE,
)
async def create_conversation(
    body: ConversationCreate, service: ConversationServiceDep, chat: ChatDep, once: RequestOnce
) -> Response:
    """Make a conversation."""
    if body.model is not None:
        chat.registry.resolve(body.model)
    made = await service.start(body)
    return await once.keep(respond(made, status=201, headers={"Location": f"/api/v1/conversations/{made.id}"}))


@router.get(
    "/conversations/{conversation_id}", response_model=Envelope[ConversationRead], responses=ERRORS, openapi_extra=_READ
)
async def get_conversation(conversation_id: UUID, service: ConversationServiceDep) -> Response:
    """Get a conversation."""
    return respond(await service.get(conversation_id))


@router.patch(
    "/conversations/{conversation_id}",
    response_model=Envelope[ConversationRead],
    responses=ERRORS,
    openapi_extra=_WRITE,
)
async def update_conversation(
    conversation_id: UUID, body: ConversationUpdate, service: ConversationServiceDep, chat: ChatDep
) -> Response:
    """Change a conversation; what is left out stays."""
    if body.model is not None:
        chat.registry.resolve(body.model)
    return respond(await service.change(conversation_id, body))


@router.delete("/conversations/{conversation_id}", status_code=204, responses=ERRORS, openapi_extra=_WRITE)
async def delete_conversation(conversation_id: UUID, service: ConversationServiceDep) -> Response:
    """Delete a conversation with all its messages."""
    await service.delete(conversation_id)
    return Response(status_code=204)


@router.get(
    "/conversations/{conversation_id}/messages",
    response_model=CursorEnvelope[MessageRead],
    responses=ERRORS,
    openapi_extra=_READ,
)
async def list_messages(
    conversation_id: UUID,
    service: ConversationServiceDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PER_PAGE)] = 50,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the stretch before")] = None,
) -> Response:
    """List messages of all branches: the newest stretch first, ascending within."""
    rows, following = await service.messages(conversation_id, before=cursor, limit=limit)
    return respond(rows, next_cursor=str(following) if following else None)


@router.post(
    "/conversations/{conversation_id}/messages",
    status_code=202,
    response_model=Envelope[Turn],
    responses={
        **ERRORS,
        200: {
            "content": {"text/event-stream": {}},
            "description": "With `Accept: text/event-stream`: the events of this turn, to the terminal one",
        },
        409: {"model": ErrorEnvelope},
    },
    openapi_extra=_WRITE,
)
async def send_message(
    conversation_id: UUID,
    body: MessageSend,
    request: Request,
    scope: CurrentScope,
    chat: ChatDep,
    realtime: RealtimeDep,
    idempotency_key: _Cid = None,
) -> Response:
    """Send a message and have it answered. The question is durable before this answers."""
    wanted = Send(
        conversation_id=conversation_id,
        cid=_cid(idempotency_key),
        texts=tuple(body.texts),
        model=body.model,
        parent=body.parent,
        on_active=body.on_active,
    )
    sent = await chat.turns.send(scope, wanted)
    if "text/event-stream" not in request.headers.get("accept", ""):
        return respond({"message": sent.message, "reply": sent.reply}, status=202)
    turn = TurnStream(EventStream(realtime, scope), sent)
    start_seq = await chat.turns.start_of(scope, UUID(sent.reply["id"]))
    credential: Credential = request.state.credential
    snapshot = await turn.open(f"conversation:{conversation_id}", start_seq)
    return EventStreamResponse(
        turn.follow(snapshot, until=credential.expires_at), timeout_s=realtime.settings.ack_timeout_s
    )


def _cid(header: str | None) -> UUID:
    if header is None:
        return new_id()
    try:
        return UUID(header)
    except ValueError:
        raise Invalid(
            "Idempotency-Key must be a UUID here", details={"field": "Idempotency-Key", "constraint": "uuid"}
        ) from None


@router.post(
    "/replies/{reply_id}/cancel",
    status_code=202,
    response_model=Envelope[dict[str, str]],
    responses=ERRORS,
    openapi_extra=_WRITE,
)
async def cancel_reply(reply_id: UUID, scope: CurrentScope, chat: ChatDep) -> Response:
    """Stop a reply. Durable, and harmless where it has ended."""
    await chat.ends.cancel(scope, reply_id)
    return respond({"reply": str(reply_id)}, status=202)


@router.post(
    "/replies/{reply_id}/continue",
    status_code=202,
    response_model=Envelope[Turn],
    responses={**ERRORS, 409: {"model": ErrorEnvelope}},
    openapi_extra=_WRITE,
)
async def continue_reply(reply_id: UUID, scope: CurrentScope, chat: ChatDep, idempotency_key: _Cid = None) -> Response:
    """Go on from where a reply stopped, in a reply of its own. `message` is the one that is continued."""
    sent = await chat.turns.again(scope, Again(reply_id, _cid(idempotency_key), "continue"))
    return respond({"message": sent.message, "reply": sent.reply}, status=202)


@router.post(
    "/replies/{reply_id}/regenerate",
    status_code=202,
    response_model=Envelope[Turn],
    responses={**ERRORS, 409: {"model": ErrorEnvelope}},
    openapi_extra=_WRITE,
)
async def regenerate_reply(
    reply_id: UUID, scope: CurrentScope, chat: ChatDep, idempotency_key: _Cid = None
) -> Response:
    """Answer the same question once more, beside the first answer. `message` is the question."""
    sent = await chat.turns.again(scope, Again(reply_id, _cid(idempotency_key), "regenerate"))
    return respond({"message": sent.message, "reply": sent.reply}, status=202)


@router.get(
    "/models",
    response_model=Envelope[list[ModelInfo]],
    responses={401: {"model": ErrorEnvelope}},
    openapi_extra=_MODELS,
)
async def list_models(scope: CurrentScope, chat: ChatDep) -> Response:  # noqa: ARG001 - only who is signed in may ask
    """List the models: which can be used now, and why the rest cannot."""
    return respond(chat.registry.describe())
