"""What the API shows of a workspace."""

from uuid import UUID

from pydantic import ConfigDict

from parley.core.schemas import ReadModel
from parley.core.scope import Role


class WorkspaceRead(ReadModel):
    """A workspace, with the caller's role in it."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={
            "examples": [{"id": "0193c0de-9f3a-7bd2-8000-2b1d4a5c6e7f", "name": "Ada's workspace", "role": "owner"}]
        },
    )

    id: UUID
    name: str
    role: Role
