"""API shapes of attachments."""

import unicodedata
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from pydantic import ConfigDict

from parley.core.schemas import ReadModel

NAME_LENGTH: Final = 200


class AttachmentRead(ReadModel):
    """An uploaded file. Without `conversation_id` no message has it yet."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "0193c0de-9f3a-7bd2-8000-000000000002",
                    "kind": "image",
                    "media_type": "image/png",
                    "name": "sky.png",
                    "size": 48213,
                    "width": 1280,
                    "height": 720,
                    "conversation_id": None,
                    "created_at": "2026-11-21T09:00:00Z",
                }
            ]
        }
    )

    id: UUID
    kind: Literal["image", "file"]
    media_type: str
    name: str
    size: int
    width: int | None
    height: int | None
    conversation_id: UUID | None
    created_at: datetime


def plain_name(name: str) -> str:
    """Return a file's name as it is kept: the last part of a path, without control and formatting characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(c for c in last if unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"})
    return shown.strip().strip(".")[-NAME_LENGTH:].strip()
