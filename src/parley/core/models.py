"""What tables have in common. Table models are not validated on construction: input goes through `schemas.py`."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import MetaData, text
from sqlmodel import Field, SQLModel

from parley.core.ids import new_id

# Named constraints, so that migrations can drop what they made.
SQLModel.metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class GlobalTable(SQLModel):
    """A row that belongs to no workspace. Tables of this kind are on an allow list."""

    id: UUID = Field(default_factory=new_id, primary_key=True)


class TenantTable(SQLModel):
    """A row of one workspace: `workspace_id` comes first in the primary key."""

    workspace_id: UUID = Field(primary_key=True)
    id: UUID = Field(default_factory=new_id, primary_key=True)


NOW = text("now()")


def filled_in() -> datetime:
    """A column that the database fills with the time of the insert."""
    made: datetime = Field(default=None, sa_column_kwargs={"server_default": NOW, "nullable": False})
    return made
