"""The prompts over HTTP."""

from fastapi import APIRouter, Response

from parley.chat.assistants.schemas import PromptRead
from parley.chat.dependencies import ChatDep
from parley.core.envelope import Envelope, respond
from parley.core.scope import CurrentScope
from parley.tenancy.permissions import Permission, needs

router = APIRouter(tags=["assistants"])


@router.get("/prompts", response_model=Envelope[list[PromptRead]], openapi_extra=needs(Permission.PROMPTS_READ))
async def list_prompts(scope: CurrentScope, chat: ChatDep) -> Response:  # noqa: ARG001 - only who is signed in may ask
    """List the prompt files of this installation: the hash that replies are marked with, and what uses each."""
    return respond(chat.assistants.prompts())
