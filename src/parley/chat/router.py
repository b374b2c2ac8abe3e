"""Conversations and messages over HTTP."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response

from parley.chat.assistants.dependencies import AssistantServiceDep
from parley.chat.branches import Edit
from parley.chat.dependencies import ChatDep, ConversationServiceDep
from parley.chat.schemas import (
    ConversationCreate,
    ConversationRead,
    ConversationUpdate,
    MessageEdit,
    MessageRead,
    MessageSend,
    Turn,
)
from parley.chat.service import Whose
from parley.chat.setup import Chat
from parley.chat.turn_stream import TurnStream
from parley.chat.turns import Again, Send, Sent
from parley.core.envelope import CursorEnvelope, Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.errors import Invalid
from parley.core.idempotency import ONCE_RESPONSES, RequestOnce
from parley.core.ids import new_id
from parley.core.pagination import MAX_PER_PAGE, Page
from parley.core.scope import Credential, CurrentScope, Scope
from parley.llm.registry import ModelInfo
from parley.realtime.dependencies import RealtimeDep
from parley.realtime.router import EventStream, EventStreamResponse
from parley.realtime.service import Realtime
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
    pinned: Annotated[bool | None, Query(description="Only those that the caller has pinned, or has not")] = None,
    whose: Annotated[
        Whose, Query(alias="filter", description="The caller's own, those that others share, or both")
    ] = "mine",
) -> Response:
    """List conversations: pinned ones first, then the one that moved last."""
    rows, total = await service.page(page, archived=archived, whose=whose, pinned=pinned)
    return respond_page(rows, page=page, total=total)


@router.post(
    "/conversations",
    status_code=201,
    response_model=Envelope[ConversationRead],
    responses={**ERRORS, **ONCE_RESPONSES},
    openapi_extra=_WRITE,
)
async def create_conversation(
    body: ConversationCreate,
    scope: CurrentScope,
    service: ConversationServiceDep,
    assistants: AssistantServiceDep,
    chat: ChatDep,
    once: RequestOnce,
) -> Response:
    """Make a conversation."""
    if body.model is not None:
        chat.models(scope).resolve(body.model)
    body.assistant = await assistants.resolve(body.assistant)
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
    conversation_id: UUID,
    body: ConversationUpdate,
    scope: CurrentScope,
    service: ConversationServiceDep,
    assistants: AssistantServiceDep,
    chat: ChatDep,
) -> Response:
    """Change a conversation; what is left out stays."""
    if body.model is not None:
        chat.models(scope).resolve(body.model)
    if body.assistant is not None:
        body.assistant = await assistants.resolve(body.assistant)
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
    branch: Annotated[UUID | None, Query(description="Only the branch that ends in this message")] = None,
) -> Response:
    """List messages of all branches, or of one: the newest stretch first, ascending within.

    Messages with the same `parent_id` are versions of each other.
    """
    rows, following = await service.messages(conversation_id, before=cursor, limit=limit, branch=branch)
    return respond(rows, next_cursor=str(following) if following else None)


_TURN: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "content": {"text/event-stream": {}},
        "description": "With `Accept: text/event-stream`: the events of this turn, to the terminal one",
    },
    409: {"model": ErrorEnvelope},
}


@router.post(
    "/conversations/{conversation_id}/messages",
    status_code=202,
    response_model=Envelope[Turn],
    responses=_TURN,
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
        contents=body.contents,
        model=body.model,
        parent=body.parent,
        on_active=body.on_active,
    )
    return await _answer(await chat.turns.send(scope, wanted), request, scope, chat, realtime)


@router.patch(
    "/messages/{message_id}",
    status_code=202,
    response_model=Envelope[Turn],
    responses=_TURN,
    openapi_extra=_WRITE,
)
async def edit_message(
    message_id: UUID,
    body: MessageEdit,
    request: Request,
    scope: CurrentScope,
    chat: ChatDep,
    realtime: RealtimeDep,
    idempotency_key: _Cid = None,
) -> Response:
    """Say something else in a message's place and have that answered: a branch, beside the old one, which stays."""
    wanted = Edit(message_id, _cid(idempotency_key), body.contents, model=body.model, on_active=body.on_active)
    return await _answer(await chat.branches.edit(scope, wanted), request, scope, chat, realtime)


async def _answer(sent: Sent, request: Request, scope: Scope, chat: Chat, realtime: Realtime) -> Response:
    """Return a turn as JSON at once, or its events as they come."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        return respond({"message": sent.message, "reply": sent.reply}, status=202)
    turn = TurnStream(EventStream(realtime, scope), sent)
    start_seq = await chat.turns.start_of(scope, UUID(sent.reply["id"]))
    credential: Credential = request.state.credential
    snapshot = await turn.open(f"conversation:{sent.message['conversation_id']}", start_seq)
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
async def list_models(scope: CurrentScope, chat: ChatDep) -> Response:
    """List the models: which can be used now, and why the rest cannot."""
    return respond(chat.models(scope).describe())
