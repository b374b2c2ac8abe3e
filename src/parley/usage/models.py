"""Tables of the ledger and of budgets. What changes counters is in the database's functions (see the migration)."""

from datetime import date, datetime
from decimal import Decimal
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Numeric,
    Uuid,
    text,
)
from sqlmodel import Field, SQLModel

from parley.core.models import TenantTable, filled_in

_MONEY = Numeric(18, 8)
_ZERO = text("0")


class UsageEntry(TenantTable, table=True):
    """One attempt at a provider. Rows are added and never changed, but for the name of a person who is erased."""

    __tablename__ = "usage_entries"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        CheckConstraint("status IN ('completed', 'failed', 'stopped', 'lost')", name="status"),
        Index("ix_usage_entries_started_at", "workspace_id", "started_at"),
        Index("ix_usage_entries_user_id", "workspace_id", "user_id", "started_at"),
        Index("ix_usage_entries_message_id", "workspace_id", "message_id"),
    )

    user_id: UUID | None = None
    key_id: UUID | None = None
    conversation_id: UUID | None = None
    message_id: UUID | None = None
    purpose: str = Field(max_length=16)
    provider: str = Field(max_length=100)
    model: str = Field(max_length=100)
    attempt: int
    status: str = Field(max_length=16)
    error: str | None = Field(default=None, max_length=64)
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    images: int
    estimated: bool
    own_key: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    cost: Decimal = Field(sa_type=_MONEY)
    started_at: datetime
    ended_at: datetime


class Budget(TenantTable, table=True):
    """How much may be spent in each period: by one user, by one API key, or by the whole workspace.

    `operator`: on the installation's provider keys; without a `ceiling` of its own, that of the settings holds.
    """

    __tablename__ = "budgets"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(
            ["workspace_id", "user_id"], ["memberships.workspace_id", "memberships.user_id"], ondelete="CASCADE"
        ),
        ForeignKeyConstraint(["workspace_id", "key_id"], ["api_keys.workspace_id", "api_keys.id"], ondelete="CASCADE"),
        CheckConstraint("period IN ('day', 'month')", name="period"),
        CheckConstraint("user_id IS NULL OR key_id IS NULL", name="subject"),
        CheckConstraint(
            "CASE WHEN operator THEN user_id IS NULL AND key_id IS NULL ELSE ceiling IS NOT NULL END", name="operator"
        ),
        Index(
            "uq_budgets_subject",
            "workspace_id", "operator", "user_id", "key_id", "period",
            unique=True, postgresql_nulls_not_distinct=True,
        ),
    )  # fmt: skip

    user_id: UUID | None = None
    key_id: UUID | None = None
    period: str = Field(max_length=8)
    ceiling: Decimal | None = Field(default=None, sa_type=_MONEY)
    alert_at: Decimal = Field(sa_type=Numeric(4, 3))
    operator: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    created_at: datetime = filled_in()
    updated_at: datetime = filled_in()


class BudgetCounter(SQLModel, table=True):
    """What a budget has spent and set aside in one of its periods."""

    __tablename__ = "budget_counters"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id", "budget_id"], ["budgets.workspace_id", "budgets.id"], ondelete="CASCADE"),
    )

    workspace_id: UUID = Field(primary_key=True)
    budget_id: UUID = Field(primary_key=True)
    starts_on: date = Field(primary_key=True)
    spent: Decimal = Field(sa_type=_MONEY)
    reserved: Decimal = Field(default=Decimal(0), sa_type=_MONEY, sa_column_kwargs={"server_default": _ZERO})
    alerted: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    stopped: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})


class UsageReservation(TenantTable, table=True):
    """What a call that is being made may cost at most. `id` is the reply's or the call's."""

    __tablename__ = "usage_reservations"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),
        Index(
            "ix_usage_reservations_expires_at",
            "workspace_id", "expires_at",
            postgresql_where=text("expires_at IS NOT NULL"),
        ),
        Index("ix_usage_reservations_conversation_id", "workspace_id", "conversation_id"),
    )  # fmt: skip

    user_id: UUID | None = None
    key_id: UUID | None = None
    conversation_id: UUID | None = None
    message_id: UUID | None = None
    purpose: str = Field(max_length=16)
    provider: str = Field(max_length=100)
    model: str = Field(max_length=100)
    amount: Decimal = Field(sa_type=_MONEY)
    input_tokens: int
    input_cost: Decimal = Field(sa_type=_MONEY)
    own_key: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    budgets: list[UUID] = Field(sa_column=Column(ARRAY(Uuid), nullable=False))
    reserved_at: datetime
    expires_at: datetime | None = None
