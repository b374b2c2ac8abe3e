"""What the assistants' routes ask for."""

from typing import Annotated

from fastapi import Depends

from parley.chat.assistants.service import AssistantService
from parley.chat.dependencies import ChatDep
from parley.core.dependencies import RequestUnit
from parley.core.scope import CurrentScope


async def _service(unit: RequestUnit, scope: CurrentScope, chat: ChatDep) -> AssistantService:
    return AssistantService(unit, scope, chat.assistants)


AssistantServiceDep = Annotated[AssistantService, Depends(_service)]
