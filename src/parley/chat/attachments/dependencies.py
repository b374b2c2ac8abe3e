"""What the routes of attachments ask for."""

from typing import Annotated

from fastapi import Depends, Request

from parley.chat.attachments.service import AttachmentService


async def _attachments(request: Request) -> AttachmentService:
    service: AttachmentService = request.app.state.files.attachments
    return service


AttachmentsDep = Annotated[AttachmentService, Depends(_attachments)]
