"""Tables of the models: what a workspace has set for itself."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint
from sqlmodel import Field, SQLModel

from parley.core.models import filled_in


class ProviderKey(SQLModel, table=True):
    """A workspace's own key of a provider, sealed. Never leaves the process but to the URL that it was given for."""

    __tablename__ = "provider_keys"
    __table_args__ = (ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),)

    workspace_id: UUID = Field(primary_key=True)
    provider: str = Field(primary_key=True, max_length=100)
    sealed: bytes
    last_four: str = Field(max_length=4)
    base_url: str | None = Field(default=None, max_length=2048)
    """The workspace's own URL; None where the operator's is meant."""
    given_for: str = Field(max_length=2048)
    """Where the key may go: the workspace's own URL, else the origin of the operator's at the time."""
    created_by: UUID | None = None
    created_at: datetime = filled_in()
    updated_at: datetime = filled_in()
