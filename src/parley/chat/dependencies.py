"""What the chat's routes ask for."""

from typing import Annotated

from fastapi import Depends, Request

from parley.chat.service import ConversationService
from parley.chat.setup import Chat
from parley.core.dependencies import RequestUnit
from parley.core.scope import CurrentScope
from parley.realtime.dependencies import RealtimeDep


async def _chat(request: Request) -> Chat:
    chat: Chat = request.app.state.chat
    return chat


ChatDep = Annotated[Chat, Depends(_chat)]


async def _conversations(
    request: Request, unit: RequestUnit, scope: CurrentScope, realtime: RealtimeDep
) -> ConversationService:
    return ConversationService(unit, scope, realtime.bus, request.app.state.revocations)


ConversationServiceDep = Annotated[ConversationService, Depends(_conversations)]
