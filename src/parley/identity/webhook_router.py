"""Messages from other issuers over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from parley.core.envelope import ErrorEnvelope
from parley.core.scope import PUBLIC
from parley.identity.clerk_webhooks import ClerkWebhooks

router = APIRouter(prefix="/webhooks", tags=["webhooks"])


async def _service(request: Request) -> ClerkWebhooks:
    service: ClerkWebhooks = request.app.state.clerk_webhooks
    return service


@router.post(
    "/clerk",
    status_code=204,
    response_class=Response,
    summary="Take a message from Clerk",
    responses={
        400: {"model": ErrorEnvelope, "description": "`signature_invalid`"},
        404: {"model": ErrorEnvelope, "description": "Clerk is not configured here"},
        413: {"model": ErrorEnvelope, "description": "The body is too large"},
    },
    openapi_extra=PUBLIC,
)
async def take_clerk_webhook(request: Request, webhooks: Annotated[ClerkWebhooks, Depends(_service)]) -> Response:
    """Take what Clerk says of a user, signed by Svix. Answered once it is stored, so what is not is sent again."""
    await webhooks.take(await request.body(), request.headers)
    return Response(status_code=204)
